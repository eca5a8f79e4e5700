"""An autotuned Triton kernel takes the exported configs without benchmarking.

TRITON_INTERPRET decides what `triton.jit` returns, so that a child process runs the kernel; it says
what it met as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.exports import database, selection, tried, written

from autoflash import export
from autoflash.codegen.catalog import installed
from autoflash.errors import InvalidInput

pytest.importorskip("triton", reason="triton is not installed here")

KERNEL = """
import json, sys, warnings

import torch
import triton
import triton.language as tl

from autoflash_nvidia_h100_80gb_hbm3 import CONFIGS, SHAPES, configs, seed

OURS = {name for config in CONFIGS.values() for name in config.kwargs}
NAMES = {name: None for name in OURS} | {"block_m": "BLOCK_M", "block_n": "BLOCK_N"}
KEY = {"N_CTX": "seqlen_q", "HEAD_DIM": "head_dim"}


def benchmarked(*_, **__):
    raise AssertionError("benchmarked")


@triton.autotune(configs=configs(NAMES), key=["N_CTX", "HEAD_DIM"], do_bench=benchmarked)
@triton.jit
def attend(q, k, v, out, N_CTX: tl.constexpr, HEAD_DIM: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    tile = tl.load(q + rows[:, None] * HEAD_DIM + dims, rows[:, None] < N_CTX, 0.0)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, N_CTX, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        known = keys[:, None] < N_CTX
        kt = tl.load(k + keys[:, None] * HEAD_DIM + dims, known, 0.0)
        vt = tl.load(v + keys[:, None] * HEAD_DIM + dims, known, 0.0)
        scores = tl.dot(tile, tl.trans(kt)) * (HEAD_DIM**-0.5)
        scores = tl.where((keys <= rows[:, None]) & (keys < N_CTX), scores, float("-inf"))
        peak = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - peak[:, None])
        shrink = tl.exp(most - peak)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights, vt)
        most = peak
    tl.store(out + rows[:, None] * HEAD_DIM + dims, sums / total[:, None], rows[:, None] < N_CTX)


def call(length, dim=32):
    q, k, v = torch.randn(3, length, dim)
    out = torch.empty_like(q)
    attend[lambda meta: (triton.cdiv(length, meta["BLOCK_M"]),)](q, k, v, out, length, dim)
    mine = torch.nn.functional.scaled_dot_product_attention(
        q[None, None], k[None, None], v[None, None], is_causal=True)
    torch.testing.assert_close(out, mine[0, 0], rtol=1e-4, atol=1e-4)
    best = attend.best_config
    return [*best.kwargs.values(), best.num_warps, best.num_stages]


def complaint(*arguments, **more):
    try:
        seed(*arguments, **more)
    except (TypeError, ValueError) as error:
        return str(error)


causal = {"tensors": 4, "rename": NAMES, "where": lambda shape: shape["causal"]}
said = {"triton": triton.__version__}
with warnings.catch_warnings(record=True) as met:
    warnings.simplefilter("always")
    said["seeded"] = [list(place) for place in seed(attend, KEY, **causal)]
    said["again"] = len(seed(attend, KEY, **causal))
said["warnings"] = [str(each.message) for each in met]
said["used"] = {length: call(length) for length in (96, 160)}
try:
    call(128)
    said["unseeded"] = "served"
except AssertionError as error:
    said["unseeded"] = str(error)
single = triton.autotune(configs=configs(NAMES)[:1], key=["N_CTX"])(attend.fn)
said["complaints"] = [
    complaint(attend.fn, KEY, **causal),
    complaint(single, KEY, **causal),
    complaint(attend, {"HEAD_DIM": "head_dim"}, **causal),
    complaint(attend, KEY, tensors=4, rename={**NAMES, "block_m": "TILE_M"}),
    complaint(attend, KEY, tensors=4, rename={"blockm": "BLOCK_M"}),
]
same = {**causal, "where": lambda shape: (shape["seqlen_q"], shape["causal"]) == (160, True)}
single = triton.autotune(configs=[config for config in configs(NAMES)
                                  if config.kwargs["BLOCK_M"] == 64], key=["N_CTX"])(attend.fn)
said["single"] = len(seed(single, KEY, **same))
said["kinds"] = [
    list(place) for place in seed(attend, {"N_CTX": lambda shape: 7, "HEAD_DIM": "head_dim_v"},
                                  tensors=[None, "float16"], rename=NAMES)]
print(json.dumps(said))
"""


def trials() -> list[Any]:
    """float32, which the interpreter computes right. 96 rows: two shapes that are one key."""
    some = {"split_loop": False, "num_warps": 4}
    versions = {"triton": "3.6.0"}
    return [
        tried("triton/fwd", name, us, tunables={**some, **values}, environment=versions)
        for name, us, values in (
            ("b1s96h1d32c-float32", 10.0, {"block_m": 32, "block_n": 16, "num_stages": 1}),
            ("b4s96h8d32c-float32", 80.0, {"block_m": 32, "block_n": 32, "num_stages": 2}),
            ("b1s160h1d32c-float32", 30.0, {"block_m": 64, "block_n": 16, "num_stages": 2}),
            ("b1s128h1d32f-float32", 20.0, {"block_m": 16, "block_n": 16, "num_stages": 1}),
        )
    ]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process met."""
    chosen = selection("triton-configs", *trials())
    out = written(tmp_path_factory.mktemp("triton-configs"), "triton-configs", chosen)
    (out / "kernel.py").write_text(KERNEL)
    done = subprocess.run(
        [sys.executable, "kernel.py"], cwd=out, capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_seeded_shapes_are_served_without_benchmarking(said: dict[str, Any]) -> None:
    kinds = ["torch.float32"] * 4
    assert said["seeded"] == [[160, 32, *kinds], [96, 32, *kinds]]
    assert said["again"] == 0
    assert said["single"] == 1  # an autotuner of this very config, which it uses unasked
    # block_m, block_n, num_warps, num_stages; of 96 rows that which takes longest counts
    assert said["used"] == {"96": [32, 32, 4, 2], "160": [64, 16, 4, 2]}
    assert said["unseeded"] == "benchmarked"
    assert said["kinds"] == [[7, 32, "torch.float32", "torch.float16"]]


def test_what_does_not_fit_the_kernel_is_named(said: dict[str, Any]) -> None:
    none, single, key, parameter, rename = said["complaints"]
    assert "@triton.autotune" in none
    assert "one config" in single
    assert "'N_CTX'" in key
    assert "seqlen_q" in key
    assert "TILE_M" in parameter
    assert "blockm" in rename


def test_another_triton_is_warned_of_and_this_one_is_not(said: dict[str, Any]) -> None:
    other = said["triton"].split(".")[:2] != ["3", "6"]
    assert [("3.6.0" in text) for text in said["warnings"]] == [True, True] * other


def test_another_gpu_is_warned_of_and_another_arch_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import triton

    environment = {"triton": triton.__version__}
    chosen = selection("triton-configs", tried("triton/fwd", environment=environment))
    [path] = written(tmp_path, "triton-configs", chosen, name="found").glob("*.py")
    monkeypatch.syspath_prepend(str(path.parent))
    import found

    tunables = installed().get("triton/fwd").tunables
    autotuner = SimpleNamespace(
        cache={}, keys=["seqlen_q"], arg_names=["seqlen_q", *tunables], configs=[None, None]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.warns(UserWarning, match="nothing is seeded"):
        assert found.seed(autotuner, {}, tensors=4) == {}
    assert autotuner.cache == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H20")
    with pytest.warns(UserWarning, match="NVIDIA H20"):
        assert len(found.seed(autotuner, {}, tensors=4)) == 1
    assert list(autotuner.cache) == [(1024, *["torch.bfloat16"] * 4)]


def test_winners_of_other_kernels_alone_are_refused() -> None:
    with (
        database(winners=(tried("cuda/fwd_sm80"),)) as db,
        pytest.raises(InvalidInput, match=r"tune --templates 'triton/\*'"),
    ):
        export.select(db, installed(), templates="triton/*", stand_ins=True)
