"""What the report makes of a database."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.findings import CAUSAL, DIGEST, FULL, GPU, MODEL, TIMED, search, trial, winner

from autoflash import cli, settings
from autoflash.database import Database
from autoflash.device import for_arch
from autoflash.errors import InvalidInput
from autoflash.record import OUTCOMES, Record
from autoflash.report import Ceilings, Chapter, Findings, Table, drawings, findings, page, tables
from autoflash.report.charts import Axis, Chart
from autoflash.report.conditions import conditions
from autoflash.report.gates import GATES, funnel, gate_of
from autoflash.report.progress import convergence, searches
from autoflash.report.tunables import ENOUGH, tuned


def stored(trials: list[Record], winners: list[Record] | None = None, **options: Any) -> Findings:
    """The findings of a database that holds these."""
    with Database.open("sqlite://", digests={"cuda/test": DIGEST}) as db:
        for record in trials:
            db.add(record)
        for record in winners or ():
            db.set_best(record)
        return findings(db, digests={"cuda/test": DIGEST}, **options)


def only(found: Findings) -> Chapter:
    (chapter,) = found.chapters
    return chapter


# Searches ---------------------------------------------------------------------------------------


def test_a_search_has_its_steps_and_where_it_arrived() -> None:
    causal, full = searches(search(), [winner()])
    assert (causal.problem, causal.count) == (CAUSAL, 5)
    assert causal.points == ((1, 200.0), (2, 100.0), (4, 400.0), (5, 99.5))
    assert causal.steps == [(1, 200.0), (2, 100.0), (5, 99.5)]
    assert causal.arrived == 2  # 100 is within 1 % of 99.5
    assert causal.seconds == 40
    assert causal.winner is not None
    assert (full.best_us, full.winner) == (20.0, None)


def test_a_winner_without_trials_is_a_search_without_points() -> None:
    (alone,) = searches([], [winner()])
    assert (alone.count, alone.points, alone.best_us, alone.arrived) == (0, (), None, None)


def test_convergence_is_the_median_over_problems() -> None:
    found = searches(search(), [])
    assert convergence(found)[1] == pytest.approx((200 / 99.5 + 1) / 2)
    assert convergence(found)[5] == 1.0


# Gates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_has_its_gate(outcome: str) -> None:
    gate = gate_of(trial(outcome=outcome, us=1.0))
    assert gate is None if outcome in ("ok", "predicted") else gate in GATES


def test_each_gate_is_reached_by_those_that_passed_the_one_before() -> None:
    found = funnel(search())
    assert [(g.name, g.reached, g.stopped) for g in found.gates] == [
        ("compiler", 7, 1),
        ("resources", 6, 0),
        ("launch", 6, 0),
        ("result", 6, 1),
        ("racing", 5, 1),
    ]
    assert found.passed == 4


def test_a_compiler_that_hangs_is_stopped_by_the_compiler_gate() -> None:
    assert gate_of(trial(outcome="timeout", us=None, reason="compiling: 60 s")) == "compiler"
    assert gate_of(trial(outcome="timeout", us=None, reason="no answer in 9 s")) == "launch"


def test_reasons_that_differ_in_numbers_only_are_one() -> None:
    texts = ("8 bytes; it has 7", "9 bytes; it has 7", "spilled")
    found = funnel(trial(outcome="over_resources", us=None, reason=text) for text in texts)
    assert [(r.count, r.text) for r in found.reasons] == [(2, "8 bytes; it has 7"), (1, "spilled")]
    assert (found.gates[-1].name, found.passed) == ("resources", 0)


def test_constraints_come_first_where_they_were_counted() -> None:
    found = funnel(search(), {("cuda/test", "tiles fit"): 93})
    assert (found.gates[0].name, found.gates[0].reached) == ("constraints", 100)
    assert found.gates[1].reached == 7
    assert found.reasons[0].text == "tiles fit"


# Tunables ---------------------------------------------------------------------------------------


def test_prices_compare_the_best_with_each_value() -> None:
    (found,) = tuned(search())
    prices = {t.name: t.prices for t in found.tunables}
    assert prices["block_m"] == {64: pytest.approx(200 / 99.5), 128: 1.0}
    assert prices["num_stages"] == {2: pytest.approx(100 / 99.5), 3: 1.0}
    assert all(t.importance is None for t in found.tunables)  # five trials say nothing


def test_the_tunable_that_decides_is_the_most_important() -> None:
    rng = random.Random(0)
    records = [
        trial(us=100.0 * (1 + stages) + rng.random(), tunables={"a": rng.choice([1, 2, 4]),
              "num_stages": stages, "same": 1})
        for stages in [rng.choice([0, 1, 2, 3]) for _ in range(4 * ENOUGH)]
    ]  # fmt: skip
    (found,) = tuned(records)
    assert [t.name for t in found.tunables] == ["num_stages", "a"]
    first = found.tunables[0].importance
    assert first is not None
    assert 0.8 < first <= 1.0


def test_values_of_different_kinds_can_be_compared() -> None:
    records = [
        trial(us=us, tunables={"pingpong": value})
        for us, value in ((3.0, "off"), (2.0, True), (4.0, 1.5))
    ]
    (found,) = tuned(records)
    assert set(found.tunables[0].prices) == {"off", True, 1.5}


# Ceilings, conditions ---------------------------------------------------------------------------


def test_the_roof_is_the_lower_of_memory_and_products() -> None:
    ceilings = Ceilings.stated(GPU)
    assert ceilings.attainable_tflops("bfloat16", 1e9) == GPU.tflops_16bit
    assert ceilings.attainable_tflops("bfloat16", 100) == pytest.approx(400)
    assert Ceilings.stated(for_arch("cpu")).attainable_tflops("float8_e4m3fn", 100) is None
    assert "not measured" in ceilings.origin


def measured(path: Path, **changes: Any) -> Path:
    data = {
        "schema_version": 1, "date": "2026-11-21T00:00:00Z", "device": GPU.to_dict(),
        "how": "products", "tflops": {"bfloat16": 700.0}, "memory_gbps": 3500.0,
    }  # fmt: skip
    path.write_text(json.dumps({**data, **changes}), encoding="utf-8")
    return path


def test_measured_ceilings_serve_their_device_alone(tmp_path: Path) -> None:
    ceilings = Ceilings.load(measured(tmp_path / "c.json"))
    found = stored(search(), [winner()], ceilings=[ceilings])
    assert only(found).ceilings.attainable_tflops("bfloat16", 1e9) == 700.0
    assert "measured 2026-11-21: products" in page(found)
    other = stored([trial(device=for_arch("cpu"))], ceilings=[ceilings])
    assert not only(other).ceilings.measured


@pytest.mark.parametrize(
    "changes", [{"schema_version": 9}, {"tflops": 3}, {"memory_gbps": -1.0}, {"device": {}}]
)
def test_ceilings_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"c\.json is not what benchmarks/ceilings\.py writes"):
        Ceilings.load(measured(tmp_path / "c.json", **changes))


def test_conditions_count_what_differs() -> None:
    found = conditions([*search(), trial(environment={"torch": "2.12.0"})])
    assert found.facts["torch"] == {"2.13.0": 7, "2.12.0": 1}
    assert (found.throttled, found.watched) == (1, 6)
    assert (found.spreads["clock_mhz"].least, found.spreads["clock_mhz"].median) == (1700, 1900)


# Charts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[5.0], [1.0, 1.001], [0.02, 4e6], [99.5, 200.0], [3, 3, 3], [1e-3, 2e-3]]
)
def test_an_axis_shows_its_values_and_few_ticks(values: list[float], log: bool) -> None:
    axis = Axis.over("x", values, log=log)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 1 <= len(axis.ticks) <= 12
    assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks)
    assert list(axis.ticks) == sorted(set(axis.ticks))


def test_what_lies_beyond_an_axis_lies_at_its_end() -> None:
    chart = Chart("t", "s", Axis.over("x", [0, 10]), Axis.over("y", [1, 10], log=True))
    assert chart.place((1e9, 1e9)) == (chart.width - chart.right, chart.top)


def test_dots_at_one_place_are_drawn_once() -> None:
    chart = Chart("t", "s", Axis.over("x", [0, 10]), Axis.over("y", [0, 10]))
    chart.scatter("trials", [(5, 5)] * 1000 + [(6, 6)])
    assert chart.layers[0].path.count("M") == 2


# Findings ---------------------------------------------------------------------------------------


def test_devices_and_policies_have_chapters_of_their_own() -> None:
    found = stored([*search(), trial(us=9.0, outcome="predicted")], [winner()])
    assert [(c.policy, c.trials, c.predicted) for c in found.chapters] == [
        (TIMED, 7, False),
        (MODEL, 1, True),
    ]
    assert found.chapters[0].gain("default_us") == pytest.approx(1.25)
    assert found.chapters[0].gain("torch_us") == pytest.approx(1.5)


def test_one_run_has_its_trials_and_the_winners_of_its_problems() -> None:
    with Database.open("sqlite://", digests={"cuda/test": DIGEST}) as db:
        about: dict[str, Any] = {"device": GPU, "environment": {}, "seed": 3, "budget": {"n": 5}}
        first = db.start_run(command="tune --first", **about)
        second = db.start_run(command="tune --second", **about)
        for record in search():
            db.add(record, first if record.problem == CAUSAL else second)
        db.finish_run(second, "done")
        db.set_best(winner(CAUSAL))
        db.set_best(winner(FULL))
        found = only(findings(db, digests={}, run=second))
    assert [s.problem for s in found.searches] == [FULL]
    assert [record.problem for record in found.winners] == [FULL]
    (row,) = tables.runs(found).rows
    assert row[3:] == ("done", "3", "tune --second", "n 5")
    assert found.outdated == 3  # no such template is installed: two trials and a winner


def test_only_the_problems_asked_for() -> None:
    found = stored(search(), choose=lambda rs: [r for r in rs if r.problem == FULL], asked="--x")
    assert [s.problem for s in only(found).searches] == [FULL]
    assert "--x" in page(found)


def test_findings_are_json() -> None:
    found = stored(search(), [winner()]).to_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["devices"][0]["funnel"]["passed"] == 4
    assert again["devices"][0]["problems"][0]["best_so_far"][-1] == [5, 99.5]
    assert again["devices"][0]["problems"][0]["winner"]["default_us"] == 100.0


# The page ---------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags that are open, those with addresses, and all text."""

    VOID = ("meta", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(text: str) -> _Page:
    """The page, once it is certain that it is whole and asks for nothing."""
    found = _Page(text)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)
    fetched = [a for a in found.addresses if not a.startswith("#") and a != "data:,"]
    assert fetched == []
    assert {a[1:] for a in found.addresses if a.startswith("#")} <= set(found.ids)
    assert "@import" not in text
    assert "url(" not in text
    numbers = " ".join(re.findall(r' (?:d|x|y|cx|cy)="([^"]*)"', text))
    assert "nan" not in numbers
    assert "inf" not in numbers
    return found


def test_a_page_of_a_search() -> None:
    text = page(stored(search(), [winner()]))
    found = read(text)
    for words in (CAUSAL.name, FULL.name, "NVIDIA Test", "compiling: 300 registers", "1.25x",
                  "stated, not measured", "block_m", "580.1", "1 stopped"):  # fmt: skip
        assert words in found.words, words
    assert "<script>alert" not in text
    assert "<script>alert(1)</script> & error 3.5" in found.words
    assert "Regret" not in found.words


def test_an_empty_database_makes_a_page_that_says_what_to_do() -> None:
    assert "autoflash tune" in read(page(stored([]))).words


def test_failures_alone_make_a_page() -> None:
    failed = [
        trial(outcome=outcome, us=None, reason=f"why {outcome}")
        for outcome in OUTCOMES
        if outcome not in ("ok", "predicted", "slow")
    ]
    found = read(page(stored(failed)))
    assert "why crash" in found.words
    assert "no winner to draw" in found.words
    assert "no curve to draw" in found.words


def test_predictions_alone_make_a_page_that_does_not_call_them_measured() -> None:
    guesses = [trial(us=us, outcome="predicted", second=int(us)) for us in (9.0, 8.0, 7.0)]
    found = read(page(stored(guesses, [trial(us=7.0, outcome="predicted")])))
    assert "No time here was measured" in found.words
    assert "no clock was read" in found.words
    assert "racing" not in found.words.partition("Tunables")[0].partition("Gates")[2]


def test_winners_alone_make_a_page_that_says_where_the_trials_are() -> None:
    found = read(page(stored([], [winner()])))
    assert "the winners only" in found.words
    assert CAUSAL.name in found.words


def test_thousands_of_trials_make_a_page_that_can_be_sent() -> None:
    rng = random.Random(0)
    many = [
        trial(
            CAUSAL if number % 2 else FULL, us=rng.uniform(50, 900), second=number,
            outcome=rng.choice(["ok", "slow"]), reason=f"{number} x {'abcde'[number % 5]}",
            tunables={"block_m": rng.choice([64, 128]), "n": number}, clock_mhz=1000 + number % 990,
        )
        for number in range(6000)
    ]  # fmt: skip
    chapter = only(stored([]) if not many else _of(many))
    text = page(Findings(place="x", version="1", created="2026-11-21T00:00:00Z",
                         digests={}, chapters=(chapter,)))  # fmt: skip
    read(text)
    assert len(text) < 400_000


def _of(trials: list[Record]) -> Findings:
    """As `stored`, without writing thousands of rows one transaction each."""
    chapter = Chapter(
        device=GPU, policy=TIMED, predicted=False, trials=len(trials), outdated=0,
        searches=searches(trials, []), funnel=funnel(trials), tuned=tuned(trials),
        ceilings=Ceilings.stated(GPU), conditions=conditions(trials),
    )  # fmt: skip
    return Findings(place="x", version="1", created="", digests={}, chapters=(chapter,))


def test_a_regret_table_has_a_section_where_there_is_one() -> None:
    table = Table("Worst 4 %, mean 1 %.", ("rule", ">regret"), (("tree", "1.04"),))
    found = stored(search(), regret=lambda device, policy: table if policy == TIMED else None)
    words = read(page(found)).words
    assert "Regret" in words
    assert "Worst 4 %, mean 1 %." in words
    assert found.to_dict()["devices"][0]["regret"] == {
        "title": "Worst 4 %, mean 1 %.",
        "columns": ["rule", ">regret"],
        "rows": [["tree", "1.04"]],
    }


def test_more_searches_than_are_drawn_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["autoflash.report.page"], "CURVES", 1)
    longer = [*search(), trial(FULL, 30.0, second=90)]
    text = page(_of(longer))
    assert "1 search with fewer trials is not drawn" in read(text).words


def test_a_roofline_needs_ceilings_and_winners() -> None:
    assert drawings.roofline([], Ceilings.stated(GPU)) is None
    none = Ceilings(GPU.key, True, {}, 100.0, "")
    assert drawings.roofline([winner()], none) is None
    drawn = drawings.roofline([winner()], Ceilings.stated(GPU))
    assert drawn is not None
    assert CAUSAL.name in drawn.dots[0].text


# The command ------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs `report` on a database that holds a search and a winner: (exit code, stdout, stderr)."""
    monkeypatch.setenv("AUTOFLASH_DATABASE", "")  # --database writes it; monkeypatch takes it back
    url = f"sqlite:///{cache_dir.parent / 'report.db'}"
    with Database.open(url, digests={"cuda/test": DIGEST}) as db:
        for record in search():
            db.add(record)
        db.set_best(winner())

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main(["report", "--database", url, *map(str, arguments)])
        said = capsys.readouterr()
        code = exited.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), said.out, said.err

    return run


def test_the_short_form_says_what_matters(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "NVIDIA Test (sm90), policy gpu-test" in out
    assert "problems: 2, trials: 7, winners: 1, 1.25x the default, 1.50x PyTorch's best" in out
    assert "compiling: 300 registers are too many" in out
    assert "clock:      1900 MHz, from 1700 to 1900; reduced in 1 of 5 records" in out
    assert "driver 580.1" in out


def test_the_page_goes_where_it_should_and_json_to_stdout(run: Run, tmp_path: Path) -> None:
    out_file = tmp_path / "new" / "report.html"
    code, out, err = run("--html", out_file, "--json", "--shape", FULL.name)
    assert code == 0
    assert f"written to {out_file}" in err
    assert FULL.name in read(out_file.read_text(encoding="utf-8")).words
    (device,) = json.loads(out)["devices"]
    assert [each["problem"] for each in device["problems"]] == [FULL.name]
    assert json.loads(out)["asked"] == f"--shape {FULL.name}"


def test_a_device_is_named_by_what_the_database_knows(run: Run) -> None:
    assert "NVIDIA Test" in run("--device", "nvidia-test")[1]
    code, _, err = run("--device", "nvidia-tset")
    assert code == 2
    assert "Did you mean 'nvidia-test'?" in err


def test_what_was_asked_for_and_is_not_there_is_said(run: Run) -> None:
    code, out, _ = run("--run", 9)
    assert code == 0
    assert out.startswith("no records of --run 9; `autoflash tune` makes some")


def test_a_page_that_cannot_be_written_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("--html", tmp_path / "file" / "report.html")
    assert code == 2
    assert "cannot be written" in err


def test_spaces_count_what_constraints_reject() -> None:
    from autoflash.codegen import catalog
    from autoflash.problem import Problem
    from autoflash.report.spaces import infeasible

    cpu, problem = for_arch("cpu"), Problem.parse("b1s64h2d32c-float32")
    template = catalog.installed().get("cpp/fwd")
    expected = template.space(problem, cpu).rejected
    record = trial(problem, device=cpu, template="cpp/fwd")
    assert expected
    assert infeasible([record, record, trial()]) == {
        ("cpp/fwd", reason): count for reason, count in expected.items()
    }


def test_ceilings_are_measured_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(settings.PACKAGE_DIR.parent / "benchmarks"))
    script = __import__("ceilings")
    cpu = for_arch("cpu")
    found = script.measure(cpu, 1.0, sizes=(32,), copy_bytes=1 << 16)
    (tmp_path / "c.json").write_text(json.dumps(found))
    ceilings = Ceilings.load(tmp_path / "c.json")
    assert ceilings.measured
    assert ceilings.device_key == cpu.key
    assert ceilings.tflops["float32"] > 0
    assert ceilings.memory_gbps > 0
