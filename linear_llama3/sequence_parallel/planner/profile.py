"""Profiles of a model on a machine (JSON), and the costs of groups that follow from them.

A profile holds coefficients of forward and backward passes. The profiles in `profiles/` come with the package and state
their origin: "published" constants of a paper, "simulated" ones (data sheets and assumptions), or "measured" ones.

    seconds of a group of degree d with sequences of lengths s =  micro_batch
        + sum over s of (token + layers * layer's token) s / d + softmax layers * softmax_square s^2 / d
        + transfers of its layers (`costs.py`, with the link of degree d): the K/V of softmax layers grow with the
          tokens, the states of linear layers depend only on the degree
    bytes of a rank  =  states (/ devices if sharded) + (token + layers * layer's token) tokens / d
        + K/V that LASP-2H gathers in one layer, of all tokens of the group, and the states that LASP-2 gathers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..costs import FLOAT32, GATHERED_LIMIT, LinkSpeed, Sizes, linear_costs, softmax_costs
from .checks import Amount, Count, Positive, Size, check, check_fields
from .group_costs import Costs, DegreeCosts

PROFILES = Path(__file__).parent / "profiles"
SUFFIXES = (".json",)
ORIGINS = ("published", "simulated", "measured")
AUTO = {"linear": ("lasp2", "all_to_all", "all_scan", "lasp1"), "softmax": ("ulysses", "lasp2h", "ring")}
AUTO_TOKENS = 4096  # of a rank, at which "auto" compares


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a model that its costs depend on."""

    hidden_size: Size
    intermediate_size: Size
    vocab_size: Size
    tied_embeddings: bool  # the head's weights are the embedding's
    softmax_layers: Count
    linear_layers: Count
    q_heads: Size  # of softmax layers
    kv_heads: Size
    head_dim: Size
    mixer: str | None  # of linear layers; None, in a profile: any
    state: tuple[Size, Size, Size]  # of linear layers: heads, D_k, D_v, including a normalizer's column
    decays: bool  # travel with the state
    element: Size  # bytes of an activation in training

    def __post_init__(self) -> None:
        check_fields(self, "model")

    @property
    def chunks_per_rank(self) -> int:
        """Chunks per rank of the layout "auto": zigzag for hybrids, contiguous for pure linear models."""
        return 2 if self.softmax_layers else 1

    def with_softmax_every(self, interval: int | None) -> Model:
        """Return the model with a softmax layer in every `interval` layers; None: all layers are linear."""
        layers = self.softmax_layers + self.linear_layers
        count = layers // interval if interval else 0
        return replace(self, softmax_layers=count, linear_layers=layers - count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Seconds of forward and backward on a single device."""

    micro_batch: Amount  # fixed
    token: Amount  # of the parts that every layer has, embedding and head
    softmax_square: Amount  # of one softmax layer, times length squared
    softmax_token: Amount = 0.0  # of one softmax layer
    linear_token: Amount = 0.0  # of one linear layer

    def __post_init__(self) -> None:
        check_fields(self, "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    device: Positive  # that a run may fill
    states: Amount  # parameters, gradients and optimizer
    sharded: bool  # states are divided over all devices (FSDP, ZeRO)
    token: Amount  # activations, of the same parts as in `Seconds`
    softmax_token: Amount = 0.0
    linear_token: Amount = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    name: str
    origin: str  # one of ORIGINS
    source: str  # where the figures are from
    hardware: str
    processes: Size | None = None  # that were measured at once; None: not measured
    gradient_checkpointing: bool | None  # None: unknown
    model: Model
    seconds: Seconds
    bytes: Bytes
    links: Mapping[int, LinkSpeed]  # by degree: the slowest link of a group of consecutive ranks

    def __post_init__(self) -> None:
        check_fields(self)
        if self.origin not in ORIGINS:
            raise ValueError(f"a profile's origin must be one of {ORIGINS}, got {self.origin!r}")
        if self.origin == "measured" and self.processes is None:
            raise ValueError("processes must be stated by a measured profile, got None")
        for degree, (latency, bandwidth) in self.links.items():
            check("a degree in links", "Degree", degree)
            check(f"links.{degree}.latency", "Amount", latency)
            check(f"links.{degree}.bandwidth", "Positive", bandwidth)

    def require(self, model: Model) -> None:
        """Raise ValueError unless this is a profile of that model; its layers may be of other kinds."""
        mixed = replace(model, softmax_layers=self.model.softmax_layers, linear_layers=self.model.linear_layers)
        if self.model.mixer is None:
            mixed = replace(mixed, mixer=None)
        own, asked = asdict(self.model), asdict(mixed)
        layers = self.model.softmax_layers + self.model.linear_layers
        wrong = [f"{key} {own[key]}, the model {asked[key]}" for key in own if own[key] != asked[key]]
        if layers != model.softmax_layers + model.linear_layers:
            wrong.append(f"{layers} layers, the model {model.softmax_layers + model.linear_layers}")
        if wrong:
            raise ValueError(
                f"a profile must be of the model that is planned, got {self.name!r} with {'; '.join(wrong)}; "
                "make a profile of this model"
            )

    def save(self, path: str | Path) -> None:
        links = {str(degree): link._asdict() for degree, link in self.links.items()}
        Path(path).write_text(json.dumps({**asdict(self), "links": links}, indent=2) + "\n")


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def load_profile(name: str | Path) -> Profile:
    """Load a profile of the package by its name, or a file; ValueError for anything else."""
    path = Path(name)
    if path.suffix not in SUFFIXES:
        path = PROFILES / f"{name}.json"
    remedy = "correct the file, or measure a new one with `linear-llama3 profile`"
    try:
        return _from_json(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise ValueError(
            f"a profile must be one of {profile_names()} or a .json file, got {str(name)!r}, which does not exist; "
            "measure one with `linear-llama3 profile`"
        ) from None
    except (KeyError, TypeError, AttributeError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        expected = ", ".join(field.name for field in fields(Profile))
        raise ValueError(
            f"a profile is a JSON file that holds {expected} (planner/profile.py), got {path}: {error!r}; {remedy}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{error} in {path}; {remedy}") from error


def _from_json(data: Any) -> Profile:
    state, links = data["model"]["state"], data["links"].items()
    nested = {
        "model": Model(**{**data["model"], "state": tuple(state) if isinstance(state, list) else state}),
        "seconds": Seconds(**data["seconds"]),
        "bytes": Bytes(**data["bytes"]),
        "links": {int(key) if key.isdecimal() else key: LinkSpeed(**link) for key, link in links},
    }
    return Profile(**{**data, **nested})


def model_costs(
    profile: Profile, devices: int, *, model: Model | None = None, linear: str = "auto", softmax: str = "auto"
) -> Costs:
    """Compute the costs of groups of every degree that has a link in the profile and that the strategies allow.

    Args:
        model: default the profile's; its layers may be of other kinds.
        linear: a name of `linear_costs`, or "auto": the fastest for each degree.
        softmax: a name of `softmax_costs`, or "auto": the fastest of Ulysses where heads divide, Ring, and LASP-2H
            where it gathers no more than `GATHERED_LIMIT`.
    """
    model = model or profile.model
    profile.require(model)
    for kind, name in (("linear", linear), ("softmax", softmax)):
        _check_name(kind, name, model)
    by_degree = {1: _device_costs(profile, model, devices)}
    for degree, link in sorted(profile.links.items()):
        if 1 < degree <= devices:
            group = _group_costs(profile, model, devices, degree, link, {"linear": linear, "softmax": softmax})
            if group is not None:
                by_degree[degree] = group
    return Costs(by_degree=by_degree, chunks_per_rank=model.chunks_per_rank)


def _device_costs(profile: Profile, model: Model, devices: int) -> DegreeCosts:
    s, b = profile.seconds, profile.bytes
    return DegreeCosts(
        fixed=s.micro_batch,
        per_token=s.token + model.softmax_layers * s.softmax_token + model.linear_layers * s.linear_token,
        per_square=model.softmax_layers * s.softmax_square,
        fixed_bytes=b.states / devices if b.sharded else b.states,
        bytes_per_token=b.token + model.softmax_layers * b.softmax_token + model.linear_layers * b.linear_token,
    )


def _group_costs(
    profile: Profile, model: Model, devices: int, degree: int, link: LinkSpeed, strategies: Mapping[str, str]
) -> DegreeCosts | None:
    """Compute the costs of one degree; None if a requested strategy does not support it."""
    one = _device_costs(profile, model, devices)
    own = (
        (profile.bytes.device - one.fixed_bytes) / one.bytes_per_token if one.bytes_per_token else AUTO_TOKENS
    )  # tokens
    gathered = 2 * model.kv_heads * model.head_dim * (model.element + FLOAT32)  # bytes a token of the group, LASP-2H
    chosen, transfer, slope = {"linear": "", "softmax": ""}, 0.0, 0.0
    for kind, layers in (("linear", model.linear_layers), ("softmax", model.softmax_layers)):
        if layers:
            options = _transfers(kind, model, degree, link, recomputed=bool(profile.gradient_checkpointing))
            allowed = [name for name in AUTO[kind] if name in options]
            if gathered * own * degree > GATHERED_LIMIT and kind == "softmax":
                allowed.remove("lasp2h")
            name = strategies[kind]
            if name == "auto":
                name = min(allowed, key=lambda option: options[option][0] + AUTO_TOKENS * options[option][1])
            if name not in options:
                return None
            chosen[kind] = name
            transfer += layers * options[name][0]
            slope += layers * options[name][1]
    heads, features, columns = model.state
    states = degree * model.chunks_per_rank * heads * features * columns * FLOAT32
    return DegreeCosts(
        fixed=one.fixed + transfer,
        per_token=(one.per_token + slope) / degree,
        per_square=one.per_square / degree,
        fixed_bytes=one.fixed_bytes + states * (chosen["linear"] == "lasp2"),
        bytes_per_token=one.bytes_per_token / degree + gathered * (chosen["softmax"] == "lasp2h"),
        **chosen,
    )


def _transfers(
    kind: str, model: Model, degree: int, link: LinkSpeed, *, recomputed: bool
) -> dict[str, tuple[float, float]]:
    """Seconds of a layer's transfers by strategy: a fixed part, and a part for each token of a rank."""
    common: dict[str, Any] = {"batch": 1, "element": model.element, "ranks": degree, "decays": model.decays}
    common |= {"chunks_per_rank": model.chunks_per_rank, "recomputed": recomputed}
    if kind == "linear":
        heads, features, columns = model.state
        sizes = Sizes(tokens=0, q_heads=heads, kv_heads=heads, key_dim=features, value_dim=columns, **common)
        return {name: (cost.seconds, 0.0) for name, cost in linear_costs(sizes, link).items()}
    common |= {"q_heads": model.q_heads, "kv_heads": model.kv_heads}
    common |= {"key_dim": model.head_dim, "value_dim": model.head_dim}
    none, one = (softmax_costs(Sizes(tokens=tokens, **common), link) for tokens in (0, 1))
    return {name: (none[name].seconds, one[name].seconds - none[name].seconds) for name in none}


def _check_name(kind: str, name: str, model: Model) -> None:
    known = _transfers(kind, replace(model, q_heads=2, kv_heads=2), 2, LinkSpeed(0.0, 1.0), recomputed=False)
    if name != "auto" and name not in known:
        raise ValueError(f"a strategy for {kind} layers must be one of {sorted(known)} or 'auto', got {name!r}")
