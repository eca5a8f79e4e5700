"""What do tests of exports start from? Records of installed templates, and selections of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.findings import TIMED, trial

from autoflash import export
from autoflash.codegen.catalog import installed
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS, Device
from autoflash.dispatch_table import DispatchTable
from autoflash.export import Entry, Selection
from autoflash.problem import Problem
from autoflash.record import Record

H200 = Path(__file__).parents[2] / "tuning_db" / "nvidia-h200.jsonl"
"""The reviewed records of one device."""
GPU = KNOWN_GPUS["sm90"]


def tried(
    template: str,
    problem: str = "b1s1024h8d64c-bfloat16",
    us: float | None = 100.0,
    outcome: str = "ok",
    device: Device = GPU,
    tunables: dict[str, Any] | None = None,
    **more: Any,
) -> Record:
    """A trial of an installed template: its default, but for `tunables`."""
    found, asked = installed().get(template), Problem.parse(problem)
    values = {**found.default_config(asked, device), **(tunables or {})}
    fields = {"template_digest": found.digest, "policy": TIMED, **more}
    return trial(asked, us, outcome, device, template=template, tunables=values, **fields)


def won(template: str, problem: str, device: Device, **more: Any) -> Record:
    """A winner: such a trial beside its rivals; its config is one that may be compiled."""
    rivals = {"default_us": 110.0, "torch_us": 200.0, "torch_provider": "sdpa"}
    record = tried(template, problem, device=device, **{**rivals, **more})
    broken = installed().get(template).broken(record.config, record.problem, device)
    assert broken is None, broken
    return record


def database(
    *trials: Record, winners: tuple[Record, ...] = (), pack: Path | None = None
) -> Database:
    """A database in memory that holds these, and what the pack has."""
    found = Database.open("sqlite://")
    for record in trials:
        found.add(record)
    for record in winners:
        assert found.set_best(record)
    if pack is not None:
        found.load(pack)
    return found


def selection(target: str, *trials: Record, **more: Any) -> Selection:
    """What `autoflash export TARGET` would export from such a database."""
    wanted = export.target(target)
    with database(*trials, **more) as db:
        return export.select(
            db, installed(), templates=wanted.templates, stand_ins=wanted.stand_ins,
            trials=wanted.trials,
        )  # fmt: skip


def selected(records: Iterable[Record], **others: Any) -> Selection:
    """Those records as a selection, past all that `export` would leave out."""
    entries = sorted(
        (Entry(each, installed().get(each.config.template)) for each in records),
        key=lambda entry: entry.problem.name,
    )
    return Selection(device=entries[0].record.device, entries=tuple(entries), **others)


def reviewed(*names: str) -> Selection:
    """The reviewed winners of the H200, or those of some problems."""
    lines = map(json.loads, H200.read_text(encoding="utf-8").splitlines())
    records = [Record.from_dict(line) for line in lines if "problem" in line]
    return selected(each for each in records if not names or each.problem.name in names)


def reviewed_tables() -> tuple[DispatchTable, ...]:
    """The reviewed dispatch tables of the H200."""
    lines = map(json.loads, H200.read_text(encoding="utf-8").splitlines())
    return tuple(DispatchTable.from_dict(line["table"]) for line in lines if "table" in line)


def written(folder: Path, target: str, chosen: Selection, **options: Any) -> Path:
    """The folder, with the export in it."""
    files = export.target(target).files(chosen, export.Options(**options))
    export.write(folder, target, chosen, files)
    return folder
