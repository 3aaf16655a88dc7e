"""Lengths of sequences: from a file, or drawn like Wikipedia's articles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .group_costs import Integers

# Share of the articles that is longer -> length, of the million lengths that come with FlexSP's code; the shortest is
# an assumption. Between them lengths follow power laws, which gives a mean of 950 tokens, 70 % of them in sequences up
# to 8K and 5 % in those above 64K; in FlexSP's file these are 1,014, 72.5 % and 3.1 %.
WIKIPEDIA = {1.0: 16, 0.5: 347, 0.1: 2112, 0.016: 8192, 0.01: 10919, 0.001: 37353, 0.0003: 65536, 1e-6: 1823777}


def read_lengths(name: str, count: int) -> Integers:
    """The first `count` lengths of a text file with whole numbers between white space; "wikipedia" draws them."""
    if name == "wikipedia":
        longer, known = np.log(np.random.default_rng(0).random(count)), sorted(WIKIPEDIA)
        return np.exp(np.interp(longer, np.log(known), np.log([WIKIPEDIA[share] for share in known]))).astype(np.int64)
    if not Path(name).is_file():
        raise ValueError(f'lengths must be "wikipedia" or a text file with a length on each line, got {name!r}')
    try:
        lengths = np.array(Path(name).read_text().split(), dtype=np.int64)
    except ValueError as error:
        raise ValueError(f"a file of lengths holds whole numbers and white space, got {name}: {error}") from error
    if len(lengths) < count:
        raise ValueError(f"the file must hold {count} lengths (batch * steps), got {len(lengths)} in {name}")
    return lengths[:count]
