"""How much memory this process has needed."""

from __future__ import annotations

import sys

import psutil
import torch


def peak_memory() -> int:
    """Bytes: torch's peak on the GPU, or the peak of the whole process where there is none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
