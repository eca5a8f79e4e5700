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
    "window": ("b2s150h2d64fw40x30-float32", {"split_loop": True, "block_n": 16}),
    "window, branch": ("b1s150h2d64fw40x30-float16", {"split_loop": False}),
    "window, left side": ("b1s150h2d32cw20-float32", {"split_loop": True, "block_n": 16}),
    "window, branch, left side": ("b1s150h2d32fw20xinf-float16", {"split_loop": False}),
    "window, right side": ("b1s150h2d32fwinfx20-float32", {}),
    "window of one key": ("b1s70h2d32cw0-float32", {}),
    "window to the right of the diagonal": ("b1s70h2d32fw0x9-float16", {}),
    "window, more keys": ("b1s60x250h2d32fw70x5-float32", {"block_n": 16}),
    "window, more keys, branch": ("b1s60x250h2d32cw100-float16", {"split_loop": False}),
    "window, fewer keys: rows that see nothing": ("b1s250x60h2d32fw9x7-float32", {}),
    "window, fewer keys, branch": ("b1s250x60h2d32fw9x7-float16", {"split_loop": False}),
    "window, what it hides is not read": (
        "b1s300x400h1d32fw50x40-float32",
        {"split_loop": True, "block_n": 16, "poison": True},
    ),
    "window, what it hides is not read, branch": (
        "b1s300x400h1d32cw50-float16",
        {"split_loop": False, "poison": True},
    ),
    "window within tiles": ("b1s300h1d32fw3x2-float16", {"block_n": 128}),
    "window, no keys": ("b1s9x0h2d32fw3x2-float16", {}),
    "window, one query": ("b2s1x300h2d64cw99-float16", {}),
    "window, packed heads": ("b2s1x300h8/2d64cw99-float16", {"pack_gqa": True}),
    "window, packed heads, several rows": ("b1s33x77h6/2d32fw9x4-float32", {"pack_gqa": True}),
    "window, descriptors": ("b2s200h4/2d64fw50x11-float16", TMA),
    "window, descriptors, three loops": (
        "b1s200x250h2d40cw90-float16",
        {**TMA, "split_loop": True},
    ),
    "window, persistent": ("b2s300h2d32cw60-float16", {**TMA, "ctas_per_sm": 2, "num_sms": 2}),
    "window, heads in L2": (
        "b3s300h3d32cw77-float16",
        {**TMA, "head_order": "l2", "l2_bytes": 200_000},
    ),
    "window, unaligned": ("b1s90h2d40fw20x9-float16-unaligned", {}),
    "window, negative scale": ("b1s90x70h2d64fw20x9-float32", {"scale": -0.3}),
    "softcap": ("b1s131h2d64ccap5-float32", {}),
    "softcap, branch": ("b1s100x131h2d64fcap50-float16", {"split_loop": False}),
    "softcap that bends nothing": ("b1s90h2d64ccap100000-float32", {}),
    "softcap that flattens all": ("b1s90h2d64ccap1e-20-float32", {}),
    "softcap, large scores": ("b1s90h2d64ccap30-float32", {"scale": 20.0}),
    "softcap, large scores, branch": (
        "b1s90h2d64ccap30-float16",
        {"scale": 20.0, "split_loop": False},
    ),
    "softcap, negative scale": ("b1s90x70h2d64ccap2-float32", {"scale": -0.3}),
    "softcap, scale 0": ("b1s90x70h2d64ccap2-float32", {"scale": 0.0}),
    "softcap, no keys": ("b1s5x0h2d32fcap2-float32", {}),
    "softcap, window, packed heads": ("b1s9x300h8/2d64cw99cap5-float16", {"pack_gqa": True}),
    "softcap, window, descriptors": ("b1s200x150h2d64fw30x20cap5-float16", TMA),
    "softcap, window, tf32x3": (
        "b1s70h2d64fw30x20cap15-float32",
        {"precision": "tf32x3", "block_n": 32},
    ),
    "parts": ("b1s70x600h2d64f-float32", {"num_splits": 0}),
    "parts, branch": ("b1s70x600h2d64f-float16", {"num_splits": 0, "split_loop": False}),
    "parts, causal": ("b2s70x600h2d64c-float32", {"num_splits": 0}),
    "parts, causal, branch": ("b1s70x600h2d64c-float16", {"num_splits": 0, "split_loop": False}),
    "parts, causal, some of them empty": ("b1s520h1d32c-float32", {"num_splits": 0}),
    "parts, fewer keys: rows that see nothing": ("b1s600x512h1d32c-float32", {"num_splits": 0}),
    "parts, three of them": ("b1s70x600h2d64c-float16", {"num_splits": 0, "num_sms": 4}),
    "parts, one for each key tile": ("b1s5x512h2d32f-float32", {"num_splits": 0}),
    "parts, as many as the sizes say": ("b2s1x777h8/2d64f-float16", {"num_splits": 0}),
    "parts, one as the sizes say": (
        "b2s1x9h8/2d64f-float16",
        {"num_splits": 0, "rendered_for": "b2s1x777h8/2d64f-float16"},
    ),
    "parts, no keys": (
        "b1s5x0h2d32c-float32",
        {"num_splits": 0, "rendered_for": "b1s5x600h2d32c-float32"},
    ),
    "parts, no queries": (
        "b1s0x5h2d32c-float32",
        {"num_splits": 0, "rendered_for": "b1s5x600h2d32c-float32"},
    ),
    "parts, one query": ("b2s1x600h2d64c-float16", {"num_splits": 0}),
    "parts, packed heads": ("b2s1x600h8/2d64c-float16", {"pack_gqa": True, "num_splits": 0}),
    "parts, packed heads, several rows": (
        "b1s7x600h6/2d64c-float32",
        {"pack_gqa": True, "num_splits": 0},
    ),
    "parts, no lse": ("b1s9x600h2d64c-float16", {"num_splits": 0, "lse": False}),
    "parts, heads before rows": ("b2s9x600h2d64c-float16", {"num_splits": 0, "layout": "bhsd"}),
    "parts, unaligned": (
        "b1s9x600h2d40c-float16-unaligned",
        {"num_splits": 0, "wider": 3, "offset": 1},
    ),
    "parts, head_dim 96 in two": ("b1s70x600h2d96c-float32", {"num_splits": 0, "split_dim": True}),
    "parts, head_dim_v 24": ("b1s9x600h2d64x24c-float32", {"num_splits": 0}),
    "parts, negative scale": ("b1s70x600h2d64c-float32", {"num_splits": 0, "scale": -0.3}),
    "parts, large scores": ("b1s70x600h2d64c-float32", {"num_splits": 0, "scale": 20.0}),
    "parts, softcap": ("b1s70x600h2d64ccap5-float32", {"num_splits": 0}),
    "parts, descriptors": ("b1s70x600h4/2d64c-float16", {**TMA, "num_splits": 0}),
    "parts, window": ("b1s70x600h2d32fw200x30-float32", {"num_splits": 0, "block_n": 16}),
    "parts, window, branch": (
        "b1s70x1200h2d32cw700-float16",
        {"num_splits": 0, "split_loop": False},
    ),
    "parts, window, one for each key tile": ("b1s9x600h2d32cw300-float32", {"num_splits": 0}),
    "parts, window, fewer keys": ("b1s600x520h1d32fw400x30-float32", {"num_splits": 0}),
    "parts, window, packed heads": (
        "b2s3x900h8/2d64cw800cap9-float16",
        {"pack_gqa": True, "num_splits": 0},
    ),
    "parts, window, what it hides is not read": (
        "b1s100x600h1d32fw150x40-float32",
        {"split_loop": True, "block_n": 16, "num_splits": 0, "poison": True},
    ),
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
    # same precision, or three times with a softcap, plus what rounding the reference itself costs.
    factor = 3 if "softcap" in case else 2
    assert result["error"] <= factor * result["torch_error"] + result["rounding"], result
    assert result["lse_error"] <= 1e-5, result
    assert result["same_infinities"], "lse is -inf exactly where a row sees no key"
    assert result["hidden_rows_are_zero"]
    assert result["poison"] == "harmless"
    if case.startswith("parts"):
        wanted = {"three of them": 3, "one as the sizes say": 1, "no keys": 1, "no queries": 1}
        assert result["parts"] == wanted.get(case.removeprefix("parts, "), max(2, result["parts"]))


def test_eight_bits_are_refused():
    from autoflash.codegen.catalog import installed
    from autoflash.device import KNOWN_GPUS
    from autoflash.problem import Problem

    problem = Problem.parse("b1s64h2d64f-float8_e4m3fn")
    assert installed().get("triton/fwd").refusal(problem, KNOWN_GPUS["sm90"]) == "op is fwd"


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
    poison = wanted.pop("poison", False)
    template = installed().get("triton/fwd")
    described = Problem.parse(wanted.pop("rendered_for", name))
    values = {**template.default_config(described, device), **wanted}
    if values["pack_gqa"] and not template.default_config(described, device)["pack_gqa"]:
        values.update(block_m=16, num_warps=4, loads="pointers", block_n=64, split_loop=True)
    elif wanted.get("loads") != "tma" and values["loads"] == "tma":
        values.update({"block_n": 64, **wanted})
    config = Config.of(template.name, values)
    kernel = build.build(template.render(config, described, device), device)

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
    kernel(q, k, v, out, lse if wants_lse else None, scale, problem=problem)
    if not out.numel():
        exact_out, exact_lse, plain = out.double(), lse.double(), out
    else:
        exact_out, exact_lse = formula(q, k, v, scale, problem, torch.float64)
        plain, _ = formula(q, k, v, scale, problem, dtype)
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
        "parts": parts_of(kernel, problem) if values["num_splits"] == 0 else 1,
        "poison": poisoned(kernel, problem, values, q, k, v, out, scale) if poison else "harmless",
    }


def parts_of(kernel, problem) -> int:
    window = (problem.window_left, 0 if problem.causal else problem.window_right)
    _, parts = kernel._module.tiles_and_parts(
        problem.batch, problem.seqlen_q, problem.seqlen_k, problem.num_heads,
        problem.num_kv_heads, *(window if problem.local else ()),
    )  # fmt: skip
    return parts


def poisoned(kernel, problem, values, q, k, v, wanted, scale) -> str:
    """Whether tiles of rows are as before with NaN in all the key tiles that none of them sees."""
    import torch

    block_m, block_n = values["block_m"], values["block_n"]
    offset = problem.seqlen_k - problem.seqlen_q
    right = 0 if problem.causal else problem.window_right
    for first in range(0, problem.seqlen_q, block_m):
        last = min(first + block_m, problem.seqlen_q) - 1
        begin = max(first + offset - problem.window_left, 0) // block_n * block_n
        end = -(-(last + offset + right + 1) // block_n) * block_n
        bad_k, bad_v, out = k.clone(), v.clone(), torch.full_like(wanted, math.nan)
        for bad in (bad_k, bad_v):
            bad[:, :begin] = bad[:, end:] = math.nan
        kernel(q, bad_k, bad_v, out, None, scale, problem=problem)
        if not torch.equal(out[:, first : last + 1], wanted[:, first : last + 1]):
            return f"rows {first} to {last} read keys before {begin} or from {end} on"
    return "harmless"


def formula(q, k, v, scale, problem, dtype):
    """Attention by its definition, in `dtype`; (out, lse)."""
    import torch

    group = q.shape[2] // k.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k * scale)
    if problem.softcapped:
        scores = (scores / problem.softcap).tanh() * problem.softcap
    rows, keys = scores.shape[-2:]
    visible = torch.ones(rows, keys, dtype=torch.bool)
    right = 0 if problem.causal else problem.window_right
    if right is not None:
        visible = visible.tril(keys - rows + right)
    if problem.window_left is not None:
        visible = visible.triu(keys - rows - problem.window_left)
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
