"""Replies: can what a worker answered be believed?

A candidate runs inside the worker and may have written over its memory, so that even an answer that
arrives whole may be nonsense. What is wrong in form or in size never reaches a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autoflash.build.kernel import Resources
from autoflash.record import OUTCOMES, Measurement

RAISED = ("CacheError", "ToolchainMissing")
"""Errors that are no candidate's fault: a worker names them instead of an outcome."""


def fault(request: Mapping[str, Any], reply: Mapping[str, Any]) -> str | None:
    """What makes an answer unusable, or None.

    Args:
        request: what was asked.
        reply: what came back.
    """
    outcome = reply.get("outcome")
    if not isinstance(outcome, str) or outcome not in OUTCOMES:
        return f"the worker answered with the outcome {str(outcome)[:40]!r}"
    if reply.get("raise") not in (None, *RAISED):
        return f"the worker named the error {str(reply['raise'])[:40]!r}"
    if not isinstance(reply.get("reason", ""), str):
        return "the worker gave a reason that is no text"
    if "raise" in reply:
        return None
    try:
        _check(str(request.get("kind")), outcome, request, reply)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        return f"the worker's answer cannot be meant: {said}"
    return None


def _check(kind: str, outcome: str, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
    if kind == "hello" and outcome == "ok":
        _object(reply["environment"], "environment")
    elif kind == "compile" and outcome == "ok":
        Resources(**reply["resources"])
    elif kind == "evaluate":
        if outcome in ("ok", "slow") or reply.get("measurement") is not None:
            _measurement(reply["measurement"])
        ratio = reply.get("error_ratio")
        if ratio is not None and not (_number(ratio) and ratio >= 0):
            raise ValueError(f"an error ratio of {ratio}")
    elif kind == "survey":
        for median, *_ in (
            *reply.get("rungs", ()),
            *([reply["do_bench"]] if "do_bench" in reply else []),
        ):
            _time(median)
    elif kind == "finals" and outcome == "ok":
        _finals(request, reply)
    elif kind == "finals" and "wrong" in reply:
        wrong = _object(reply["wrong"], "wrong")
        if not wrong.keys() <= request["sources"].keys():
            raise ValueError(f"unasked sources {sorted(wrong)} are wrong")


def _finals(request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
    names = {*request["sources"], *([] if reply["provider"] is None else [reply["provider"]])}
    for part in ("measurements", "rounds"):
        if set(_object(reply[part], part)) != names:
            raise ValueError(f"{part} of {sorted(reply[part])}, asked were {sorted(names)}")
    for name in names:
        _measurement(reply["measurements"][name])
        medians = reply["rounds"][name]
        if len(medians) != request["rounds"]:
            raise ValueError(f"{len(medians)} rounds of {request['rounds']}")
        for median in medians:
            _time(median)


def _measurement(data: Mapping[str, Any]) -> None:
    found = Measurement.from_dict(_object(data, "measurement"))
    for time_us in (found.latency_us, found.p20_us, found.p80_us):
        _time(time_us)
    if not found.p20_us <= found.latency_us <= found.p80_us:
        raise ValueError(f"a median of {found.latency_us} us outside of its percentiles")
    if not isinstance(found.count, int) or found.count < 1:
        raise ValueError(f"a time of {found.count} calls")


def _time(value: Any) -> None:
    if not (_number(value) and value > 0):
        raise ValueError(f"a time of {value} us")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}, not an object")
    return value
