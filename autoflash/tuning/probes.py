"""Probes: on which shapes of a family are winners measured to see how far they carry?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoflash.device import Device
from autoflash.dispatch_table import Family
from autoflash.problem import Problem
from autoflash.tuning.budget import call_s

HELD_OUT_EVERY = 5
"""Every fifth probe, 20 %, is kept from choosing and tells what the choice is worth."""
_ROOT = 1.1673039782614187
"""Of x^5 = x + 1. Multiples of 1 over its powers, modulo 1, fill a box of four dimensions evenly
however many are taken (the R-sequence of M. Roberts, 2018): any beginning of the list is spread
out, and so is every fifth of it."""
_APART = 10007
"""Places of the sequence between two seeds. A prime: winners, too, are taken by turns."""


@dataclass(frozen=True, slots=True)
class _Range:
    """Of shapes worth measuring on a kind of device; sizes are in doublings.

    Attributes:
        rows: query rows of a square problem.
        heads: batch times heads.
        call_s: longest call, at half of the peak.
        bytes: most that must move.
    """

    rows: tuple[int, int]
    heads: tuple[int, int]
    call_s: float
    bytes: int


# From what leaves most of the device idle to what fills it many times over.
_GPU = _Range(rows=(7, 15), heads=(3, 10), call_s=5e-3, bytes=2 << 30)
_CPU = _Range(rows=(6, 12), heads=(1, 6), call_s=30e-3, bytes=128 << 20)


def probes(winners: Sequence[Problem], device: Device, count: int, seed: int = 0) -> list[Problem]:
    """Shapes like those of the winners, spread over heads, lengths and heads that share keys.

    Three in five are square; one in five has many times more keys than rows, as a prompt that is
    taken in chunks; one in five has a few rows, as decoding has. More of them begin with the same
    ones. None is a winner's own: that one is served by its record.

    Args:
        winners: problems of one family that were tuned; at least one.
        device: decides how large they may be.
        count: how many.
        seed: another one gives others, spread as evenly: judges that no earlier choice has met.
    """
    found: dict[Problem, None] = {}
    first = _APART * seed
    tuned, families = set(winners), {Family.of(problem) for problem in winners}
    # A range so narrow that it does not hold as many shapes ends the search.
    for number in range(first, first + 20 * count):
        if len(found) == count:
            break
        place = [(0.5 + (number + 1) / _ROOT**power) % 1.0 for power in (1, 2, 3, 4)]
        problem = _probe(winners, number, place, device)
        if problem is None or problem in tuned:
            continue
        if Family.of(problem) in families:  # a window that no row reaches is none
            found.setdefault(problem)
    return list(found)


def is_held_out(number: int) -> bool:
    """Whether the probe at this place of the list is kept from choosing."""
    return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _probe(
    winners: Sequence[Problem], number: int, place: Sequence[float], device: Device
) -> Problem | None:
    within = _GPU if device.is_cuda else _CPU
    across, down, kind, sharing = place
    like = winners[number % len(winners)]  # windows and softcaps are those of the winners
    rows, heads = _size(down, within.rows), 1 << int(_scaled(across, within.heads))
    keys = rows
    if kind >= 0.8:
        rows = 1 << int(_scaled((kind - 0.8) / 0.2, (0, 5)))
        keys = max(keys, rows)
    elif kind >= 0.6:
        rows = max(1, rows >> (1 + int(_scaled((kind - 0.6) / 0.2, (0, 4)))))
    groups = sorted({1, 4, *(winner.group_size for winner in winners)})[:3]
    group = groups[int(sharing * len(groups))]
    for shape in _smaller(rows, keys, heads):
        problem = _shaped(like, *shape, group)
        if call_s(problem, device) <= within.call_s and problem.bytes <= within.bytes:
            return problem if problem.flops else None
    return None


def _smaller(rows: int, keys: int, heads: int) -> Iterator[tuple[int, int, int]]:
    """The shape, then half the heads, as long as four are left, then half the lengths, and on."""
    while True:
        yield rows, keys, heads
        if heads > 4:
            heads //= 2
        elif keys > 1:
            rows, keys = max(1, rows // 2), keys // 2
        else:
            return


def _shaped(like: Problem, rows: int, keys: int, heads: int, group: int) -> Problem:
    """A problem with about so many (batch, head) pairs; up to 32 of them are heads."""
    kv_heads = max(1, min(heads, 32) // group)
    return dataclasses.replace(
        like,
        batch=max(1, heads // (kv_heads * group)),
        seqlen_q=rows,
        seqlen_k=keys,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
    )


def _scaled(share: float, bounds: tuple[int, int]) -> float:
    """The place between two bounds, the upper one excluded."""
    return bounds[0] + share * (bounds[1] - bounds[0])


def _size(share: float, bounds: tuple[int, int]) -> int:
    """A power of two, or half as much again."""
    doublings = _scaled(share, bounds)
    whole = int(doublings)
    return (1 << whole) + ((1 << whole) // 2 if doublings - whole >= 0.5 else 0)
