"""Memory of code that runs on tensors without storage.

Floating-point tensors are torch's fake tensors: shapes, dtypes and autograd are real, nothing is computed. Integers
(tokens, labels, positions, edges of documents) are computed, because the code branches on them. torch's own
`MemTracker` needs a run in which every tensor is fake, and fails at the first such branch.
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
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...ops import attention_kernels, backends, causal_op
from ...sequence_parallel.linear import attention as sharded_attention

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# the functions behind the custom ops, whose temporaries are counted as well
CUSTOM_OP_BODIES = {op._opoverload: op._init_fn for op in (causal_op._forward, causal_op._backward)}
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
EXCHANGED = "states exchanged"


class FakeMemoryTracker(TorchDispatchMode):
    """Context in which new floating-point tensors are fake, and their bytes are counted while they are alive.

    - `stage`: name under which new tensors are counted.
    - `peak`: bytes by stage at the moment of the largest total. What collectives send and receive is counted under
      EXCHANGED.
    - `exchanged`: largest number of bytes under EXCHANGED at any moment.
    - `host`: bytes that `offloading` has moved to the host.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.alive, self.peak, self.exchanged, self.host = stage, Counter[str](), Counter[str](), 0, 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, tuple[str, int]] = {}

    def parameter(self, like: nn.Parameter) -> nn.Parameter:
        """Return a fake parameter that is not counted. Of its gradient, the summand of a micro-batch is counted."""
        with self._fake:
            x = nn.Parameter(torch.empty(like.shape, dtype=like.dtype), requires_grad=like.requires_grad)
        self._storages[x.untyped_storage()._cdata] = "", 0
        if x.requires_grad:
            x.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
        return x

    def move(self, x: Tensor, stage: str) -> None:
        """Count `x` under another stage."""
        key = x.untyped_storage()._cdata
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = stage, size
            self.alive.update({stage: size})
            self.alive.subtract({old: size})

    def offloading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with saved tensors in the host's memory (`save_on_cpu`, as transformers offloads)."""

        def pack(x: Tensor) -> tuple[torch.Size, torch.dtype]:
            self.host += x.nbytes
            return x.shape, x.dtype

        def call(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(pack, lambda kept: torch.empty(kept[0], dtype=kept[1])):
                return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (body := CUSTOM_OP_BODIES.get(func)) is not None:
            with self:
                return body(*args, **kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func in INDEXED:  # the number of elements that a mask selects is unknown for a fake mask
            args = (args[0], [_positions(index) for index in args[1]], *args[2:])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fake, out, workspace = any(isinstance(x, FakeTensor) for x in tensors), None, []
        if fake or not tensors:
            with self._fake:
                out = func(*args, **kwargs)
                workspace = _flash_workspace(args[1], args[2]) if func is FLASH_BACKWARD else []
        if not (fake or (isinstance(out, Tensor) and out.is_floating_point())):
            out = func(*args, **kwargs)  # integers only
        for x in tree_leaves((out, workspace)):
            if isinstance(x, Tensor):
                self._hold(x)
        return out

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a collective of a fake process group, which reads only the sizes of real tensors."""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.move(x, EXCHANGED)
        self.exchanged = max(self.exchanged, self.alive[EXCHANGED])
        args, kwargs = tree_map_only(FakeTensor, lambda x: torch.empty(x.shape, dtype=x.dtype), (args, kwargs))
        return func(*args, **kwargs)

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


def _flash_workspace(q: Tensor, k: Tensor) -> list[Tensor]:
    """Return the temporaries of the backward: dq in float32; for grouped queries, dk and dv of every query head."""
    made = [torch.empty_like(q, dtype=torch.float32)]
    return made + [torch.empty_like(q) for _ in "kv"] if k.shape[1] < q.shape[1] else made


def _positions(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor) or index.dim() > 1:
        return index
    return index.nonzero().squeeze(1)


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let code inside choose as on a GPU of compute capability 9.0, without launching kernels. Needs triton.

    Fake tensors of a CUDA device would do so by themselves, but autograd refuses them in a torch built for CPUs.
    """
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
