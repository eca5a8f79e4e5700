"""Runs an exported package where there is no autoflash: `python exported.py PACKAGE < cases.json`.

Says of each case which rule and kernel serve it, how far the result is from one in float64, and how
far it may be: FlashAttention's rule, twice as far as PyTorch in the same precision.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import warnings
from typing import Any

import torch

FLOOR = {
    "float64": 1e-12,
    "float32": 1e-5,
    "float16": 2.5e-4,
    "bfloat16": 2e-3,
    "float8_e4m3fn": 2e-3,
}


def main(name: str) -> None:
    assert importlib.util.find_spec("autoflash") is None
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter import mend

        mend()
    package = importlib.import_module(name)
    assert not torch.cuda.is_initialized()
    print(json.dumps([served(package, case) for case in json.load(sys.stdin)]))


def served(package: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What became of one case: "q", "k" and "v" are shapes in "bshd"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(case.get("options", {}))
    torch.manual_seed(len(json.dumps(case)))
    q, k, v = (tensor(case[n], case["dtype"], device, case.get("pitch", 0)) for n in "qkv")
    descales = {}
    if case["dtype"].startswith("float8"):
        heads = (case["k"][0], case["k"][2])
        descales = {
            f"{n}_descale": 0.5 + torch.rand(heads, device=device) for n in "qkv"
        }  # fmt: skip
    given = (q, k, v)
    if options.get("layout") == "bhsd":
        given = tuple(x.transpose(1, 2).contiguous() for x in given)
    function = package.attention
    if case.get("compiled"):
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out, lse = function(*given, return_lse=True, **options, **descales)
        alone = function(*given, **options, **descales)
    if device == "cuda":
        torch.cuda.synchronize()
    assert out.is_contiguous()
    asked = importlib.import_module(f"{package.__name__}._attention")
    window = tuple(options.get("window_size") or (None, None))
    problem = asked.problem_of(
        *given, options.get("causal", False), window, options.get("softcap", 0.0),
        options.get("layout", "bshd"),
    )  # fmt: skip
    choice = next(asked.choices(problem), ("torch", ""))
    if any("PyTorch serves" in str(each.message) for each in said):
        choice = ("torch", "")
    if options.get("layout") == "bhsd":
        out, alone = out.transpose(1, 2), alone.transpose(1, 2)
    named = {"q": q, "k": k, "v": v}
    wide = [dequantised(x, descales.get(f"{name}_descale")) for name, x in named.items()]
    exact, exact_lse = formula(*wide, **options)
    kept = torch.bfloat16 if descales else q.dtype
    rounded, _ = formula(*(x.to(kept) for x in wide), **options)
    finite = exact_lse.isfinite()
    assert torch.equal(finite, lse.isfinite()), "other rows see nothing"
    assert bool((out.transpose(1, 2)[~finite] == 0).all()), "a row that sees nothing is not 0"
    scale = exact.abs().max().item() if exact.numel() else 0.0
    rule = 8.0 if descales else 3.0 if options.get("softcap") else 2.0
    return {
        "rule": choice[0],
        "kernel": choice[1],
        "error": max(largest(out - exact), largest(alone - exact)),
        "allowed": rule * largest(rounded - exact) + FLOOR[case["dtype"]] * scale,
        "lse_error": largest((lse - exact_lse)[finite]),
        "said": [str(each.message) for each in said],
    }


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def tensor(shape: list[int], dtype: str, device: str, pitch: int) -> torch.Tensor:
    """Normal values; rows are `pitch` elements longer than they need be."""
    wide = torch.randn(*shape[:3], shape[3] + pitch, device=device)
    return wide.to(getattr(torch, dtype))[..., : shape[3]]


def dequantised(x: torch.Tensor, descale: torch.Tensor | None) -> torch.Tensor:
    wide = x.double()
    if descale is None:
        return wide
    factors = descale.double().repeat_interleave(x.shape[2] // descale.shape[1], 1)
    return wide * factors[:, None, :, None]


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    window_size: Any = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    layout: str = "bshd",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, (batch, seqlen, heads, dim), in the dtype that is given."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)) * (softmax_scale or q.shape[3] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    keys = torch.arange(k.shape[2], device=q.device)
    left, right = window_size or (None, None)
    right = 0 if causal else right
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if right not in (None, -1):
        hidden |= keys > rows + right
    if left not in (None, -1):
        hidden |= keys < rows - left
    scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.softmax(scores, 3).nan_to_num() @ v
    return out.transpose(1, 2), torch.logsumexp(scores, 3)


if __name__ == "__main__":
    main(sys.argv[1])
