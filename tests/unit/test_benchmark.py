from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from autoflash import benchmark, cli, settings
from autoflash import device as devices
from autoflash.benchmark import GRIDS, Report, Row, grid, run, table
from autoflash.benchmark.runner import PROVIDERS
from autoflash.cli.reports import bench_saved
from autoflash.device import KNOWN_GPUS, Device
from autoflash.errors import InvalidInput, UnknownName
from autoflash.problem import Problem
from autoflash.tuning import peers
from autoflash.tuning.peers import PEERS

TINY = Problem.parse("b1s40h2d32c-float32")
FORWARD = """
b16s1024h16/16d128c b16s1024h16/16d128f b16s1024h32/32d64c b16s1024h32/32d64f b16s1024h8/8d256c
b16s1024h8/8d256f b1s16384h16/16d128c b1s16384h16/16d128f b1s16384h32/32d64c b1s16384h32/32d64f
b1s16384h32/8d128c b1s16384h8/8d256c b1s16384h8/8d256f b4s4096h16/16d128c b4s4096h16/16d128f
b4s4096h32/32d64c b4s4096h32/32d64f b4s4096h32/8d128c b4s4096h8/8d256c b4s4096h8/8d256f
"""


@pytest.fixture
def cpu() -> Device:
    return devices.for_arch("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_forward_grid_is_the_published_one() -> None:
    problems = GRIDS["fwd"]
    assert {problem.name for problem in problems} == {f"{n}-bfloat16" for n in FORWARD.split()}
    assert len(problems) == 20
    assert {problem.batch * problem.seqlen_q for problem in problems} == {16384}


def test_held_out_shapes_are_in_no_other_grid() -> None:
    held_out = GRIDS["fwd-heldout"]
    cells = {(p.head_dim, p.causal, p.seqlen_q) for p in held_out}
    assert len(cells) == len(held_out) == 32
    assert {(p.batch, p.num_heads, p.num_kv_heads, p.dtype) for p in held_out} == {
        (3, 24, 6, "bfloat16")
    }
    others = {p for name, found in GRIDS.items() if name != "fwd-heldout" for p in found}
    assert not others & set(held_out)


def test_the_cpu_grid_has_both_dtypes_and_both_masks() -> None:
    cells = {(p.seqlen_q, p.head_dim, p.causal, p.dtype) for p in GRIDS["cpu"]}
    assert cells == {
        (seqlen, dim, causal, dtype)
        for seqlen, dim in ((1024, 64), (4096, 64), (2048, 128))
        for causal in (True, False)
        for dtype in ("float32", "bfloat16")
    }
    assert {(p.batch, p.num_heads, p.num_kv_heads) for p in GRIDS["cpu"]} == {(1, 8, 8)}


def test_the_split_grid_has_fewer_tiles_than_a_device_holds():
    split = GRIDS["fwd-split"]
    assert [p.seqlen_q for p in split] == [256] * 2 + [1] * 4 + [2, 2, 4, 8, 16, 16]
    for problem in split:
        rows = problem.seqlen_q * problem.group_size
        assert -(-rows // 64) * problem.batch * problem.num_kv_heads <= 128
        assert problem.seqlen_k >= 8192


def test_the_grids_of_windows_softcap_and_8_bits() -> None:
    windows = GRIDS["fwd-window"]
    assert all(p.local and not p.softcapped for p in windows)
    cells = {(p.head_dim, p.window_left) for p in windows if p.causal}
    assert cells >= {(dim, left) for dim in (64, 128) for left in (128, 1024, 4096)}
    assert {p.seqlen_q for p in windows} == {4096, 8192, 16384}
    assert any(p.window_right for p in windows)
    caps = GRIDS["fwd-softcap"]
    assert {p.softcap for p in caps} == {50.0}
    assert {p.head_dim for p in caps} == {128, 256}
    assert any(p.local for p in caps)
    assert {(p.head_dim, p.seqlen_q, p.causal) for p in GRIDS["fwd-fp8"]} == {
        (dim, seqlen, causal)
        for dim in (64, 128, 256)
        for seqlen in (4096, 16384)
        for causal in (True, False)
    }
    for p in GRIDS["fwd-fp8"]:
        assert (p.op, p.dtype) == ("fwd_fp8", "float8_e4m3fn")
        assert (p.batch * p.seqlen_q, p.num_heads * p.head_dim) == (16384, 2048)


@pytest.mark.parametrize("name", list(GRIDS))
def test_names_of_grids_read_back(name: str) -> None:
    assert grid(name) == GRIDS[name]
    assert tuple(Problem.parse(problem.name) for problem in GRIDS[name]) == GRIDS[name]
    assert len(set(GRIDS[name])) == len(GRIDS[name])


def test_a_grid_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(
        "# decode\n\nb1s1x4096h32/8d128c  # one row\nb1s8h1d16f-float32\nb1s8h1d16f-float32\n"
    )
    found = grid(str(path), dtype="float16")
    assert [problem.name for problem in found] == [
        "b1s1x4096h32/8d128c-float16", "b1s8h1/1d16f-float32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [("b1s8h1d16f\nb1s8h1\n", ":2: problem 'b1s8h1'"), ("# nothing\n", "names no problem"),
     ("b1s8h3/2d16f", "not a multiple of num_kv_heads")],
)  # fmt: skip
def test_a_mistake_in_a_grid_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        grid(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_grid_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="smok"):
        grid("smok")
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot be read"):
        grid(str(path))


def test_grids_need_nothing_heavy() -> None:
    code = (
        "import sys; from autoflash import benchmark; benchmark.GRIDS['cpu'];"
        "sys.exit(bool({'torch', 'triton', 'optuna', 'sqlalchemy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_provider_gets_a_row_and_ours_says_what_served_it(cpu: Device) -> None:
    started: list[tuple[str, int, int]] = []
    seen: list[Row] = []
    report = run(
        [TINY], cpu, rounds=5, budget_ms=5,
        on_start=lambda p, i, n: started.append((p.name, i, n)), on_row=seen.append,
    )  # fmt: skip
    assert started == [(TINY.name, 0, 1)]
    assert tuple(seen) == report.rows
    assert tuple(row.provider for row in report.rows) == PROVIDERS
    rows = {row.provider: row for row in report.rows}
    for name in ("autoflash", "sdpa", "math", "naive"):
        row = rows[name]
        assert row.outcome == "ok"
        assert row.latency_us is not None
        assert row.latency_us > 0
        assert row.tflops == pytest.approx(TINY.flops / row.latency_us / 1e6)
        assert row.count is not None
        assert row.count >= 5
        assert row.error_ratio is not None
        assert row.error_ratio < 2
    assert rows["autoflash"].rule in ("exact", "bucket", "default", "torch")
    assert (rows["autoflash"].config is None) == (rows["autoflash"].rule == "torch")
    assert rows["autoflash"].speedup is None
    assert rows["cudnn"].outcome == "unavailable"
    assert rows["cudnn"].reason == "runs on GPUs only"
    assert rows["cudnn"].latency_us is None
    sdpa = rows["sdpa"]
    assert sdpa.speedup is not None
    assert sdpa.speedup_low is not None
    assert sdpa.speedup_high is not None
    assert sdpa.speedup_low <= sdpa.speedup <= sdpa.speedup_high

    document = json.loads(report.to_json())
    assert document["schema_version"] == 1
    assert document["policy"] == "cpu-wall-warm-median-1"
    assert document["device"]["arch"] == "cpu"
    assert document["environment"]["torch"] == torch.__version__
    assert document["date"].endswith("Z")
    assert {"problem", "provider", "latency_us", "tflops"} <= document["rows"][0].keys()
    assert len(document["rows"]) == len(PROVIDERS)


@pytest.mark.parametrize(
    ("name", "able"),
    [
        ("b1s60h2d32cw9-float32", {"autoflash", "sdpa", "math", "naive"}),
        ("b1s60x80h4/2d32fw9x20-bfloat16", {"autoflash", "sdpa", "math", "naive"}),
        ("b1s60h2d32ccap20-float32", {"autoflash", "naive"}),
        ("b1s60h2d32cw20cap20-bfloat16", {"autoflash", "naive"}),
        ("b2s60h4/2d32c-float8_e4m3fn", {"autoflash", "naive"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*PyTorch serves")
def test_windows_softcap_and_8_bits_are_compared(name: str, able: set[str], cpu: Device) -> None:
    report = run([Problem.parse(name)], cpu, rounds=3, budget_ms=2)
    rows = {row.provider: row for row in report.rows}
    assert {provider for provider, row in rows.items() if row.outcome == "ok"} == able, {
        provider: row.reason for provider, row in rows.items()
    }
    assert all(row.outcome in ("ok", "unavailable") for row in rows.values())
    ours = rows["autoflash"]
    assert ours.error_ratio is not None
    assert ours.tflops is not None
    assert ours.tflops > 0


def _add(monkeypatch: pytest.MonkeyPatch, name: str, make: peers.Make, *, fused: bool) -> None:
    monkeypatch.setitem(PEERS, name, peers._peer(name, "test", "bhsd", make, is_fused=fused))
    monkeypatch.setattr("autoflash.benchmark.runner.PROVIDERS", (*PROVIDERS, name))


def _naive_after(first: Callable[[], None]) -> peers.Make:
    """A provider that does something before each call, and then what is right."""

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> peers.Call:
        right = peers.PEERS["naive"].make(*(t.transpose(1, 2) for t in (q, k, v)), problem)

        def call() -> torch.Tensor:
            first()
            return right()

        return call

    return make


def test_a_provider_that_is_wrong_is_not_timed(
    cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> peers.Call:
        def call() -> torch.Tensor:
            calls[0] += 1
            return torch.zeros_like(q)

        return call

    _add(monkeypatch, "lazy", make, fused=True)
    report = run([TINY], cpu, ["naive", "lazy"], rounds=5, budget_ms=2)
    lazy = report.rows[1]
    assert (lazy.provider, lazy.outcome, lazy.latency_us) == ("lazy", "wrong_result", None)
    assert "should be" in lazy.reason
    assert calls[0] == 2  # to see whether it runs, and to look at what it gives
    assert list(report.latencies()[TINY.name]) == ["naive"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_fallback_does_not_count_as_the_fused_kernel(
    cpu: Device, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    _add(monkeypatch, "slow", _naive_after(lambda: time.sleep(0.06)), fused=fused)
    report = run([TINY], cpu, ["naive", "slow"], rounds=5, budget_ms=2)
    slow = report.rows[1]
    assert slow.outcome == ("implausible" if fused else "ok")
    assert (slow.latency_us is None) == fused
    assert ("unfused fallback" in slow.reason) == fused


def test_a_provider_that_fails_in_the_end_gets_a_row_with_the_reason(
    cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([True])  # to see whether it runs

    def fail_later() -> None:
        if not next(calls, False):
            raise ValueError("not this length\nand more")

    _add(monkeypatch, "moody", _naive_after(fail_later), fused=True)
    report = run([TINY], cpu, ["naive", "moody"], rounds=5, budget_ms=2)
    assert [row.outcome for row in report.rows] == ["ok", "unavailable"]
    assert report.rows[1].reason == "ValueError: not this length"


def test_a_provider_that_compiles_once_more_takes_part_in_the_rounds(
    cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = iter([0.0, 0.3])  # to see whether it runs, and what is looked at
    _add(monkeypatch, "late", _naive_after(lambda: time.sleep(next(pauses, 0.0))), fused=False)
    report = run([TINY], cpu, ["autoflash", "late"], rounds=5, budget_ms=5)
    late = report.rows[1]
    assert late.outcome == "ok"
    assert late.speedup is not None


def test_a_run_that_is_stopped_leaves_what_it_measured(cpu: Device, tmp_path: Path) -> None:
    kept = tmp_path / "reports" / "bench.json"

    def stop(problem: Problem, index: int, total: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    other = dataclasses.replace(TINY, seqlen_q=48, seqlen_k=48)
    with pytest.raises(KeyboardInterrupt):
        run([TINY, other], cpu, ["naive"], rounds=1, budget_ms=2, on_start=stop,
            on_report=partial(bench_saved, out=kept))  # fmt: skip
    report = Report.from_dict(json.loads(kept.read_text()))
    assert [row.problem for row in report.rows] == [TINY.name]
    assert report.rows[0].outcome == "ok"
    with pytest.raises(InvalidInput, match="cannot be written"):
        bench_saved(report, tmp_path)


def test_requests_without_sense_are_refused(cpu: Device) -> None:
    with pytest.raises(UnknownName, match="cudn"):
        run([TINY], cpu, ["cudn"])
    with pytest.raises(InvalidInput, match="b0s64h2/2d32c-float32 has no work in it"):
        run([Problem.parse("b0s64h2d32c-float32")], cpu, ["naive"])
    with pytest.raises(InvalidInput, match="nothing to compare"):
        run([], cpu)
    with pytest.raises(InvalidInput, match="nothing to compare"):
        run([TINY], cpu, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_device_that_is_absent_is_refused() -> None:
    with pytest.raises(InvalidInput, match="not present"):
        run([TINY], KNOWN_GPUS["sm90"])


def _report(cpu: Device) -> Report:
    def row(problem: str, provider: str, latency_us: float | None, **more: str) -> Row:
        outcome = "ok" if latency_us else "unavailable"
        return Row(
            problem=problem, provider=provider, outcome=outcome, latency_us=latency_us, **more
        )

    one, two = "b1s1024h8/8d64f-float32", "b1s1024h8/8d64c-float32"
    rows = (
        row(one, "autoflash", 100.0, rule="exact"), row(one, "sdpa", 200.0), row(one, "fa4", 50.0),
        row(one, "cudnn", None, reason="runs on GPUs only"),
        row(two, "autoflash", 100.0, rule="bucket"), row(two, "sdpa", 800.0),
        row(two, "fa4", None, reason="it broke"),
        row(two, "cudnn", None, reason="runs on GPUs only"),
    )  # fmt: skip
    return Report(cpu, "some-policy", "2026-11-21T00:00:00Z", {}, {}, rows)


def test_the_table_compares_with_the_best_peer_and_with_pytorch(cpu: Device) -> None:
    laid = table(_report(cpu))
    assert laid.columns == (
        "problem", ">autoflash", ">sdpa", ">fa4", "rule", ">over best", ">over sdpa",
    )  # fmt: skip
    full, half, mean = laid.rows
    # 2.147 GFLOP in 100 us, and half of it.
    assert full == (
        "b1s1024h8/8d64f-float32", "21.5", "10.7", "42.9", "exact", "0.50x fa4", "2.00x",
    )  # fmt: skip
    assert half[1:] == ("10.7", "1.34", "-", "bucket", "8.00x sdpa", "8.00x")
    assert mean[1:] == ("", "4.00x", "0.50x", "", "2.00x", "4.00x")


def test_what_is_missing_is_said_once(cpu: Device) -> None:
    assert _report(cpu).skipped() == [
        "cudnn: runs on GPUs only",
        "fa4: it broke (b1s1024h8/8d64c-float32)",
    ]


def test_a_report_without_ours_still_makes_a_table(cpu: Device) -> None:
    report = _report(cpu)
    rows = tuple(row for row in report.rows if row.provider != "autoflash")
    laid = table(Report(cpu, "p", "d", {}, {}, rows))
    assert len(laid.rows) == 2
    assert laid.rows[0][-2:] == ("", "")


def test_names_are_public() -> None:
    for name in benchmark.__all__:
        assert hasattr(benchmark, name)


SCRIPT = settings.PACKAGE_DIR.parent / "benchmarks" / "dispatch_overhead.py"


def test_dispatch_overhead_judges_by_what_it_prints() -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", "--rounds", "5"],
        capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)},
    )  # fmt: skip
    found = json.loads(ran.stdout)
    assert found["budget_us"] == 5.0
    assert found["within_budget"] == (found["overhead_us"] <= 5.0)
    assert ran.returncode == (0 if found["within_budget"] else 1)
    assert found["launch_us"] > 0
    assert "torch" in found["environment"]


def test_dispatch_overhead_refuses_what_is_no_problem() -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--problem", "b1"],
        capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)},
    )  # fmt: skip
    assert ran.returncode == 2
    assert "is not of the form" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_bench_that_could_time_nothing_says_so_by_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--arch", "cpu", "--shape", "b1s64h2d32c", "--providers", "cudnn"])
    assert ended.value.code == 5
    assert "not timed: cudnn" in capsys.readouterr().out
