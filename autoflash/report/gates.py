"""Where did candidates fall: how many reached each gate, how many it stopped, and why?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoflash.record import Record

GATES = {
    "constraints": "the template's declaration allows it",
    "compiler": "the compiler accepts it",
    "resources": "registers and shared memory suffice, and it does not spill heavily",
    "launch": "it runs to its end",
    "result": "its error is no larger than the rule allows",
    "racing": "it is not hopelessly slower than the best so far",
}
"""Gate -> what passes it, in the order in which candidates come to them."""

_GATE_OF = {
    "infeasible": "constraints",
    "compile_error": "compiler",
    "over_resources": "resources",
    "runtime_error": "launch",
    "timeout": "launch",
    "crash": "launch",
    "wrong_result": "result",
    "slow": "racing",
    "ok": None,
    "predicted": None,
}
_COMPILED = ("compiler", "resources")
"""Gates that a candidate of an absent device comes to, after the constraints."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate of the funnel.

    Attributes:
        name: a key of GATES.
        reached: candidates that came to it.
        stopped: those it rejected.
    """

    name: str
    reached: int
    stopped: int


@dataclass(frozen=True, slots=True)
class Reason:
    """Why candidates were rejected; reasons that differ in numbers only are one.

    Attributes:
        gate: where.
        outcome: a key of record.OUTCOMES.
        template: whose configs.
        count: how many.
        text: the reason of the first of them.
    """

    gate: str
    outcome: str
    template: str
    count: int
    text: str


@dataclass(frozen=True, slots=True)
class Funnel:
    """All gates, in their order.

    Attributes:
        gates: those that a candidate came to.
        passed: candidates that passed them all.
        reasons: most frequent first.
    """

    gates: tuple[Gate, ...]
    passed: int
    reasons: tuple[Reason, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "gates": [{"name": g.name, "reached": g.reached, "stopped": g.stopped}
                      for g in self.gates],
            "passed": self.passed,
            "reasons": [
                {"gate": r.gate, "outcome": r.outcome, "template": r.template, "count": r.count,
                 "reason": r.text} for r in self.reasons
            ],
        }  # fmt: skip


def gate_of(record: Record) -> str | None:
    """The gate that stopped a trial; None if it passed them all."""
    if record.outcome in ("timeout", "crash") and record.reason.startswith("compiling"):
        return "compiler"
    return _GATE_OF[record.outcome]


def funnel(
    trials: Iterable[Record], infeasible: Mapping[tuple[str, str], int] | None = None
) -> Funnel:
    """The gates that these trials came to.

    Args:
        trials: of one device and policy.
        infeasible: (template, broken constraint) -> points of the spaces that it rejects. Trials
            do not tell, since such points are not stored; None leaves that gate out.
    """
    stopped: Counter[str] = Counter()
    kinds: Counter[tuple[str, str, str, str]] = Counter()
    first: dict[tuple[str, str, str, str], str] = {}
    total, measured = 0, False
    for record in trials:
        total += 1
        measured = measured or record.outcome == "ok" or gate_of(record) not in (None, *_COMPILED)
        if (gate := gate_of(record)) is None:
            continue
        stopped[gate] += 1
        text = record.reason or "no reason was recorded"
        kind = (gate, record.outcome, record.config.template, _NUMBER.sub("#", text))
        kinds[kind] += 1
        first.setdefault(kind, text)
    for (template, reason), count in (infeasible or {}).items():
        kind = ("constraints", "infeasible", template, reason)
        kinds[kind] += count
        first.setdefault(kind, reason)
        stopped["constraints"] += count
        total += count
    gates = []
    for name in GATES:
        seldom = name == "constraints" or (name not in _COMPILED and not measured)
        if not total or (seldom and not stopped[name] and (name == "constraints" or not measured)):
            continue
        gates.append(Gate(name, total, stopped[name]))
        total -= stopped[name]
    reasons = tuple(
        Reason(gate, outcome, template, count, first[gate, outcome, template, pattern])
        for (gate, outcome, template, pattern), count in kinds.most_common()
    )
    return Funnel(tuple(gates), total, reasons)
