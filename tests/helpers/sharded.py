"""Results of a sharded model and their comparison with one device."""

from __future__ import annotations

import numpy as np

Result = tuple[np.ndarray, float, dict[str, np.ndarray]]
"""Logits `[B, T, vocab]`, loss, gradients by parameter name."""


def assert_sharded_equals(by_rank: list[Result], expected: Result) -> None:
    """Compare the result on every rank with that of one device."""
    logits, loss, grads = expected
    for got in by_rank:
        # not 1e-10: transformers' RMSNorm and rotary table are float32 in every run
        np.testing.assert_allclose(got[0], logits, rtol=1e-5, atol=1e-5)
        assert abs(got[1] - loss) < 1e-6 * abs(loss)
        assert got[2].keys() == grads.keys()
        for name, grad in grads.items():
            np.testing.assert_allclose(got[2][name], grad, rtol=1e-4, atol=1e-5 * np.abs(grad).max(), err_msg=name)
