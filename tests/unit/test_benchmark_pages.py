"""Reports as pages show them, and that the committed pages are up to date."""

from __future__ import annotations

import builtins
import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autoflash import device as devices
from autoflash import settings
from autoflash.benchmark.report import Report, Row
from autoflash.benchmark.standing import best_ratios, ratios, rivals, standing
from autoflash.device import KNOWN_GPUS
from autoflash.errors import InvalidInput, ToolchainMissing, UnknownName

SCRIPTS = settings.PACKAGE_DIR.parent / "benchmarks"
ONE, TWO = "b1s1024h8/8d64c-bfloat16", "b1s1024h8/8d64f-bfloat16"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("chart", "markdown", "readme", "tunables"):
        sys.modules.pop(name, None)


def script(name: str) -> ModuleType:
    return __import__(name)


def row(problem: str, provider: str, latency_us: float | None, **more: Any) -> Row:
    rate = 4.0e4 / latency_us if latency_us else None
    outcome = "ok" if latency_us else "unavailable"
    return Row(
        problem=problem, provider=provider, outcome=outcome, latency_us=latency_us, tflops=rate,
        p20_us=latency_us and latency_us * 0.99, p80_us=latency_us and latency_us * 1.02, **more,
    )  # fmt: skip


def report(*, budget_ms: float = 70.0, **changes: Any) -> Report:
    rows = (
        row(ONE, "autoflash", 100.0, rule="bucket", template="cuda/fwd_sm90", clock_mhz=1800,
            power_w=650.0),
        row(ONE, "cudnn", 90.0, speedup=0.91, speedup_low=0.9, speedup_high=0.93),
        row(ONE, "fa4", 200.0, speedup=2.0, speedup_low=1.9, speedup_high=2.1),
        row(ONE, "sdpa", 50.0, speedup=0.5),
        row(ONE, "flex", None, reason="it broke"),
        row(TWO, "autoflash", 100.0, rule="exact", template="triton/fwd", clock_mhz=1700),
        row(TWO, "cudnn", 400.0, speedup=4.0), row(TWO, "fa4", 120.0),
        row(TWO, "sdpa", 400.0, speedup=4.0), row(TWO, "flex", None, reason="it broke"),
    )  # fmt: skip
    made = Report(
        KNOWN_GPUS["sm90"], "some-policy", "2026-11-21T00:00:00Z",
        {"torch": "2.11.0", "cudnn": 91900, "python": "3.12"},
        {"rounds": 7, "budget_ms": budget_ms, "seed": 0}, rows,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "fwd.json"
    path.write_text(report().to_json(), encoding="utf-8")
    return path


# Reports and standings ---------------------------------------------------------------------------


def test_a_report_reads_back(saved: Path) -> None:
    assert Report.load(saved) == report()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "JSONDecodeError"), ("{}", "KeyError"), ("[]", "TypeError"),
     ('{"schema_version": 9}', "schema_version is 9")],
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=said):
        Report.load(path)
    with pytest.raises(InvalidInput, match="FileNotFoundError"):
        Report.load(tmp_path / "none.json")


def test_standings_are_paired_ratios_against_each_peer_and_the_best() -> None:
    some = report()
    assert rivals(some) == ["cudnn", "fa4"]  # sdpa repeats another, flex did not run
    assert [one.ratio for one in ratios(some, "cudnn")] == [0.91, 4.0]
    assert [one.ratio for one in ratios(some, "fa4")] == [2.0, 1.2]  # no pairs: of the medians
    assert ratios(some, "flex") == []
    best = best_ratios(some, rivals(some))
    assert {name: (one.peer, one.ratio) for name, one in best.items()} == {
        ONE: ("cudnn", 0.91), TWO: ("fa4", 1.2),
    }  # fmt: skip
    found = standing(list(best.values()))
    assert (found.count, found.worst) == (2, best[ONE])
    assert found.mean == pytest.approx(math.sqrt(0.91 * 1.2))
    on_cpu = dataclasses.replace(some, device=devices.for_arch("cpu"))
    assert rivals(on_cpu) == ["cudnn", "fa4", "sdpa"]


# Markdown ----------------------------------------------------------------------------------------


def test_the_table_has_intervals_rules_and_clocks() -> None:
    lines = script("markdown").table(report()).splitlines()
    assert lines == [
        "| problem | autoflash | cudnn | fa4 | over the best peer | kernel | rule | clock |",
        "|---|---:|---:|---:|---:|---|---|---:|",
        f"| {ONE} | 400 | 444 | 200 | 0.91x cudnn [0.90, 0.93] | `cuda/fwd_sm90` | bucket"
        " | 1800 MHz |",
        f"| {TWO} | 400 | 100 | 333 | 1.20x fa4 | `triton/fwd` | exact | 1700 MHz |",
    ]


def test_power_is_shown_only_where_turns_were_long_enough_for_it() -> None:
    markdown = script("markdown")
    assert "650 W" not in markdown.table(report(budget_ms=70.0))
    long = report(budget_ms=1400.0)
    assert "| 1800 MHz, 650 W |" in markdown.table(long)
    assert "Clock, power: medians while autoflash had its turns." in markdown.conditions(long)


def test_standings_and_conditions_say_how_and_when() -> None:
    markdown = script("markdown")
    assert markdown.standings(report()).splitlines()[2:] == [
        f"| the best peer of each row | 2 | 1.04x | 0.91x cudnn [0.90, 0.93] | {ONE} |",
        f"| cudnn | 2 | 1.91x | 0.91x [0.90, 0.93] | {ONE} |",
        f"| fa4 | 2 | 1.55x | 1.20x | {TWO} |",
    ]
    said = markdown.conditions(report())
    assert "--problems FILE --rounds 7 --budget-ms 70 --providers autoflash,cudnn,fa4," in said
    assert report().device.name in said
    assert "2026-11-21, torch 2.11.0, cudnn 91900." in said
    alone = report(rows=tuple(r for r in report().rows if r.provider == "autoflash"))
    assert markdown.standings(alone) == ""
    assert "over the best peer" not in markdown.whole(alone)


def test_a_command_names_the_grid_that_was_measured() -> None:
    found = Report.load(SCRIPTS / "nvidia-h200" / "fwd-fp8.json")
    assert script("markdown").command(found) == (
        "autoflash bench --grid fwd-fp8 --rounds 7 --budget-ms 70 --providers autoflash"
    )


@pytest.mark.parametrize(("arguments", "code"), [(["fwd.json", "--rows"], 0), (["none.json"], 2)])
def test_the_script_prints_rows_or_an_error(saved: Path, arguments: list[str], code: int) -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / "markdown.py"), *arguments], cwd=saved.parent, text=True,
        capture_output=True, check=False, env={"PYTHONPATH": str(SCRIPTS.parent)},
    )  # fmt: skip
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr
    if code == 0:
        assert f"| {ONE} | cudnn | 90.0 | 89.1 to 91.8 | 444 |" in ran.stdout
        assert "unavailable: it broke" in ran.stdout
    else:
        assert "none.json is not a report" in ran.stderr


# Charts ------------------------------------------------------------------------------------------


def test_a_chart_knows_what_it_was_drawn_from(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra `bench`) is not installed")
    chart, out = script("chart"), tmp_path / "fwd.png"
    chart.draw(saved, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert chart.drawn_from(out) == chart.source_of(saved)
    saved.write_text(report(budget_ms=80.0).to_json(), encoding="utf-8")
    assert chart.drawn_from(out) != chart.source_of(saved)
    assert chart.drawn_from(saved) is None
    assert chart.drawn_from(tmp_path / "none.png") is None


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*/fwd*.json")), ids=lambda path: path.stem)
def test_every_report_can_be_drawn(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra `bench`) is not installed")
    chart = script("chart")
    chart.draw(path, tmp_path / "out.png")
    assert chart.drawn_from(tmp_path / "out.png") == chart.source_of(path)


def test_without_matplotlib_a_chart_says_what_to_install(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **options: Any) -> ModuleType:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    chart = script("chart")
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ToolchainMissing, match=r"pip install '\.\[bench\]'"):
        chart.draw(saved, tmp_path / "out.png")


def test_labels_tell_problems_of_a_panel_apart() -> None:
    from autoflash.problem import Problem

    label = script("chart")._label
    alike = [Problem.parse(f"b1s{n}h16d128c") for n in (1024, 1536)]
    assert [label(one, alike) for one in alike] == ["1k", "1536"]
    mixed = [Problem.parse("b1s4096h32/8d128cw1023cap50"), *alike]
    assert label(mixed[0], mixed).splitlines() == ["4k", "32/8", "w1023", "softcap"]
    assert label(alike[0], mixed) == "1k\n16/16"
    short = Problem.parse("b1s16x131072h8/1d128c")
    assert label(short, [short]) == "16x131072"


# Tunables ----------------------------------------------------------------------------------------

TRIALS = f"""problem,template,outcome,latency_us,overlap,num_stages
{ONE},cuda/a,ok,100,True,2
{ONE},cuda/a,slow,150,True,3
{ONE},cuda/a,ok,120,False,2
{ONE},cuda/a,wrong_result,1,False,2
{TWO},cuda/a,ok,90,True,2
{TWO},cuda/b,ok,1,True,
"""


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    path = tmp_path / "trials.csv"
    path.write_text(TRIALS)
    return path


def test_a_tunable_is_judged_by_the_best_with_and_without(trials: Path) -> None:
    tunables = script("tunables")
    found = tunables.read(trials, "cuda/a")
    assert len(found) == 4  # what is wrong has no time
    assert tunables.bought(found, "overlap") == {
        "True": {(64, "causal"): pytest.approx(1.2)},
        "False": {(64, "causal"): pytest.approx(1 / 1.2)},
    }
    assert tunables.tables(found).split("\n\n") == [
        "| overlap | 64 causal |\n|---|---:|\n| False | 0.83 |\n| True | 1.20 |",
        "| num_stages | 64 causal |\n|---|---:|\n| 2 | 1.50 |\n| 3 | 0.67 |",
    ]
    assert tunables.tables(tunables.read(trials, "cuda/b")) == ""


def test_templates_are_compared_by_their_best(trials: Path) -> None:
    tunables = script("tunables")
    assert tunables.tables(tunables.read(trials, tunables.ANY)) == (
        "| template | 64 full |\n|---|---:|\n| cuda/a | 0.01 |\n| cuda/b | 90.00 |"
    )


def test_trials_that_cannot_be_read_are_refused(trials: Path, tmp_path: Path) -> None:
    tunables = script("tunables")
    with pytest.raises(InvalidInput, match="name one of them"):
        tunables.read(trials)
    with pytest.raises(UnknownName, match="cuda/c"):
        tunables.read(trials, "cuda/c")
    with pytest.raises(InvalidInput, match="not a table of trials"):
        tunables.read(tmp_path / "none.csv")
    trials.write_text("problem,outcome\nx,ok\n")
    with pytest.raises(InvalidInput, match="not a table of trials"):
        tunables.read(trials)


# The pages themselves ----------------------------------------------------------------------------


def test_pages_and_charts_show_what_the_reports_say() -> None:
    stale = [str(path.relative_to(SCRIPTS.parent)) for path in script("readme").outdated()]
    assert not stale, "run `python benchmarks/readme.py` (needs the extra `bench`)"


def test_a_page_is_rewritten_between_its_comments(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = script("readme")
    page = tmp_path / "page.md"
    text = (
        "before\n\n<!-- standings: fwd.json -->\nold\n<!-- end -->\n\nbetween\n\n"
        "<!-- chart: fwd.json -->\n<!-- end -->\nafter\n"
    )
    page.write_text(text)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", (page,))
    assert readme.outdated() == [page, tmp_path / "fwd.png"]
    new = readme.rewritten(page)
    assert "old" not in new
    assert new.startswith("before\n\n<!-- standings: fwd.json -->\n\n| autoflash over |")
    assert "\n\n<!-- end -->\n\nbetween\n" in new
    assert new.endswith("2026-11-21](fwd.png)\n\n<!-- end -->\nafter\n")
    page.write_text(new)
    assert readme.rewritten(page) == new
    assert readme.outdated() == [tmp_path / "fwd.png"]


@pytest.mark.parametrize(
    ("text", "error"),
    [("<!-- picture: fwd.json -->\n<!-- end -->\n", UnknownName),
     ("<!-- report: none.json -->\n<!-- end -->\n", InvalidInput),
     ("<!-- report fwd.json -->\n<!-- end -->\n", InvalidInput)],
)  # fmt: skip
def test_a_page_that_asks_for_nothing_known_is_refused(
    saved: Path, text: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, page = script("readme"), saved.with_name("page.md")
    monkeypatch.setattr(readme, "ROOT", saved.parent)
    page.write_text(text)
    with pytest.raises(error):
        readme.rewritten(page)
