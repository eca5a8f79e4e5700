"""Is triton/fwd right? Its semantics on the CPU, in Triton's interpreter.

TRITON_INTERPRET decides what `triton.jit` returns, so a child process runs all the cases: this file
itself, as a script. fp16 and fp32 only: the interpreter multiplies bf16 by its bit patterns.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

TMA = {"loads": "tma", "split_loop": False}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    # name: (problem, config values and options of the call)
    "one tile": ("b1s64h2d64f-float32", {}),
    "ragged tiles": ("b2s100x130h2d64f-float32", {}),
    "causal": ("b1s131h2d64c-float32", {}),
    "causal, more keys": ("b1s70x201h2d64c-float16", {}),
    "causal, fewer keys: rows that see nothing": ("b1s201x70h2d64c-float32", {}),
    "one query, one key": ("b2s1h2d32c-float32", {}),
    "one query": ("b1s1x77h2d64c-float32", {}),
    "one key": ("b1s77x1h2d64c-float32", {}),
    "no keys": ("b1s5x0h2d32f-float32", {}),
    "no keys, causal": ("b1s5x0h2d32c-float32", {}),
    "no queries": ("b1s0x5h2d32f-float32", {}),
    "no batch": ("b0s5h2d32f-float32", {}),
    "grouped heads": ("b2s90h6/2d32c-float16", {}),
    "one key head": ("b1s90h4/1d32c-float32", {}),
    "packed heads": ("b2s1x77h8/2d64c-float16", {"pack_gqa": True}),
    "packed heads, several rows": ("b1s33x77h6/2d64c-float32", {"pack_gqa": True}),
    "packed heads, fewer keys": ("b1s33x17h4/1d32c-float32", {"pack_gqa": True}),
    "head_dim 24": ("b1s40h2d24c-float16", {}),
    "head_dim 40, unaligned": ("b1s40h2d40c-float16-unaligned", {}),
    "head_dim 96 in two": ("b1s70h2d96c-float32", {"split_dim": True}),
    "head_dim 200 in three": ("b1s65h1d200c-float32", {"split_dim": True}),
    "head_dim 256": ("b1s65h1d256c-float16", {}),
    "head_dim_v smaller": ("b1s70h2d192x128c-float16", {}),
    "head_dim_v larger": ("b1s70h2d32x80f-float32", {}),
    "split loop": ("b1s131x200h2d64c-float32", {"split_loop": True}),
    "split loop, ragged": ("b1s100x131h2d64f-float32", {"split_loop": True}),
    "branch": ("b1s131x200h2d64c-float16", {"split_loop": False}),
    "branch, ragged": ("b1s100x131h2d64f-float16", {"split_loop": False}),
    "branch, fewer keys": ("b1s201x70h2d64c-float16", {"split_loop": False}),
    "descriptors": ("b2s131h4/2d64c-float16", TMA),
    "descriptors, ragged": ("b1s100x131h2d40f-float16", TMA),
    "descriptors, no keys": ("b1s100x0h2d64c-float16", TMA),
    "descriptors, head_dim 136 in two": ("b1s70x150h2d136c-float16", {**TMA, "split_dim": True}),
    "persistent": ("b2s300h4/2d64f-float16", {**TMA, "ctas_per_sm": 2}),
    "persistent, several tiles each": (
        "b3s300h3d32f-float16",
        {**TMA, "ctas_per_sm": 2, "num_sms": 2},
    ),
    "heads in L2": ("b2s300h4/2d64c-float16", {**TMA, "head_order": "l2"}),
    "heads in L2, a few at a time": (
        "b3s300h6/2d32c-float16",
        {**TMA, "head_order": "l2", "l2_bytes": 200_000},
    ),
    "heads in L2, one at a time": (
        "b3s300h3d32c-float16",
        {**TMA, "head_order": "l2", "l2_bytes": 100_000},
    ),
    "tf32x3": ("b1s70h2d64c-float32", {"precision": "tf32x3", "block_n": 32}),
    "negative scale": ("b1s90x70h2d64c-float32", {"scale": -0.3}),
    "negative scale, branch": ("b1s90h2d64c-float16", {"scale": -0.3, "split_loop": False}),
    "scale 0": ("b1s90x70h2d64c-float32", {"scale": 0.0}),
    "large scores": ("b1s90h2d64c-float32", {"scale": 20.0}),
    "no lse": ("b1s90h2d64c-float16", {"lse": False}),
    "heads before rows in memory": ("b2s90h2d64c-float16", {"layout": "bhsd"}),
    "a slice of wider rows": ("b1s90h2d64c-float16", {"wider": 8}),
    "a slice at an odd address": ("b1s90h2d64c-float16-unaligned", {"wider": 3, "offset": 1}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path),
        "AUTOFLASH_CACHE_DIR": str(tmp_path_factory.mktemp("interpreted")),
    }
    child = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, results):
    result = results[case]
    assert "failure" not in result, result["failure"]
    # The rule of the FlashAttention tests: no more than twice the error of plain PyTorch in the
    # same precision, plus what rounding the reference itself costs.
    assert result["error"] <= 2 * result["torch_error"] + result["rounding"], result
    assert result["lse_error"] <= 1e-5, result
    assert result["same_infinities"], "lse is -inf exactly where a row sees no key"
    assert result["hidden_rows_are_zero"]


def run_case(name: str, wanted: dict[str, object]) -> dict[str, object]:
    import torch

    from autoflash import build
    from autoflash.codegen.catalog import installed
    from autoflash.config import Config
    from autoflash.device import KNOWN_GPUS
    from autoflash.problem import Problem

    problem, wanted = Problem.parse(name), dict(wanted)
    changes = {key: wanted.pop(key) for key in ("l2_bytes", "num_sms") if key in wanted}
    device = replace(KNOWN_GPUS["sm90"], **changes)
    scale = wanted.pop("scale", 1 / math.sqrt(problem.head_dim))
    wants_lse, layout = wanted.pop("lse", True), wanted.pop("layout", "bshd")
    wider, offset = wanted.pop("wider", 0), wanted.pop("offset", 0)
    template = installed().get("triton/fwd")
    values = {**template.default_config(problem, device), **wanted}
    if values["pack_gqa"]:
        values.update(block_m=16, num_warps=4, loads="pointers", block_n=64, split_loop=True)
    elif wanted.get("loads") != "tma" and values["loads"] == "tma":
        values.update(block_n=64)
    kernel = build.build(template.render(Config.of(template.name, values), problem, device), device)

    dtype = getattr(torch, problem.dtype)
    torch.manual_seed(0)

    def tensor(rows: int, heads: int, dim: int) -> torch.Tensor:
        shape = (rows, heads) if layout == "bshd" else (heads, rows)
        made = torch.randn(problem.batch, *shape, dim + wider).to(dtype)[..., offset : offset + dim]
        return made if layout == "bshd" else made.transpose(1, 2)

    q = tensor(problem.seqlen_q, problem.num_heads, problem.head_dim)
    k = tensor(problem.seqlen_k, problem.num_kv_heads, problem.head_dim)
    v = tensor(problem.seqlen_k, problem.num_kv_heads, problem.head_dim_v)
    out = tensor(problem.seqlen_q, problem.num_heads, problem.head_dim_v).fill_(math.nan)
    lse = torch.full((problem.batch, problem.num_heads, problem.seqlen_q), math.nan)
    kernel(q, k, v, out, lse if wants_lse else None, scale)
    if not out.numel():
        exact_out, exact_lse, plain = out.double(), lse.double(), out
    else:
        exact_out, exact_lse = formula(q, k, v, scale, problem.causal, torch.float64)
        plain, _ = formula(q, k, v, scale, problem.causal, dtype)
    if not wants_lse:
        assert lse.isnan().all()
        lse = exact_lse.float()
    hidden = exact_lse == -math.inf
    seen_lse = (lse.double() - exact_lse)[~hidden]

    def largest(x: torch.Tensor) -> float:
        x = x.abs().double()
        return float(x.max()) if x.numel() else 0.0

    return {
        "error": largest(out.double() - exact_out),
        "torch_error": largest(plain.double() - exact_out),
        "rounding": 2 * largest(exact_out.to(dtype).double() - exact_out),
        "lse_error": largest(seen_lse) / max(1.0, largest(exact_lse[~hidden])),
        "same_infinities": bool(torch.equal(lse == -math.inf, hidden)),
        "hidden_rows_are_zero": not out.transpose(1, 2)[hidden].count_nonzero().item(),
    }


def formula(q, k, v, scale, causal, dtype):
    """Attention by its definition, in `dtype`; (out, lse)."""
    import torch

    group = q.shape[2] // k.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k * scale)
    rows, keys = scores.shape[-2:]
    if causal:
        visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.double().logsumexp(-1)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def main() -> None:
    found = {}
    for case, (problem, wanted) in CASES.items():
        try:
            found[case] = run_case(problem, wanted)
        except Exception as error:  # one case must not hide the others
            found[case] = {"failure": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
