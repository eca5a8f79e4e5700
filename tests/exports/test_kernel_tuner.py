"""Kernel Tuner itself replays what was exported for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.exports import selection, tried, written

from autoflash.codegen.catalog import installed
from autoflash.errors import InvalidInput
from autoflash.record import Record
from autoflash.tuning.table import Table, read

pytest.importorskip(
    "kernel_tuner", reason="kernel_tuner is not installed (pip install '.[consumers]')"
)

# Our kernels say in their source how large a thread block is.
pytestmark = pytest.mark.filterwarnings("ignore:None of the tunable parameters specify thread")
RECORDED = Path(__file__).parents[1] / "replay" / "b4s4096h16-16d128c-bfloat16.jsonl"
PROBLEM = "b4s4096h16d128c-bfloat16"
FAILURES = {
    "compile_error": ("CompilationFailedConfig", "compile"),
    "over_resources": ("InvalidConfig", "constraints"),
    "wrong_result": ("RuntimeFailedConfig", "correctness"),
    "timeout": ("RuntimeFailedConfig", "timeout"),
}


def measured() -> Table:
    """What an H200 measured of triton/fwd."""
    table = read(RECORDED)
    rows = [row for row in table.rows.values() if row.config.template == "triton/fwd"]
    return Table(table.header, rows)


def recorded() -> list[Record]:
    """That, as records; some configs are taken to have failed.

    A tunable that is younger than the recording has its default.
    """
    table = measured()
    rows = list(table.rows.values())
    found = []
    for number, row in enumerate(rows):
        outcomes = dict(zip(range(3, 60, 17), FAILURES, strict=False))
        outcome = outcomes.get(number, "ok") if row != table.best else "ok"
        us = row.latency_us if outcome == "ok" else None
        found.append(tried("triton/fwd", PROBLEM, us, outcome, tunables=dict(row.config),
                           second=number, device=table.header.device,
                           resources={"compile_s": 2.5},
                           error_ratio=0.5))  # fmt: skip
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = selection("kernel-tuner", *recorded())
    return written(tmp_path_factory.mktemp("kernel-tuner"), "kernel-tuner", chosen)


def test_simulation_finds_the_fastest_recorded_config(out: Path) -> None:
    from constraint import FunctionConstraint
    from kernel_tuner import tune_cache, tune_kernel
    from kernel_tuner.file_utils import get_t4_results

    table = measured()
    [path] = (out / "cache").iterdir()
    content = json.loads(path.read_text())

    results, env = tune_cache(str(path), strategy="brute_force", verbose=False, quiet=True)

    best = env["best_config"]
    assert env["device_name"] == "NVIDIA H200"
    assert {name: best[name] for name in table.best.config} == dict(table.best.config)
    assert best["time"] == pytest.approx((table.best.latency_us or 0) / 1e3)
    assert len(results) == len(table.rows) - len(FAILURES)

    # Failures, too, are replayed by who says which configs there are.
    known = set(content["cache"])
    params = content["tune_params"]
    results, _ = tune_kernel(
        content["kernel_name"], "", tuple(content["problem_size"]), [], params, lang="C",
        simulation_mode=True, cache=str(path), strategy="brute_force", quiet=True,
        restrictions=[FunctionConstraint(lambda *point: ",".join(map(str, point)) in known)],
    )  # fmt: skip
    assert len(results) == len(table.rows)
    failed = sorted(str(result["__error__"]) for result in results if "__error__" in result)
    assert failed == sorted(name for name, _ in FAILURES.values())
    said = {each["invalidity"] for each in get_t4_results(results, params)["results"]}
    assert said == {"correct", "compile", "constraints", "runtime"}


def test_a_search_of_its_own_runs_on_it(out: Path) -> None:
    from kernel_tuner import tune_cache

    [path] = (out / "cache").iterdir()
    options = {"max_fevals": 25}
    results, env = tune_cache(
        str(path), strategy="greedy_ils", strategy_options=options, quiet=True, seed=3
    )
    names = json.loads(path.read_text())["tune_params_keys"]
    assert 1 < len({tuple(row[name] for name in names) for row in results}) <= 25
    times = [row["time"] for row in results]
    assert env["best_config"]["time"] == min(times) < max(times)


def test_its_schemas_accept_the_results(out: Path) -> None:
    import jsonschema
    from kernel_tuner.file_utils import output_file_schema

    def valid(what: str, path: Path) -> dict[str, Any]:
        data = json.loads(path.read_text())
        version, schema = output_file_schema(what)
        jsonschema.validate(data, schema)
        assert data["schema_version"] == version
        return dict(data)

    metadata = valid("metadata", out / "t4" / "metadata.json")["metadata"]
    assert metadata["hardware"]["hardware_description"][0]["name"] == "NVIDIA H200"
    assert "torch==2.13.0" in metadata["environment"]["requirements"]
    [path] = (path for path in (out / "t4").iterdir() if path.name != "metadata.json")
    data = valid("results", path)
    digest = installed().get("triton/fwd").digest
    assert data["metadata"]["autoflash"]["templates"]["triton/fwd"]["digest"] == digest
    records = recorded()
    assert len(data["results"]) == len(records)
    for result, record in zip(data["results"], records, strict=True):
        assert result["configuration"] == dict(record.config)
        expected = FAILURES[record.outcome][1] if record.outcome in FAILURES else "correct"
        assert result["invalidity"] == expected
        assert result["correctness"] == (record.outcome != "wrong_result")
        assert result["times"]["compilation_time"] == 2500
    data["results"][0]["invalidity"] = "slow"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, output_file_schema("results")[1])


def test_the_newest_trial_of_a_config_counts_and_what_is_unlike_stays_out(tmp_path: Path) -> None:
    trials = [
        tried("triton/fwd", us=300.0, second=0, policy="old"),
        tried("triton/fwd", us=200.0, second=1),
        tried("triton/fwd", us=210.0, second=2),
        tried("cuda/fwd_sm80", us=150.0, second=3),
        tried("cuda/fwd_sm80", us=140.0, outcome="predicted", second=4, problem="b1s64h8d64c"),
        tried("triton/fwd", us=100.0, second=5, tunables={"gone": 1}),
    ]
    out = written(tmp_path, "kernel-tuner", selection("kernel-tuner", *trials))

    names = {path.name for path in (out / "cache").iterdir()}
    assert names == {
        "triton-fwd-b1s1024h8-8d64c-bfloat16.json", "cuda-fwd_sm80-b1s1024h8-8d64c-bfloat16.json"
    }  # fmt: skip
    cache = json.loads((out / "cache" / "triton-fwd-b1s1024h8-8d64c-bfloat16.json").read_text())
    assert [row["time"] for row in cache["cache"].values()] == [0.21]
    t4 = json.loads((out / "t4" / "triton-fwd-b1s1024h8-8d64c-bfloat16.json").read_text())
    assert [m["value"] for r in t4["results"] for m in r["measurements"][:1]] == [0.2, 0.21]


def test_winners_alone_are_refused() -> None:
    from autoflash import export

    chosen = selection("kernel-tuner", winners=(tried("triton/fwd"),))
    with pytest.raises(InvalidInput, match="only winners"):
        export.target("kernel-tuner").files(chosen, export.Options())
