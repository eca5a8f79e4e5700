"""The reviewed records are such that a call can be served by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoflash.codegen.catalog import installed
from autoflash.record import Record
from autoflash.settings import Settings

PACKS = sorted(Settings.from_environment({}).tuning_db_dir.glob("*.jsonl"))


def test_there_are_reviewed_records() -> None:
    assert PACKS


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_every_record_is_measured_current_and_feasible(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = Record.from_dict(json.loads(line))
        where = f"{path.name}:{number}"
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
