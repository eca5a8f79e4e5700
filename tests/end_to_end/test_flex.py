"""FlexAttention tuned for real on the CPU, exported, and called with what the export says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from autoflash import device as devices
from autoflash.problem import Problem
from autoflash.tuning.formula import exact
from autoflash.tuning.inputs import make_inputs

ROOT = Path(__file__).parents[2]
SHAPE = "b1s256h4/2d32c-float32"
PROBLEM = Problem.parse(f"flex:{SHAPE}")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "avx2" not in devices.for_arch("cpu").isa, reason="FlexAttention's CPU kernel needs AVX2"
    ),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "AUTOFLASH_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def run(environment: dict[str, str], *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
    """What a command printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "autoflash", *arguments, "--op", "flex", "--shape", SHAPE, "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in codes, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def best(environment: dict[str, str]) -> dict[str, Any]:
    """The winner of two trials: the default, and the mask in blocks of 64."""
    found = run(environment, "tune", "--effort", "normal", "--trials", "2", codes=(0, 3))
    (result,) = found["results"]
    outcomes = result["outcomes"]
    assert outcomes.get("ok", 0) + outcomes.get("slow", 0) == 2, result
    return dict(result["best"])


def test_the_winner_is_flexattention_s_own_and_not_slower_than_its_default(
    environment: dict[str, str], best: dict[str, Any]
) -> None:
    assert best["problem"] == PROBLEM.to_dict()
    assert best["config"]["template"] == "flex/fwd"
    assert best["measurement"]["latency_us"] <= best["default_us"]
    assert best["torch_us"] > 0
    trials = run(environment, "show", "--all")
    assert [t["record"]["config"]["values"]["mask_block"] for t in trials] == [128, 64]
    assert (Path(environment["AUTOFLASH_CACHE_DIR"]) / "inductor").is_dir()
    (problem,) = run(environment, "plan", "--trials", "2")["problems"]
    assert problem["trials"] == 0


def test_bench_times_it_beside_its_peers(environment: dict[str, str], best: dict[str, Any]) -> None:
    report = run(
        environment, "bench", "--providers", "autoflash,naive", "--rounds", "2", "--budget-ms", "5"
    )
    ours, naive = report["rows"]
    assert (ours["outcome"], naive["outcome"]) == ("ok", "ok"), report["rows"]
    assert (ours["rule"], ours["config"]) == ("exact", best["config"]["values"])
    assert ours["error_ratio"] < 2


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
def test_what_is_exported_runs_in_flexattention(
    environment: dict[str, str], best: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert run(environment, "export", "flex", "--out", str(out))["entries"] == 1
    (entry,) = json.loads((out / "flex.json").read_text())["entries"]
    assert entry["mask_block"] == best["config"]["values"]["mask_block"]
    spec = importlib.util.spec_from_file_location("flex_options", out / "flex_options.py")
    assert spec is not None
    assert spec.loader is not None
    picker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picker)

    # What the tuner compiled is what this compiles.
    cache = f"{environment['AUTOFLASH_CACHE_DIR']}/inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    inputs = make_inputs(PROBLEM, devices.for_arch("cpu"))
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    options = picker.kernel_options(q, k, v, causal=True)
    assert options == entry["kernel_options"] == {}  # a CPU's kernel has none
    # Keys of a GPU's winner: accepted by the compiled call, and known by name.
    options = {**options, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4}
    mask = create_block_mask(
        lambda batch, head, row, key: key <= row, None, None, 256, 256, device="cpu",
        BLOCK_SIZE=entry["mask_block"],
    )  # fmt: skip
    with torch.no_grad():
        made = torch.compile(flex_attention, dynamic=False)(
            q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options
        )
    wanted, _ = exact(q, k, v, causal=True, layout="bhsd")
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-5)
