"""The reviewed records are such that a call can be served by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoflash.codegen.catalog import installed
from autoflash.codegen.defaults import defaults
from autoflash.dispatch_table import STRATEGIES, DispatchTable
from autoflash.record import Record
from autoflash.settings import Settings

PACKS = sorted(Settings.from_environment({}).tuning_db_dir.glob("*.jsonl"))


def test_there_are_reviewed_records() -> None:
    assert PACKS


def lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What each line of a pack says, and where it stands."""
    texts = path.read_text(encoding="utf-8").splitlines()
    return [(f"{path.name}:{n}", json.loads(text)) for n, text in enumerate(texts, 1)]


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_every_record_is_measured_current_and_feasible(path: Path) -> None:
    for where, line in lines(path):
        if "table" in line:
            continue
        record = Record.from_dict(line)
        template = installed().get(record.config.template)
        assert record.is_measured, where
        assert record.device.slug == path.stem, where
        assert record.template_digest == template.digest, f"{where}: tune again"
        assert template.refusal(record.problem, record.device) is None, where
        assert template.broken(record.config, record.problem, record.device) is None, where
        assert record.default_us, where
        # PyTorch has no attention of 8 bits to compare with.
        assert record.torch_us or record.problem.op == "fwd_fp8", where
        assert record.environment.get("torch"), where


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_every_table_is_current_keeps_its_promise_and_loses_to_nothing(path: Path) -> None:
    templates = installed().templates
    for where, line in lines(path):
        if "table" not in line:
            continue
        table = DispatchTable.from_dict(line["table"])
        assert table.device.slug == path.stem, where
        for name in table.digests:
            assert table.is_current(name, templates[name].digest), f"{where}: generalise again"
        for probe in table.probes:
            first = defaults(templates.values(), probe.problem, table.device)[0]
            assert table.configs[probe.default] == first, f"{where}: {probe.problem.name}"
        held = {name: table.regret(name, held_out=True) for name in STRATEGIES}
        assert held["table"].mean <= 0.02, where
        assert held["table"].worst <= 0.06, where
        assert held["table"].worst <= held["nearest"].worst, where
        assert held["table"].worst <= held["default"].worst, where
