"""PyTorch's attention with our semantics: masks, softcap, gradients, and memory within a bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoflash.runtime import fallback

WINDOWS = [(None, None), (0, 0), (2, None), (None, 0), (None, 1), (3, 2), (0, 4), (50, 50)]
SIZES = [(1, 1), (1, 6), (6, 1), (5, 5), (5, 9), (9, 5), (12, 3), (0, 4), (4, 0)]


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: tuple[int | None, int | None],
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, heads, seqlen, dim) and lse (batch, heads, seqlen) in float64, row by row."""
    q, k, v = q.double(), k.double(), v.double()
    group, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        seen = [
            j
            for j in range(k.shape[2])
            if (window[0] is None or j >= i + offset - window[0])
            and (window[1] is None or j <= i + offset + window[1])
        ]
        if not seen:
            continue
        scores = k[b, h // group, seen] @ q[b, h, i] * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        lse[b, h, i] = torch.logsumexp(scores, 0)
        out[b, h, i] = torch.softmax(scores, 0) @ v[b, h // group, seen]
    return out, lse


def tensors(
    seqlen_q: int, seqlen_k: int, dtype: torch.dtype = torch.float32, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((4, seqlen_q, 8), (2, seqlen_k, 8), (2, seqlen_k, 12))
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    return q, k, v


def serve(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Any, softcap: float, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    options = {"causal": False, "softmax_scale": 0.4, "return_lse": True, **options}
    return fallback.attention(q, k, v, layout="bhsd", window=window, softcap=softcap, **options)


@pytest.fixture(params=[None, 200, 1], ids=["whole", "parts", "rows"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Scores at once: all, some rows of all heads, or less than a row."""
    if request.param is not None:
        monkeypatch.setattr(fallback, "_SCORES_AT_ONCE", request.param)
        monkeypatch.setattr(fallback, "_FEWEST_ROWS", 4)
    return request.param


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_every_mask(
    seqlen_q: int, seqlen_k: int, window: tuple[int | None, int | None], softcap: float
) -> None:
    q, k, v = tensors(seqlen_q, seqlen_k)
    wanted, wanted_lse = by_definition(q, k, v, window, softcap, 0.4)
    out, lse = serve(q, k, v, window, softcap)
    assert lse is not None
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)
    alone, none = serve(q, k, v, window, softcap, return_lse=False)
    assert none is None
    assert torch.equal(alone, out)


def test_causal_bounds_the_right_side() -> None:
    q, k, v = tensors(6, 9)
    for window in ((2, None), (2, 5), (2, 0)):
        out, _ = serve(q, k, v, window, 0.0, causal=True)
        wanted, _ = by_definition(q, k, v, (2, 0), 0.0, 0.4)
        torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window", [(None, None), (3, 2), (0, 0), (None, 1), (2, None)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 9), (9, 5), (6, 6)])
def test_gradients(
    seqlen_q: int, seqlen_k: int, window: tuple[int | None, int | None], softcap: float
) -> None:
    inputs = tensors(seqlen_q, seqlen_k, torch.float64)
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
    out, lse = serve(q, k, v, window, softcap)
    assert lse is not None
    seen = torch.isfinite(lse.detach())
    into_out, into_lse = torch.randn_like(out), torch.randn_like(lse)
    ((out * into_out).sum() + (lse[seen] * into_lse[seen]).sum()).backward()
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    wanted, wanted_lse = by_definition(exact[0], exact[1], exact[2], window, softcap, 0.4)
    ((wanted * into_out).sum() + (wanted_lse[seen] * into_lse[seen]).sum()).backward()
    for got, reference in zip((q, k, v), exact, strict=True):
        assert got.grad is not None
        # The lse is float32.
        torch.testing.assert_close(got.grad, reference.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_softcap_loses_no_precision_before_the_result(dtype: torch.dtype) -> None:
    q, k, v = tensors(17, 33, dtype)
    out, lse = serve(q, k, v, (8, None), 2.0)
    wanted, wanted_lse = by_definition(q, k, v, (8, None), 2.0, 0.4)
    assert lse is not None
    assert out.dtype == dtype
    half_a_unit = wanted.abs() * torch.finfo(dtype).eps / 2
    assert ((out.double() - wanted).abs() <= half_a_unit + 1e-5).all()
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("window", "softcap"), [((None, None), 2.0), ((7, 0), 0.0), ((7, 0), 2.0), ((None, 3), 0.0)]
)
def test_memory_is_bounded(
    window: tuple[int | None, int | None],
    softcap: float,
    gradients: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 256 x 256 scores of 4 heads are 2**18 elements; q has 8192.
    monkeypatch.setattr(fallback, "_SCORES_AT_ONCE", 1 << 15)
    monkeypatch.setattr(fallback, "_FEWEST_ROWS", 16)
    q, k, v = (x.requires_grad_(gradients) for x in tensors(256, 256))
    kept: dict[int, int] = {}  # by address: parts keep views of the same keys

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, lse = serve(q, k, v, window, softcap)
        assert lse is not None
        if gradients:
            (out.sum() + lse.sum()).backward()
    assert largest.elements <= 1 << 15
    # Inputs, with heads repeated, and outputs, where scores would be kept several times.
    assert sum(kept.values()) < 1 << 16
    assert gradients == (len(kept) > 0)


def test_a_narrow_window_costs_no_more_than_it_shows() -> None:
    seen = list(fallback._parts(10_000, 10_000, 127, 0, 1 << 26))
    pairs = sum((r.stop - r.start) * (c.stop - c.start) for r, c in seen)
    assert [rows.start for rows, _ in seen] == [0, *(rows.stop for rows, _ in seen[:-1])]
    assert seen[-1][0].stop == 10_000
    assert pairs < 4 * 128 * 10_000
    assert len(seen) == 40


def test_eight_bits_stand_for_what_is_stored_times_a_factor() -> None:
    q, k, v = tensors(5, 7, torch.float8_e4m3fn, batch=2)
    factors = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    for descales in ((None, None, None), tuple(factors), (factors[0], None, factors[2])):
        out, lse = serve(q, k, v, (3, 1), 1.5, descales=descales)
        exact = []
        for x, factor in zip((q, k, v), descales, strict=True):
            per_head = 1.0 if factor is None else factor.double()
            if factor is not None:
                per_head = per_head.repeat_interleave(x.shape[1] // 2, 1)[:, :, None, None]
            exact.append(x.double() * per_head)
        wanted, wanted_lse = by_definition(exact[0], exact[1], exact[2], (3, 1), 1.5, 0.4)
        assert out.dtype == torch.bfloat16
        assert lse is not None
        torch.testing.assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-2, rtol=1e-2)
