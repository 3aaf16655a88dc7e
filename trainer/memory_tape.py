"""How much memory a differentiable computation holds at most, told by its steps.

A step reads tensors, makes one, and keeps some for its gradient. Everything else follows: forward, a tensor lives until
its last reader, or until the backward pass if it is kept; backward, gradients live from the step that makes them to the
step that reads them. No number is computed, so any size takes no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

EXCHANGED = "exchanged"  # name of what ranks send each other, in every tape


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One differentiable operation. Sizes are bytes."""

    inputs: tuple[str, ...]  # that have a gradient
    output: str
    size: int
    saves: tuple[str, ...] = ()  # of the inputs and the output, for the backward pass
    kept: int = 0  # further bytes for it
    work: int = 0  # that live only while it runs,
    backward_work: int = 0  # and while its gradients are computed
    exchanged: int = 0  # further ones in either, for what ranks send each other
    parameters: int = 0  # of the gradients of its parameters, until they are added to those that are there
    aliases: bool = False  # the gradient of the inputs is that of the output, as of a sum
    inside: Tape | None = None  # computed once more in the backward pass; only `saves` are kept
    pieces: bool = False  # `inside` is one of many tiles of the sequence


class Ledger:
    """Tensors that are alive, and those that were when they were most."""

    def __init__(self) -> None:
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def hold(self, name: str, size: int) -> None:
        self.alive[name] += size
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()

    def free(self, name: str) -> None:
        self.alive.pop(name, None)

    def during(self, held: Mapping[str, int]) -> None:
        """What is held for a moment, beside all that is alive."""
        before = self.alive.copy()
        for name, size in held.items():
            self.hold(name, size)
        self.alive = before


@dataclass(slots=True)
class Tape:
    """Steps in their order.

    Args:
        name: what the tensors of an inner tape are named after, in the outer one.
        sources: bytes of the tensors that it starts from; they belong to others, and live on.
    """

    name: str
    sources: dict[str, int]
    steps: list[Step] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        return {**self.sources, **{step.output: step.size for step in self.steps}}

    @property
    def output(self) -> str:
        return self.steps[-1].output

    def peak(self) -> Counter[str]:
        """What is alive at most in a forward and a backward pass, without the sources and the gradient given."""
        ledger = Ledger()
        self.forward(ledger)
        ledger.free(self.output)  # nobody asks for it in a second computation
        self.backward(ledger)
        return ledger.peak

    def forward(self, ledger: Ledger, *, learns: bool = True) -> None:
        """Afterwards the last output is alive, and with `learns` all that is kept."""
        saved: set[str] = set()
        for index, step in enumerate(self.steps):
            self._run(step, ledger)
            if learns:
                saved.update(step.saves)
                ledger.hold(f"kept by {step.output}", step.kept)
            needed = saved.union({self.output}, *(later.inputs for later in self.steps[index + 1 :]))
            for name in {step.output, *step.inputs} - needed - self.sources.keys():
                ledger.free(name)

    def _run(self, step: Step, ledger: Ledger) -> None:
        work = Counter({"work": step.work, EXCHANGED: step.exchanged})
        if step.inside is not None:
            inner = Ledger()
            step.inside.forward(inner, learns=False)
            work += step.inside.named(inner.peak)
        pieces = {f"pieces of {step.output}": step.size} if step.pieces else {}
        ledger.during(work + Counter(pieces))
        ledger.during({**pieces, step.output: step.size})  # the whole is made of them
        ledger.hold(step.output, step.size)

    def backward(self, ledger: Ledger) -> None:
        """From the gradient of the last output, `d ` and its name, to those of the sources."""
        gradients = {self.output: f"d {self.output}"}  # tensor -> its gradient's name; several may share one
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            d_output = gradients.pop(step.output)
            self._run_backward(step, d_output, ledger, gradients)
            if d_output not in gradients.values():
                ledger.free(d_output)
            needed = {name for earlier in self.steps[:index] for name in earlier.saves}
            for name in {*step.saves, step.output} - needed - self.sources.keys():
                ledger.free(name)
            ledger.free(f"kept by {step.output}")

    def _run_backward(self, step: Step, d_output: str, ledger: Ledger, gradients: dict[str, str]) -> None:
        sizes = self.sizes
        made = {name: d_output if step.aliases else f"d {name}, from {step.output}" for name in step.inputs}
        work = Counter({"work": step.backward_work, EXCHANGED: step.exchanged, "d parameters": step.parameters})
        if step.inside is not None:
            work += step.inside.named(step.inside.peak())
        pieces = {f"pieces of d {name}": sizes[name] for name in step.inputs if step.pieces}
        if step.inside is not None:  # whose own gradients of the inputs become the pieces, or the whole
            ledger.during(work + Counter(pieces))
            work = Counter()
        for name in step.inputs if not step.aliases else ():
            ledger.during(pieces | {made[name]: sizes[name]})  # one after the other from its pieces
            pieces.pop(f"pieces of d {name}", None)
            ledger.hold(made[name], sizes[name])
        ledger.during(work)
        for name in step.inputs:
            self._add(name, made[name], ledger, gradients)

    def _add(self, name: str, gradient: str, ledger: Ledger, gradients: dict[str, str]) -> None:
        """A second gradient is added to the first, in its place if that is nobody else's."""
        if name not in gradients:
            gradients[name] = gradient
            return
        first = gradients.pop(name)
        if first in gradients.values():
            first = f"d {name}, summed"
            ledger.hold(first, self.sizes[name])
        gradients[name] = first
        if gradient not in gradients.values():
            ledger.free(gradient)

    def named(self, tensors: Mapping[str, int]) -> Counter[str]:
        """Tensors of this tape as another one calls them."""
        return Counter({n if n == EXCHANGED else f"{self.name}: {n}": size for n, size in tensors.items()})
