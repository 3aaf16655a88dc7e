"""What some tests need of the machine."""

from __future__ import annotations

import shutil

import pytest

needs_cxx = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="inductor compiles C++ on a CPU"
)
