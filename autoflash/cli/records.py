"""What is known, as `show` and `why` print it: best records, trials, an explanation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoflash.cli import regret
from autoflash.cli.output import kernel, ratio, say, table, tflops, us, versus_torch, write_json
from autoflash.cli.results import installed_digests
from autoflash.record import Record

if TYPE_CHECKING:
    from autoflash.runtime.explain import Explanation

_MOST = 5
"""Rejected records listed by `why`."""


def shown(records: Sequence[Record], every: bool, as_json: bool) -> None:
    """The records of `show`, best ones or every trial."""
    digests = installed_digests()
    if as_json:
        write_json([record_dict(record, digests) for record in records])
    elif not records:
        say("no records; `autoflash tune` makes some, `autoflash db load` brings some")
    elif every:
        _trials(records)
    else:
        _bests(records, digests)


def _bests(records: Iterable[Record], digests: Mapping[str, str]) -> None:
    rows = []
    for record in records:
        current = digests.get(record.config.template) == record.template_digest
        rows.append(
            (
                record.problem.name,
                record.device.slug,
                record.config.template,
                us(record.latency_us),
                tflops(record),
                ratio(record.default_us, record.latency_us),
                versus_torch(record),
                ("measured" if record.is_measured else "predicted") + ("" if current else ", old"),
                record.created[:10],
                str(record.config),
            )
        )
    columns = ("shape", "device", "winner", ">us", ">tflops", ">vs default", ">vs PyTorch",
               "kind", "date", "config")  # fmt: skip
    table("Best records", columns, rows)
    if any("old" in row[7] for row in rows):
        say("old: the template has changed since, so the record is not served; tune again.")


def _trials(records: Iterable[Record]) -> None:
    rows = [
        (
            record.problem.name,
            record.device.slug,
            record.config.template,
            record.outcome,
            us(record.latency_us),
            str(record.config),
            record.reason,
        )
        for record in records
    ]
    columns = ("shape", "device", "template", "outcome", ">us", "config", "reason")
    table("Trials", columns, rows)


def explained(explanation: Explanation) -> None:
    """The answer of `why`."""
    config, record = explanation.config, explanation.record
    say(f"{explanation.problem.name} on {explanation.device.name} ({explanation.device.arch})")
    say(f"  served by: {kernel(config)}")
    say(f"  rule:      {explanation.rule}: {explanation.reason}")
    if record:
        kind = "measured" if record.is_measured else "predicted"
        versus = [
            f"{ratio(record.default_us, record.latency_us)} the default" * bool(record.default_us),
            f"{versus_torch(record)} (PyTorch)" * bool(record.torch_us),
        ]
        about = [f"{us(record.latency_us)} us", kind, record.created[:10], *filter(None, versus)]
        say(f"  record:    {record.problem.name}: {', '.join(filter(None, about))}")
    if explanation.table:
        say(f"  table:     {regret.summary(explanation.table)}")
    for rule, choice, reason in explanation.next:
        say(f"  else:      {rule}: {choice.template} ({choice}): {reason}")
    for name, reason in explanation.refused.items():
        say(f"  not:       {name}, which needs: {reason}")
    for rejected, reason in explanation.rejected[:_MOST]:
        say(f"  not:       {rejected.problem.name} on {rejected.device.name}: {reason}")
    if (more := len(explanation.rejected) - _MOST) > 0:
        say(f"  not:       {more} more records (--json has them)")
    if explanation.nearest:
        rows = [
            (
                near.record.problem.name,
                "-" if near.distance == float("inf") else f"{near.distance:.2f}",
                ", ".join(f"{k} {a} / {b}" for k, (a, b) in near.differences.items()),
                near.unusable or "",
            )
            for near in explanation.nearest
        ]
        columns = ("shape", ">distance", "differs in (asked / recorded)", "why it cannot stand in")
        table("Nearest other records", columns, rows)
    else:
        say("  no other record of this arch; `autoflash tune` makes some")


def record_dict(record: Record, digests: Mapping[str, str]) -> dict[str, Any]:
    """A record for JSON, with what follows from its fields beside it."""
    latency_us = record.latency_us
    return {
        "name": record.problem.name,
        "device": record.device.slug,
        "latency_us": latency_us,
        "tflops": record.problem.tflops(latency_us) if latency_us else None,
        "current": digests.get(record.config.template) == record.template_digest,
        "record": record.to_dict(),
    }
