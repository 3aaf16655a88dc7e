"""Runs code on tensors without memory, and counts the bytes that it would hold.

Floating-point tensors are torch's fake tensors: shapes, dtypes and autograd are real, nothing is computed. Whole
numbers (tokens, labels, positions, edges of documents) are computed, since programs branch on them.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...ops import attention_kernels, backends
from ...sequence_parallel.linear import attention as sharded_attention

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
EXCHANGED = "states exchanged"


class VirtualRun(TorchDispatchMode):
    """What is made inside is virtual.

    `stage` names what is made from now on. `peak` are the bytes of each stage at the moment when they were most in all;
    what collectives send and receive is a stage of its own, EXCHANGED, `exchanged` its most bytes at any moment.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.alive, self.peak, self.exchanged = stage, Counter[str](), Counter[str](), 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, tuple[str, int]] = {}

    def parameter(self, like: nn.Parameter) -> nn.Parameter:
        """A virtual one, not counted. Of its gradient, what is to be added to the one that is there counts."""
        with self._fake:
            x = nn.Parameter(torch.empty(like.shape, dtype=like.dtype), requires_grad=like.requires_grad)
        self._storages[x.untyped_storage()._cdata] = "", 0
        if x.requires_grad:
            x.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
        return x

    def move(self, x: Tensor, stage: str) -> None:
        """Counts `x` as made in another stage."""
        key = x.untyped_storage()._cdata
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = stage, size
            self.alive.update({stage: size})
            self.alive.subtract({old: size})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = _bodies().get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func in INDEXED:  # a fake tensor cannot tell how many a mask chooses
            args = (args[0], [_places(index) for index in args[1]], *args[2:])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        workspace = (
            self._workspace(args[1], args[2])
            if func is aten._scaled_dot_product_flash_attention_backward.default
            else ()
        )
        if any(isinstance(x, FakeTensor) for x in tensors):
            out = self._pretend(func, args, kwargs)
        else:
            out = None if tensors else self._pretend(func, args, kwargs)  # perhaps whole numbers are made
            if not (isinstance(out, Tensor) and out.is_floating_point()):
                out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._hold(x)
        del workspace
        return out

    def _pretend(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._fake:
            return func(*args, **kwargs)

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A fake process group looks at sizes, and never at this memory, which the system need not provide then."""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.move(x, EXCHANGED)
        self.exchanged = max(self.exchanged, self.alive[EXCHANGED])
        args, kwargs = tree_map_only(FakeTensor, lambda x: torch.empty(x.shape, dtype=x.dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _workspace(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """Flash attention sums dq in float32; of grouped queries, dk and dv have the queries' heads at first."""
        with self._fake:
            made = [torch.empty_like(q, dtype=torch.float32)]
            made += [torch.empty_like(q) for _ in "kv"] if k.shape[1] < q.shape[1] else []
        for x in made:
            self._hold(x)
        return made

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return
        self._storages[key] = self.stage, size
        self.alive[self.stage] += size
        weakref.finalize(storage, self._free, key)
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()

    def _free(self, key: int) -> None:
        stage, size = self._storages.pop(key)
        self.alive[stage] -= size


def _bodies() -> dict[Any, Callable[..., Any]]:
    """What our operators do: opaque to fake tensors, they would hide what they hold while they run."""
    op = sys.modules.get(f"{backends.__package__}.triton.op")
    return {} if op is None else {x._opoverload: x._init_fn for x in (op._forward, op._backward)}


def _places(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor) or index.dim() > 1:
        return index
    return index.nonzero().squeeze(1)


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Code inside goes the ways of NVIDIA's compute capability 9.0; kernels are not launched. Needs triton."""
    try:
        from ...ops.triton import launch
    except ImportError as error:
        raise ValueError("a GPU's account needs the package triton, which is not installed; give gpu=False") from error

    chosen, attended = backends.choose_backend, F.scaled_dot_product_attention

    def choose(name: str, k: Tensor, *, causal: bool = True) -> str:
        return "triton" if backends.triton_obstacle(k, causal=causal) is None else chosen(name, k, causal=causal)

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> Tensor:
        if attn_mask is None and attention_kernels.fits_flash(q, v):
            causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]
        return attended(q, k, v, attn_mask, *rest, **kwargs)

    stand_ins: list[tuple[Any, str, Any]] = [
        (backends, "device_obstacle", lambda device: None),
        (sys.modules[f"{backends.__package__}.linear_attention"], "choose_backend", choose),
        (sharded_attention, "choose_backend", choose),
        (attention_kernels, "_flash_on_cpu", lambda q, v: False),
        (attention_kernels, "_flash_on_cuda", attention_kernels.fits_flash),
        (F, "scaled_dot_product_attention", attend),
        *((launch, name, _NoKernel()) for name in vars(launch) if name.endswith("_kernel")),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield
