"""Lengths of sequences, from a file or drawn like Wikipedia's articles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .group_costs import Integers

# Share of the articles that is longer -> length, of the million lengths that come with FlexSP's code; the shortest is
# an assumption. Between them lengths follow power laws, which gives a mean of 950 tokens, 70 % of them in sequences up
# to 8K and 5 % in those above 64K; in FlexSP's file these are 1,014, 72.5 % and 3.1 %.
WIKIPEDIA = {1.0: 16, 0.5: 347, 0.1: 2112, 0.016: 8192, 0.01: 10919, 0.001: 37353, 0.0003: 65536, 1e-6: 1823777}
DIGITS = 12  # of a length


def read_lengths(name: str, count: int) -> Integers:
    """Read the first `count` lengths of a text file, integers between white space; "wikipedia" draws them instead."""
    if name == "wikipedia":
        longer, known = np.log(np.random.default_rng(0).random(count)), sorted(WIKIPEDIA)
        return np.exp(np.interp(longer, np.log(known), np.log([WIKIPEDIA[share] for share in known]))).astype(np.int64)
    try:
        words = Path(name).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'lengths must be "wikipedia" or a text file with a length on each line, got {name!r}: {error}'
        ) from error
    lengths = [int(word) if word.isdecimal() and len(word) <= DIGITS else 0 for word in words]
    if 0 in lengths:
        raise ValueError(
            f"a file of lengths must hold integers from 1 on, of {DIGITS} digits at most, and white space, got "
            f"{words[lengths.index(0)]!r} in {name}; count tokens"
        )
    if len(lengths) < count:
        raise ValueError(
            f"the file must hold {count} lengths (batch * steps), got {len(lengths)} in {name}; take a smaller batch "
            "or fewer steps"
        )
    return np.array(lengths[:count], dtype=np.int64)
