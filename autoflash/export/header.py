"""The header that every export carries: where, with what and how its times were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import autoflash
from autoflash.export.selection import Entry, Selection
from autoflash.tuning.timing import METHODS

SCHEMA_VERSION = 1
"""Of the header and of what `entry_dict` says; a reader refuses one that it does not know."""


def header(selection: Selection) -> dict[str, Any]:
    """What all entries share; JSON-ready, and the same for the same records.

    Values that differ among records, such as the driver's version, are lists.
    """
    every = (*selection.entries, *selection.trials)
    records = [entry.record for entry in every]
    templates = {entry.template.name: entry.template for entry in every}
    policies = sorted({record.policy for record in records})
    return {
        "schema_version": SCHEMA_VERSION,
        "autoflash": autoflash.__version__,
        "created": selection.created,
        "device": selection.device.to_dict(),
        "versions": _common(record.environment for record in records),
        "policy": policies,
        "method": {policy: METHODS[policy] for policy in policies if policy in METHODS},
        "templates": {
            name: {
                "digest": template.digest,
                "summary": template.summary,
                "source": template.source,
            }
            for name, template in sorted(templates.items())
        },
    }


def entry_dict(entry: Entry) -> dict[str, Any]:
    """One winner: problem, config, digests, measured times and error; JSON-ready."""
    record = entry.record
    return {
        "problem": record.problem.to_dict(),
        "name": record.problem.name,
        "template": record.config.template,
        "config": dict(record.config),
        "won": entry.won,
        "outcome": record.outcome,
        "source_digest": entry.source.digest,
        "latency_us": _short(record.latency_us),
        "p20_us": _short(record.measurement.p20_us if record.measurement else None),
        "p80_us": _short(record.measurement.p80_us if record.measurement else None),
        "default_us": _short(record.default_us),
        "torch_us": _short(record.torch_us),
        "torch_provider": record.torch_provider,
        "error_ratio": _short(record.error_ratio),
        "resources": dict(record.resources),
        "created": record.created,
    }


def comment(selection: Selection, prefix: str) -> str:
    """The header as comment lines, for formats that are read as source."""
    known = header(selection)
    versions = ", ".join(
        f"{name} {' or '.join(value) if isinstance(value, list) else value}"
        for name, value in known["versions"].items()
    )
    device = selection.device
    size = f"{device.num_sms} cores"
    if device.is_cuda:
        size = f"{device.num_sms} SMs, {device.smem_bytes_per_block} bytes of shared memory a block"
    lines = [
        f"Made by autoflash {known['autoflash']} from records of {known['created']}.",
        f"Device: {device.name} ({device.arch}, {size}).",
        f"Versions: {versions}.",
        f"Times: microseconds, policy {', '.join(known['policy'])}.",
        *(f"Policy {policy}: {method}." for policy, method in known["method"].items()),
        *(
            f"Template {name}, digest {facts['digest']}: {facts['source']}."
            for name, facts in known["templates"].items()
        ),
    ]
    return "".join(f"{prefix} {line}\n" for line in lines)


def evidence(entry: Entry) -> str:
    """What speaks for a config, in a line of a comment."""
    facts = entry_dict(entry)
    kind = "winner" if entry.won else "fastest trial of these templates"
    kind = "predicted" if facts["outcome"] == "predicted" else kind
    beside = f", the default {facts['default_us']} us" if facts["default_us"] else ""
    kernel = f"{entry.template.name}, source {entry.source.digest[:16]}"
    return f"{kind}, {facts['latency_us']} us{beside}; {kernel}"


def _short(value: float | None) -> float | None:
    """Five digits: times repeat to three at best, and longer ones only make diffs."""
    return None if value is None else float(f"{value:.5g}")


def _common(environments: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    seen: dict[str, set[str]] = {}
    for environment in environments:
        for name, value in environment.items():
            seen.setdefault(name, set()).add(str(value))
    return {
        name: next(iter(values)) if len(values) == 1 else sorted(values)
        for name, values in sorted(seen.items())
    }
