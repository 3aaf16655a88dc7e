"""A record of the tensors that a piece of code allocates."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Shapes of all tensors that operations make, forward and backward; not of views."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.shapes += [tuple(x.shape) for x in made if x.untyped_storage()._cdata not in given]
        return out

    def largest(self) -> int:
        """Numbers in the largest."""
        return max(torch.Size(shape).numel() for shape in self.shapes)
