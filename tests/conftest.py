"""Settings of the complete test session."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the machine; set before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is made


def pytest_collection_finish() -> None:
    """Leave imported modules out of garbage collections: accelerate collects often."""
    gc.freeze()
