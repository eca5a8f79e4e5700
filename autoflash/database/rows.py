"""How a Record becomes a row or a line of text, and what makes either of them invalid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NoReturn

from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.problem import Problem
from autoflash.record import OUTCOMES, Record


def utc_now() -> str:
    """This moment as Record.created writes it: UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def utc(text: str) -> str:
    """The same moment in UTC and in one spelling, so that text order is time order.

    Args:
        text: ISO 8601 with an offset, with "Z" or with neither (taken for UTC); "" stays "".

    Raises:
        ValueError: it is something else.
    """
    if not text:
        return ""
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 knows no "Z"
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.astimezone(timezone.utc).isoformat(timespec="seconds")


def canonical(data: Mapping[str, Any]) -> str:
    """The one JSON text of `data`: keys sorted, no spaces, UTF-8; nan and inf become null."""
    try:
        text = json.dumps(
            _finite(data),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )
    except TypeError as error:
        raise InvalidInput(
            f"a record holds what JSON cannot ({error}): {str(data)[:300]}"
        ) from None
    # Half a surrogate pair, as in compiler output decoded with surrogateescape, is no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _finite(value: Any) -> Any:
    # JSON has no nan; a wrong result may well have an error ratio of nan, and must be stored.
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def digest(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: str | bytes) -> Record:
    """The Record of a line or of a row's `record` column.

    Raises:
        ValueError: it does not parse or cannot be meant; the message says what is wrong.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant, parse_float=_finite_float)
        if not isinstance(data, dict):
            raise ValueError(f"a JSON object is needed, not {str(data)[:40]!r}")
        record = Record.from_dict(data)
        check(record)
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


def check(record: Record) -> None:
    """Raise a ValueError if the record's fields cannot be meant."""
    if record.outcome not in OUTCOMES:
        raise ValueError(f"outcome {record.outcome!r} is none of {', '.join(OUTCOMES)}")
    for name in ("template_digest", "policy", "reason", "source_digest", "created"):
        if not isinstance(getattr(record, name), str):
            raise ValueError(f"{name}={getattr(record, name)!r} is not text")
    if not isinstance(record.device.arch, str) or not isinstance(record.device.name, str):
        raise ValueError(f"device {record.device.name!r}, arch {record.device.arch!r}: not text")
    if not isinstance(record.config.template, str):
        raise ValueError(f"template {record.config.template!r} is not text")
    if max(v for v in record.problem.to_dict().values() if isinstance(v, int)) >= 1 << 63:
        raise ValueError(f"problem {record.problem.name} has a size of 2**63 or more")
    for name in ("resources", "environment"):
        if not isinstance(getattr(record, name), Mapping):
            raise ValueError(f"{name}={getattr(record, name)!r} is not an object")
    if record.outcome in ("ok", "predicted"):
        latency = record.measurement and record.measurement.latency_us
        if record.outcome == "predicted":
            latency = record.predicted_us
        if not isinstance(latency, int | float) or not 0 < latency < math.inf:
            raise ValueError(f"outcome {record.outcome!r} with a latency of {latency!r} us")
    utc(record.created)


def stamped(record: Record) -> Record:
    """The record with a moment of creation.

    Raises:
        InvalidInput: `check` fails: whoever made the record has a bug.
    """
    try:
        check(record)
    except ValueError as error:
        raise InvalidInput(f"a record cannot be stored: {error}") from None
    return record if record.created else dataclasses.replace(record, created=utc_now())


def best_row(record: Record) -> dict[str, Any]:
    """The columns of table best, pack apart."""
    # Problem's name first: it is what the row is found by.
    return {
        "problem": record.problem.name,
        **record.problem.to_dict(),
        "device_key": record.device.key,
        "arch": record.device.arch,
        "template": record.config.template,
        "template_digest": record.template_digest,
        "config": record.config.key,
        "outcome": record.outcome,
        "policy": record.policy,
        "latency_us": record.latency_us,
        "created": utc(record.created),
        "record": canonical(record.to_dict()),
    }


def trial_row(record: Record, run: int | None) -> dict[str, Any]:
    """The columns of table trial, id apart."""
    row = best_row(record)
    return {
        **row,
        "run": run,
        "digest": digest(row["record"]),
        "source_digest": record.source_digest,
        "environment": digest(canonical(record.environment)),
    }


def device_row(device: Device) -> dict[str, Any]:
    """The columns of table device."""
    return {
        "key": device.key,
        "name": device.name,
        "arch": device.arch,
        "num_sms": device.num_sms,
        "facts": canonical(device.to_dict()),
    }


def environment_row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of table environment."""
    text = canonical(facts)
    return {"digest": digest(text), "facts": text}


def sort_key(record: Record) -> tuple[Any, ...]:
    """Order of the lines of a dump: what is alike lies together, sizes in numeric order."""
    return (*_problem_order(record.problem), record.device.key, record.policy,
            record.config.key, utc(record.created), canonical(record.to_dict()))  # fmt: skip


def _problem_order(problem: Problem) -> tuple[Any, ...]:
    return (problem.op, problem.dtype, problem.head_dim, problem.head_dim_v, problem.causal,
            problem.local, problem.softcap, problem.seqlen_q, problem.seqlen_k, problem.batch,
            problem.num_heads, problem.num_kv_heads, problem.name)  # fmt: skip
