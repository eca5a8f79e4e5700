"""What the commands print, where they print it, and how they exit."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autoflash import cli, settings
from autoflash.cli import output, results
from autoflash.codegen import catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS, Device, for_arch
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning import boards, tuner
from autoflash.tuning.progress import Event, TuneResult

PROBLEM = Problem.parse("b1s64h2d32c-float32")
OTHER = Problem.parse("b1s128h2d32f-float32")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command line: (exit code, stdout, stderr)."""
    for name in ("AUTOFLASH_DATABASE", "AUTOFLASH_JOBS", "AUTOFLASH_RECORD"):
        monkeypatch.setenv(name, "")  # options write these; monkeypatch takes them back

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        code = exited.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), said.out, said.err

    return run


def record(
    problem: Problem = PROBLEM, device: Device | None = None, us: float = 10.0, **values: Any
) -> Record:
    """A measured record of a template that is installed here."""
    device = device or for_arch("cpu")
    template = catalog.installed().get("cpp/fwd")
    measured = Measurement(latency_us=us, p20_us=us, p80_us=us, count=9)
    fields: dict[str, Any] = {
        "problem": problem,
        "config": template.default_config(problem, for_arch("cpu")),
        "template_digest": template.digest,
        "device": device,
        "outcome": "ok",
        "policy": "test",
        "measurement": measured,
        "default_us": 2 * us,
        "torch_us": 3 * us,
        "torch_provider": "sdpa",
        "created": "2026-11-21T00:00:00Z",
    }
    return Record(**{**fields, **values})


def predicted(problem: Problem, us: float, **resources: int) -> Record:
    return record(
        problem, KNOWN_GPUS["sm80"], outcome="predicted", measurement=None, predicted_us=us,
        default_us=None, torch_us=None, resources=resources, source_digest=str(us),
    )  # fmt: skip


def result(status: str, best: Record | None = None, **values: Any) -> TuneResult:
    return TuneResult(problem=best.problem if best else PROBLEM, status=status, best=best, **values)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts results in the place of tuning; what the tuner was asked for is noted beside them."""
    asked: dict[str, Any] = {"results": []}

    def tune(
        problems: Sequence[Problem], device: Device, *, on_event: Callable[[Event], None],
        **options: Any,
    ) -> list[TuneResult]:  # fmt: skip
        asked.update(options, problems=list(problems), device=device)
        for index, each in enumerate(asked["results"]):
            on_event(
                Event(
                    kind="done", problem=each.problem, index=index,
                    total_problems=len(asked["results"]), best_us=7.0,
                )
            )  # fmt: skip
        return list(asked["results"])

    monkeypatch.setattr(tuner, "tune", tune)
    return asked


# Manners ----------------------------------------------------------------------------------------


def test_without_arguments_it_is_help(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert "Usage: autoflash" in out
    assert all(name in out for name in ("tune", "plan", "show", "why", "bench", "doctor", "db"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--arch", "sm_80"], "unknown arch 'sm_80'. Did you mean 'sm80'?"),
        (["tune", "--shape", "4x4"], "problem '4x4' is not of the form"),
        (["tune", "--arch", "cpu", "--templates", "cqp/*"], "unknown template 'cqp/*'"),
        (["tune", "--arch", "cpu", "--effort", "much"], "unknown effort 'much'"),
        (["plan", "--grid", "cpx"], "unknown grid or file 'cpx'. Did you mean 'cpu'?"),
        (["why", "b1"], "problem 'b1' is not of the form"),
        (["show", "--device", "h200"], "unknown device 'h200'"),
        (["show", "--database", "nothing://here"], "nothing"),
        (["db", "load", "/no/such/file"], "/no/such/file"),
        (["db", "merge", "/no/such/file.db"], "/no/such/file.db"),
        (["bench", "--providers", "fa9", "--arch", "cpu"], "unknown provider 'fa9'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    run: Run, arguments: list[str], message: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("autoflash: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["tune", "--bogus"], ["tune", "--trials", "0"], ["why"], ["db", "move"]]
)
def test_a_wrong_command_line_exits_with_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_our_own_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "tune", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["tune", "--shape", PROBLEM.name])


def test_a_corrupt_database_is_left_as_it_is(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("not a database " * 100)
    code, _, err = run("show", "--database", f"sqlite:///{file}")
    assert code == 2
    assert str(file) in err
    assert file.read_text() == "not a database " * 100


def test_options_reach_what_the_environment_rules(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    assert run("show", "--database", f"sqlite:///{file}")[0] == 0
    assert file.is_file()
    assert run("plan", "--shape", PROBLEM.name, "--arch", "cpu", "--jobs", "7")[0] == 0
    assert settings.get().jobs == 7
    assert os.environ["AUTOFLASH_JOBS"] == "7"


# tune -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["improved"], 0),
        (["predicted"], 0),
        (["unimproved", "improved", "invalid"], 0),
        (["unimproved"], 3),
        (["unimproved", "invalid"], 3),
        (["improved", "partial"], 4),
        (["invalid"], 5),
        (["invalid", "invalid"], 5),
    ],
)
def test_exit_codes_of_tune(
    run: Run, tuned: dict[str, Any], statuses: list[str], code: int
) -> None:
    tuned["results"] = [result(s, record() if s == "improved" else None) for s in statuses]
    shapes = [part for _ in statuses for part in ("--shape", PROBLEM.name)]
    assert run("tune", *shapes)[0] == code


def test_fewer_results_than_problems_is_partly_done(run: Run, tuned: dict[str, Any]) -> None:
    tuned["results"] = [result("improved", record())]
    assert run("tune", "--shape", PROBLEM.name, "--shape", OTHER.name)[0] == 4


def test_the_table_has_both_speedups_and_names_the_rival(run: Run, tuned: dict[str, Any]) -> None:
    tuned["results"] = [result("improved", record(us=10.0), trials=12)]
    code, out, err = run("tune", "--shape", PROBLEM.name)
    assert code == 0
    [row] = [line for line in out.splitlines() if line.startswith(PROBLEM.name)]
    assert row.split()[1:3] == ["cpp/fwd", "10"]
    assert "2.00x" in row
    assert "3.00x sdpa" in row
    assert str(record().config) in row
    assert "[1/1]" in err  # progress is beside the answer, not in it
    assert "[1/1]" not in out


def test_failures_and_reasons_are_said(run: Run, tuned: dict[str, Any]) -> None:
    outcomes = Counter(crash=2, ok=1, infeasible=99)
    tuned["results"] = [result("invalid", outcomes=outcomes, reason="no template accepts it")]
    code, out, err = run("tune", "--shape", PROBLEM.name)
    assert code == 5
    assert "no template accepts it" in out
    assert "2 crash" in err
    assert "99" not in err


def test_json_is_all_there_is_on_stdout(run: Run, tuned: dict[str, Any]) -> None:
    tuned["results"] = [result("improved", record(), outcomes=Counter(ok=3), trials=3)]
    code, out, err = run("tune", "--shape", PROBLEM.name, "--json")
    assert code == 0
    [answer] = json.loads(out)["results"]
    assert (answer["status"], answer["problem"], answer["trials"]) == ("improved", PROBLEM.name, 3)
    assert Record.from_dict(answer["best"]) == record()
    assert err == ""


def test_devices_arrive_as_boards(run: Run, tuned: dict[str, Any]) -> None:
    run("tune", "--arch", "cpu", "--shape", PROBLEM.name)
    assert tuned["boards"] == []
    run("tune", "--arch", "cpu", "--shape", PROBLEM.name, "--devices", "all")
    (board,) = tuned["boards"]
    assert (board.device, tuned["device"]) == (for_arch("cpu"), for_arch("cpu"))
    code, _, err = run("tune", "--arch", "cpu", "--shape", PROBLEM.name, "--devices", "0,3")
    assert code == 2
    assert "there is no 3; here are 0: " in err


def test_more_devices_than_problems_are_remarked_on(
    run: Run, tuned: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [boards.Board(index=i, device=for_arch("cpu")) for i in range(2)]
    monkeypatch.setattr(boards, "choose", lambda text, arch: two)
    assert "1 of 2 devices are used" in run("tune", "--shape", PROBLEM.name, "--devices", "all")[2]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_says_which_device(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    if terminal:
        monkeypatch.setattr(output, "Console", partial(Console, force_terminal=True, width=150))

    def event(kind: str, device: str, **facts: Any) -> Event:
        index = int(device)
        return Event(
            kind=kind, problem=PROBLEM, index=index, total_problems=2, device=device, **facts
        )

    with output.TuneProgress() as progress:
        progress(event("start", "0", total=7))
        progress(event("start", "1", total=7))
        progress(event("lost", "1", message="device 1 is used no more: killed"))
        progress(event("done", "0", best_us=5.0))
        if terminal:
            assert [task.description.rpartition(" ")[2] for task in progress._bars.tasks] == ["0"]
    said = stream.getvalue()
    assert f"[1/2] {PROBLEM.name} on device 0: best 5 us" in said
    assert f"[2/2] {PROBLEM.name} on device 1: device 1 is used no more: killed" in said


def test_the_options_of_tune_arrive(run: Run, tuned: dict[str, Any]) -> None:
    run(
        "tune", "--arch", "cpu", "--shape", PROBLEM.name, "--templates", "cpp/*", "--effort",
        "full", "--trials", "9", "--seconds", "1.5", "--seed", "4",
    )  # fmt: skip
    assert tuned["problems"] == [PROBLEM]
    assert tuned["device"] == for_arch("cpu")
    assert tuned["effort"] == "full"
    assert (tuned["max_trials"], tuned["max_seconds"], tuned["seed"]) == (9, 1.5, 4)
    assert "cpp/fwd" in tuned["templates"]
    assert all(name.startswith("cpp/") for name in tuned["templates"])


@pytest.mark.parametrize(("arch", "effort"), [("cpu", "quick"), ("sm80", "normal")])
def test_the_effort_without_an_option(
    run: Run, tuned: dict[str, Any], arch: str, effort: str
) -> None:
    run("tune", "--arch", arch, "--shape", PROBLEM.name)
    assert tuned["effort"] == effort


def test_an_absent_device_gets_a_ranking(run: Run, tuned: dict[str, Any]) -> None:
    slow = predicted(PROBLEM, 20.0, registers=255, smem_bytes=49152, spill_bytes=8, num_threads=128)
    fast = predicted(PROBLEM, 10.0, registers=128, smem_bytes=65536, spill_bytes=0, num_threads=128)
    values = {**fast.config, "block_n": 999}
    slow = Record.from_dict({**slow.to_dict(), "config": {"template": "cpp/fwd", "values": values}})
    with Database.open() as db:
        for each in (slow, fast, predicted(OTHER, 1.0)):
            db.add(each)
    tuned["results"] = [result("predicted", fast)]
    code, out, _ = run("tune", "--arch", "sm80", "--shape", PROBLEM.name)
    assert code == 0
    assert "which is not here" in out
    first, second = (line.split() for line in out.splitlines() if "cpp/fwd  " in line)
    assert first[:7] == [PROBLEM.name, "1", "cpp/fwd", "10", "128", "64", "KiB"]
    assert second[0] == "2"
    assert "(shared memory)" in out
    code, out, _ = run("tune", "--arch", "sm80", "--shape", PROBLEM.name, "--json")
    [answer] = json.loads(out)["results"]
    assert [each["predicted_us"] for each in answer["ranked"]] == [10.0, 20.0]


# show, db, why, plan, warmup --------------------------------------------------------------------


@pytest.fixture
def filled(run: Run) -> Run:
    """A database with two best records, one of them of an older template, and three trials."""
    gpu = KNOWN_GPUS["sm90"]
    with Database.open() as db:
        db.set_best(record(us=10.0))
        db.set_best(record(OTHER, gpu, us=99.0, template_digest="older"))
        db.add(record(us=10.0))
        db.add(record(us=11.0, source_digest="another"))
        db.add(record(OTHER, gpu, outcome="crash", measurement=None, reason="SIGSEGV"))
    return run


def test_show_prints_the_best_and_marks_what_is_not_served(filled: Run) -> None:
    code, out, _ = filled("show")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("b1")}
    assert set(lines) == {PROBLEM.name, OTHER.name}
    assert "2.00x" in lines[PROBLEM.name]
    assert "old" not in lines[PROBLEM.name]
    assert "measured, old" in lines[OTHER.name]
    assert "tune again" in out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--arch", "sm90"], [OTHER.name]),
        (["--device", "native"], [PROBLEM.name]),
        (["--device", KNOWN_GPUS["sm90"].slug], [OTHER.name]),
        (["--causal"], [PROBLEM.name]),
        (["--seqlen", "128,256"], [OTHER.name]),
        (["--shape", PROBLEM.name], [PROBLEM.name]),
        (["--head-dim", "999"], []),
    ],
)
def test_show_filters(filled: Run, arguments: list[str], names: list[str]) -> None:
    code, out, _ = filled("show", "--json", *arguments)
    assert code == 0
    assert [each["name"] for each in json.loads(out)] == names


def test_show_all_has_the_failures_with_their_reasons(filled: Run) -> None:
    code, out, _ = filled("show", "--all")
    assert code == 0
    assert "SIGSEGV" in out
    assert len([line for line in out.splitlines() if line.startswith("b1")]) == 3
    assert len(json.loads(filled("show", "--all", "--json", "--arch", "cpu")[1])) == 2


def test_show_says_what_to_do_when_there_is_nothing(run: Run) -> None:
    code, out, _ = run("show", "--shape", "b77s7h7d7c")
    assert code == 0
    assert "autoflash tune" in out


def test_dump_and_load_carry_records_between_databases(filled: Run, tmp_path: Path) -> None:
    file = tmp_path / "best.jsonl"
    code, out, _ = filled("db", "dump", file, "--device", "native", "--json")
    assert (code, json.loads(out)) == (0, {"dumped": 1})
    [line] = file.read_text().splitlines()
    assert Record.from_dict(json.loads(line)) == record()
    there = f"sqlite:///{tmp_path}/other.db"
    assert json.loads(filled("db", "load", file, "--database", there, "--json")[1]) == {"loaded": 1}
    assert PROBLEM.name in filled("show", "--database", there)[1]


def test_merge_and_prune(filled: Run, tmp_path: Path) -> None:
    here, there = settings.get().database_url, f"sqlite:///{tmp_path}/other.db"
    code, out, _ = filled("db", "merge", here, "--database", there, "--json")
    assert code == 0
    assert json.loads(out)["merged"] == 5
    pruned = json.loads(filled("db", "prune", "--database", there, "--json")[1])["pruned"]
    assert pruned == 1  # the best record whose template has changed
    assert "old" not in filled("show", "--database", there)[1]


def test_why_names_the_record_and_what_the_nearest_differ_in(filled: Run) -> None:
    code, out, _ = filled("why", "b1s72h2d32c-float32", PROBLEM.name, "--arch", "cpu")
    assert code == 0
    near, exact = out.split(f"{PROBLEM.name} on ")
    assert "bucket" in near
    assert PROBLEM.name in near
    assert "exact: measured" in exact
    assert "2.00x the default, 3.00x sdpa" in exact
    answers = json.loads(filled("why", "b1s128h4d32c-float32", "--arch", "cpu", "--json")[1])
    assert [each["rule"] for each in answers] == ["bucket"]


def test_presets_are_listed_with_layers_and_source(run: Run) -> None:
    code, out, _ = run("presets", "gemma2-9b", "llama3-8b")
    assert code == 0
    [llama] = [line for line in out.splitlines() if line.startswith("llama3-8b")]
    assert llama.split()[1:4] == ["32", "32/8", "128"]
    assert "Meta-Llama-3-8B" in llama
    assert "window 4096, softcap 50" in out
    answer = json.loads(run("presets", "--json")[1])
    assert {"llama3-70b", "vit-l", "sd3", "deepseek-v3"} <= {each["name"] for each in answer}
    assert all(each["source"] and each["attention"] for each in answer)
    assert run("presets", "lama3-8b")[0] == 2


def test_plan_says_where_the_time_goes(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    file.write_text(f"{OTHER.name} 10\n{PROBLEM.name} 1000\n")
    arguments = ("plan", "--arch", "cpu", "--problems", file, "--templates", "cpp/fwd")
    plans = json.loads(run(*arguments, "--json")[1])["problems"]
    assert [(plan["problem"], plan["calls"]) for plan in plans] == [
        (PROBLEM.name, 1000), (OTHER.name, 10)
    ]  # fmt: skip
    assert plans[0]["share"] > 0.9
    assert plans[0]["call_us"] < plans[1]["call_us"]
    out = run(*arguments)[1]
    assert out.index("Where the time goes") < out.index("Plan for")


def test_the_command_line_records_nothing(run: Run, tmp_path: Path) -> None:
    os.environ["AUTOFLASH_RECORD"] = str(tmp_path / "ran.txt")  # `run` takes it back
    assert run("plan", "--shape", PROBLEM.name, "--arch", "cpu")[0] == 0
    assert settings.get().record_file is None


def test_plan_counts_what_each_constraint_rejects(run: Run) -> None:
    arguments = ("plan", "--arch", "cpu", "--shape", PROBLEM.name, "--templates", "cpp/fwd")
    code, out, _ = run(*arguments)
    assert code == 0
    [plan] = json.loads(run(*arguments, "--json")[1])["problems"]
    [part] = plan["templates"]
    assert part["feasible"] + sum(part["rejected"].values()) == part["configs"]
    assert plan["trials"] > 0
    for reason, count in part["rejected"].items():
        assert [line for line in out.splitlines() if reason in line and str(count) in line]


def test_plan_needs_no_gpu(run: Run) -> None:
    code, out, _ = run("plan", "--arch", "sm90", "--head-dim", "128", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["device"]["arch"] == "sm90"
    assert len(answer["problems"]) == 2


def test_warmup_builds_what_serves(run: Run) -> None:
    code, out, _ = run("warmup", "--arch", "cpu", "--shape", PROBLEM.name, "--json")
    assert code == 0
    [built] = json.loads(out)
    assert (built["problem"], built["rule"]) == (PROBLEM.name, "default")
    assert list(settings.get().cache_dir.glob("kernels/*/*/meta.json"))


@pytest.mark.parametrize("arch", ["cpu", "sm90"])  # here, and not here
def test_warmup_builds_nothing_of_another_library(arch: str, run: Run) -> None:
    code, said, remarks = run("warmup", "--arch", arch, "--op", "flex", "--shape", PROBLEM.name)
    assert (code, said) == (2, "")
    assert f"flex:{PROBLEM.name}: attention() serves no problem of op flex" in remarks


def test_version(run: Run) -> None:
    from autoflash import __version__

    assert run("version")[1] == f"{__version__}\n"


# Output -----------------------------------------------------------------------------------------


def test_a_plain_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.table("Title", ("name", ">us"), [("a", 5), ("longer", None), ("b", 1234)])
    assert capsys.readouterr().out.splitlines() == [
        "Title", "name      us", "------  ----", "a          5", "longer", "b       1234"
    ]  # fmt: skip


def test_values_that_all_configs_share_are_said_once() -> None:
    one, two = (Config.of("t", {"block_m": m, "num_warps": 4}) for m in (64, 128))
    assert output.shortened([one, None, two, one]) == (
        ["block_m=64", "", "block_m=128", "block_m=64"], ["t, all of them: num_warps=4"]
    )  # fmt: skip
    assert output.shortened([one, one]) == (["block_m=64 num_warps=4"] * 2, [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.5, "0.5"), (12.345, "12.3"), (99.7, "100"), (999.6, "1000"), (1234.5, "1234")],
)
def test_times(value: float | None, text: str) -> None:
    assert output.us(value) == text


def test_exit_codes_are_those_of_the_documentation() -> None:
    codes = (
        results.EXIT_OK, results.EXIT_ERROR, results.EXIT_UNIMPROVED, results.EXIT_PARTIAL,
        results.EXIT_INVALID,
    )  # fmt: skip
    assert codes == (0, 2, 3, 4, 5)
