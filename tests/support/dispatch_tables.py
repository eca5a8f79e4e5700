"""What do tests of dispatch tables start from? A table of two configs, and shapes with times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoflash.config import Config
from autoflash.device import KNOWN_GPUS
from autoflash.dispatch_table import Bound, DispatchTable, Family, Leaf, Probe
from autoflash.problem import Problem

SLOW = Config.of("triton/fwd", {"block_m": 64, "num_stages": 1})
"""The default of the templates that tests of dispatch write."""
FAST = Config.of("triton/fwd", {"block_m": 32, "num_stages": 2})


def probe(
    seqlen: int | str, *times_us: float | None, held_out: bool = False, default: int = 0
) -> Probe:
    """A shape: rows and keys of b1h8d64c in bfloat16, or a name."""
    name = seqlen if isinstance(seqlen, str) else f"b1s{seqlen}h8d64c"
    problem = Problem.parse(name)
    return Probe(problem=problem, held_out=held_out, times_us=times_us, default=default)


def table(templates: Mapping[str, str] | None = None, **changes: Any) -> DispatchTable:
    """Up to 1024 rows the default is best, beyond it FAST; 512 and 4096 rows were tuned.

    `templates` are their digests; `changes` are fields of DispatchTable.
    """
    leaves: Sequence[Leaf] = (
        Leaf(where=(Bound("seqlen_q", None, 1024),), config=None, probes=2, mean=0.0, worst=0.0),
        Leaf(where=(Bound("seqlen_q", 1024, None),), config=1, probes=2, mean=0.01, worst=0.02),
    )
    fields: dict[str, Any] = {
        "device": KNOWN_GPUS["sm90"],
        "family": Family.of(Problem.parse("b1s1h1d64c")),
        "policy": "test-turns",
        "digests": templates or {"triton/fwd": "d1"},
        "configs": (SLOW, FAST),
        "leaves": leaves,
        "probes": (
            probe(256, 10.0, 12.0),
            probe(1024, 40.0, 50.0),
            probe(2048, 90.0, 80.0),
            probe(8192, 1100.0, 1000.0),
            probe(768, 30.0, 33.0, held_out=True),
            probe(3072, 210.0, 200.0, held_out=True),
        ),
        "tuned": ((Problem.parse("b1s512h8d64c"), 0), (Problem.parse("b1s4096h8d64c"), 1)),
        "environment": {"torch": "2.13.0"},
        "created": "2026-11-21T10:00:00+00:00",
    }
    return DispatchTable(**{**fields, **changes})
