"""`autoflash generalise`, `show --regret` and `why`, as far as they speak of dispatch tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.dispatch_tables import probe, table
from support.findings import trial

from autoflash import settings
from autoflash.cli import main, regret
from autoflash.codegen import catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import for_arch
from autoflash.dispatch_table import TURNS, DispatchTable, Family, Leaf
from autoflash.problem import Problem
from autoflash.tuning import generalise as generalising
from autoflash.tuning.generalise import Generalised

PROBLEM = Problem.parse("b1s4h8d64c-float32")


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    place = f"sqlite:///{tmp_path}/tuning.db"
    monkeypatch.setenv("AUTOFLASH_DATABASE", place)
    settings.get.cache_clear()
    yield place
    settings.get.cache_clear()


def made_here() -> DispatchTable:
    """A table of the CPU's kernel, whose only leaf is its default with another block_n."""
    cpu = for_arch("cpu")
    template = catalog.installed().get("cpp/fwd")
    default = template.default_config(PROBLEM, cpu)
    other = next(
        config
        for config in template.space(PROBLEM, cpu).configs
        if config != default and config["threads"] == default["threads"]
    )
    shapes = ("b1s512h8d64c", "b1s1024h8d64c", "b1s2048h8d64c")
    times = ((100.0, 90.0), (400.0, 390.0), (1600.0, 1500.0))
    return table(
        {"cpp/fwd": template.digest},
        device=cpu,
        family=Family.of(PROBLEM),
        configs=(default, other),
        leaves=(Leaf(where=(), config=1, probes=2, mean=0.0, worst=0.0),),
        probes=tuple(
            probe(f"{name}-float32", *pair, held_out=name == shapes[1])
            for name, pair in zip(shapes, times, strict=True)
        ),
        tuned=((Problem.parse("b1s512h8d64c-float32"), 0),),
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_show_regret_prints_leaves_and_what_they_are_worth(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Database.open(url) as database:
        database.set_table(made_here())
    code, out, _ = run(capsys, "show", "--regret")
    assert code == 0
    assert "fwd-d64c-float32 on" in out
    assert "every shape  cpp/fwd" in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows["the table"].split()[2:4] == ["0.0%", "0.0%"]
    assert rows["the nearest winner"].split()[3:5] == ["2.6%", "2.6%"]
    assert rows["the template's default"].split()[3:5] == ["2.6%", "2.6%"]
    assert "1 shapes held out, 2 to choose by" in out
    assert "goal: 2% mean, 6% worst over those held out: met" in out


def test_show_regret_as_json_has_the_evidence(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Database.open(url) as database:
        database.set_table(made_here())
    _, out, _ = run(capsys, "show", "--regret", "--json", "--head-dim", "64")
    (told,) = json.loads(out)
    assert told["regret"]["held_out"]["default"]["worst"] == pytest.approx(10 / 390)
    assert told["regret"]["held_out"]["table"]["where"] == "b1s1024h8/8d64c-float32"
    assert told["goal"] == {"mean": 0.02, "worst": 0.06, "met": True}
    assert told["current"] == {"cpp/fwd": True}
    assert DispatchTable.from_dict(told["table"]) == made_here()
    for other in (["--head-dim", "128"], ["--shape", "b1s7h8d64f-float32"], ["--arch", "sm90"]):
        assert json.loads(run(capsys, "show", "--regret", "--json", *other)[1]) == []
    named = run(capsys, "show", "--regret", "--json", "--shape", "b9s7h2d64c-float32")[1]
    assert len(json.loads(named)) == 1
    assert "autoflash generalise" in run(capsys, "show", "--regret", "--head-dim", "8")[1]


def test_why_says_which_leaf_serves(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Database.open(url) as database:
        database.set_table(made_here())
    _, out, _ = run(capsys, "why", "b1s700h8d64c-float32", "--arch", "cpu")
    assert "rule:      table: dispatch table fwd-d64c-float32: every shape; 2 shapes" in out
    assert "table:     fwd-d64c-float32, 2026-11-21, 1 leaves; regret on 1 shapes held out" in out
    _, out, _ = run(capsys, "why", "b1s700h8d64c-float32", "--arch", "cpu", "--json")
    (told,) = json.loads(out)
    assert (told["rule"], told["table"]) == ("table", made_here().to_dict())


def test_an_old_leaf_is_marked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    former = {**made_here().to_dict(), "digests": {"cpp/fwd": "former"}}
    with Database.open(url) as database:
        database.set_table(DispatchTable.from_dict(former))
    out = run(capsys, "show", "--regret")[1]
    assert "cpp/fwd, old" in out
    assert "generalise again" in out


def result(status: str, made: DispatchTable | None = None) -> Generalised:
    return Generalised(
        family=Family.of(PROBLEM), status=status, table=made, measured=3, wanted=30, reason="why"
    )


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["improved"], 0),
        (["improved", "unimproved"], 0),
        (["unimproved"], 3),
        (["improved", "partial"], 4),
        (["improved", "invalid"], 4),
        (["invalid"], 5),
    ],
)
def test_exit_codes(statuses: list[str], code: int) -> None:
    assert regret.exit_code([result(status) for status in statuses]) == code


def test_generalise_passes_its_options_on(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def pretend(winners: Any, device: Any, **options: Any) -> list[Generalised]:
        asked.update(options, winners=winners)
        return [result("partial", made_here())]

    monkeypatch.setattr(generalising, "generalise", pretend)
    code, out, err = run(
        capsys, "generalise", "--head-dim", "64", "--probes", "7", "--seconds", "9",
        "--templates", "cpp/*", "--effort", "normal", "--seed", "3",
    )  # fmt: skip
    assert code == 4
    names = ("count", "max_seconds", "templates", "effort", "seed", "winners")
    assert [asked[name] for name in names] == [7, 9.0, ["cpp/fwd"], "normal", 3, []]
    assert "every shape  cpp/fwd" in out
    assert "partial: 3 of 30 shapes measured; why" in err
    _, out, _ = run(capsys, "generalise", "--json")
    (told,) = json.loads(out)
    assert (told["status"], told["measured"], told["wanted"]) == ("partial", 3, 30)
    assert Config.from_dict(told["table"]["table"]["configs"][0]).template == "cpp/fwd"


def test_nothing_to_generalise_says_what_to_do(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "generalise")
    assert code == 2
    assert "`autoflash tune` makes some" in err


def test_tables_are_chosen_as_problems_are(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = Family.of(Problem.parse("b1s9h8d128c-bfloat16"))
    with Database.open(url) as database:
        database.set_table(made_here())
        database.set_table(table(family=family, probes=tuple(
            probe(f"b1s{length}h8d128c", 10.0, 9.0) for length in (512, 1024)
        )))  # fmt: skip
    listing = tmp_path / "problems.txt"
    listing.write_text("b4s77h2d64c-float32 12\n")
    for options, families in (
        (["--problems", str(listing)], ["fwd-d64c-float32"]),
        (["--preset", "llama3-8b"], [family.name]),
        (["--preset", "llama3-8b", "--head-dim", "64"], []),
    ):
        told = json.loads(run(capsys, "show", "--regret", "--json", *options)[1])
        assert [each["family"] for each in told] == families


def test_the_report_has_the_regret_of_what_was_timed_likewise(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = dataclasses.replace(made_here(), policy=f"cpu-test{TURNS}")
    with Database.open(url) as database:
        database.set_table(made)
        for policy in ("cpu-test", "other"):
            database.add(trial(PROBLEM, device=made.device, policy=policy))
    page = tmp_path / "report.html"
    code, out, _ = run(capsys, "report", "--json", "--html", str(page))
    assert code == 0
    told = {each["policy"]: each["regret"] for each in json.loads(out)["devices"]}
    assert told["other"] is None
    assert "(goal: 2% / 6%)" in told["cpu-test"]["title"]
    worst = "b1s1024h8/8d64c-float32"
    assert told["cpu-test"]["rows"] == [
        [made.family.name, "1", "0.0% / 0.0%", "2.6% / 2.6%", "2.6% / 2.6%", "met", worst]
    ]
    assert worst in page.read_text(encoding="utf-8")
    _, out, _ = run(capsys, "report")
    assert "What dispatch tables lose" in out
    assert "2.6% / 2.6%" in out
    _, out, _ = run(capsys, "report", "--head-dim", "64", "--full")
    assert "What dispatch tables lose" not in out
