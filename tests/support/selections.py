"""What do tests of exports export? Selections of made-up winners, and of the reviewed records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from autoflash.codegen.catalog import installed
from autoflash.config import Config, Value
from autoflash.device import Device
from autoflash.export import Entry, Selection
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.settings import Settings


def record(
    template: str,
    problem: str,
    device: Device,
    changes: Mapping[str, Value] | None = None,
    **fields: Any,
) -> Record:
    """A measured winner: the default of a template with some changes, 100 us."""
    found, asked = installed().get(template), Problem.parse(problem)
    config = Config.of(template, {**found.default_config(asked, device), **(changes or {})})
    assert found.broken(config, asked, device) is None, found.broken(config, asked, device)
    values: dict[str, Any] = {
        "problem": asked,
        "config": config,
        "template_digest": found.digest,
        "device": device,
        "outcome": "ok",
        "policy": "test",
        "measurement": Measurement(latency_us=100.0, p20_us=99.0, p80_us=101.0, count=9),
        "default_us": 110.0,
        "torch_us": 200.0,
        "torch_provider": "sdpa",
        "environment": {"torch": "2.13.0", "triton": "3.6.0"},
        "created": "2026-11-21T00:00:00Z",
    }
    return Record(**{**values, **fields})


def selection(records: Iterable[Record], **others: Any) -> Selection:
    """Those records as a selection, whatever their templates."""
    entries = sorted(
        (Entry(each, installed().get(each.config.template)) for each in records),
        key=lambda entry: entry.problem.name,
    )
    return Selection(device=entries[0].record.device, entries=tuple(entries), **others)


def reviewed(device: str, *names: str) -> Selection:
    """The reviewed winners of a device, or those of some problems."""
    path = Settings.from_environment({}).tuning_db_dir / f"{device}.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    records = [Record.from_dict(line) for line in lines if "problem" in line]
    return selection([each for each in records if not names or each.problem.name in names])
