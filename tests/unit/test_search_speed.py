"""The report on how soon the search finds what a sweep finds, from recorded tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TABLE = "b4s4096h16-16d128f-bfloat16.jsonl"


@pytest.fixture
def search_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("search_speed")


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["search_speed", *map(str, words)])
    return int(module.main())


def test_the_report_compares_with_both_sweeps(
    search_speed: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra `bench`) is not installed")
    out = tmp_path / "speed.json"
    table = ROOT / "tests" / "replay" / TABLE
    assert run(search_speed, monkeypatch, table, "--seeds", 2, "--out", out) == 0
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert row["problem"] == "b4s4096h16/16d128f-bfloat16"
    assert row["serial_sweep_s"] > row["sweep_s"] > 0
    for name in ("default", "tpe"):
        found = row["searches"][name]
        assert len(found["seconds"]) == 2
        worst = max(found["seconds"])
        assert found["share"]["worst"] == pytest.approx(worst / row["sweep_s"])
        assert found["share_of_serial"]["worst"] == pytest.approx(worst / row["serial_sweep_s"])
        assert report["overall"][name]["share"] == found["share"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    said = capsys.readouterr().out
    worst = row["searches"]["default"]["share_of_serial"]["worst"]
    assert f", {100 * worst:.1f} % |" in said
    assert "| b4s4096h16/16d128f-bfloat16 | 74 |" in said


def test_mistakes_end_in_a_line(
    search_speed: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "speed.json"
    assert run(search_speed, monkeypatch, tmp_path / "none.jsonl", "--out", out) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    table = ROOT / "tests" / "replay" / TABLE
    words = (table, "--seeds", 1, "--real", "b1s64h2d32c", "--out", out)
    assert run(search_speed, monkeypatch, *words) == 2
    assert "there is no table of b1s64h2/2d32c-bfloat16" in capsys.readouterr().err
    assert not out.exists()
