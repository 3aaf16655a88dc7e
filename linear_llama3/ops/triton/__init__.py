"""Kernels for NVIDIA GPUs: the recurrence with any of its gates, forward and backward; see `passes.py`."""
