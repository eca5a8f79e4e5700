"""flash-attn 2's functions: its signatures, and results by the definition of attention."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autoflash.compat import flash_attn
from autoflash.errors import InvalidInput, UnsupportedProblem
from autoflash.runtime import fallback, warn


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], softcap: float
) -> tuple[Tensor, Tensor]:
    """Out (seqlen, heads, dim) and lse (heads, seqlen) of one sequence, in float64."""
    seqlen_q, seqlen_k, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) / math.sqrt(q.shape[2])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    away = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = window
    right = 0 if causal else right
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    seen &= (away >= -left) if left >= 0 else True
    seen &= (away <= right) if right >= 0 else True
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=2)
    weights = torch.exp(scores - lse[..., None].nan_to_num(neginf=0.0))
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def packed(lengths: list[int], heads: int, seed: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    bounds = [0, *itertools.accumulate(lengths)]
    return torch.randn(bounds[-1], heads, dim), torch.tensor(bounds, dtype=torch.int32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Shapes of q and k in each call of autoflash.attention, all of which kernels must serve."""
    seen: list[tuple[Any, ...]] = []
    served = flash_attn.attention

    def count(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append((tuple(q.shape), tuple(k.shape)))
        return served(q, k, v, **options)

    def no_torch(*_: Any, **__: Any) -> None:
        raise AssertionError("PyTorch served")

    monkeypatch.setattr(flash_attn, "attention", count)
    monkeypatch.setattr(fallback, "attention", no_torch)
    return seen


def test_signatures_are_those_of_flash_attn() -> None:
    tail = (
        "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    )
    seqlens = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    for name, expected in {
        "flash_attn_func": f"(q, k, v, {tail})",
        "flash_attn_kvpacked_func": f"(q, kv, {tail})",
        "flash_attn_qkvpacked_func": f"(qkv, {tail})",
        "flash_attn_varlen_func": f"(q, k, v, {seqlens}, {tail}, block_table=None)",
    }.items():
        signature = inspect.signature(getattr(flash_attn, name))
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(7, 7), (1, 37), (33, 5), (5, 0)], ids=lambda n: str(n)
)
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(False, (-1, -1), 0.0), (True, (-1, -1), 0.0), (True, (4, 3), 0.0), (False, (2, 1), 2.0)],
)
def test_batches(
    calls: list[Any],
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(2, seqlen_q, 6, 16), torch.randn(2, seqlen_k, 2, 2, 16)
    out, lse, none = flash_attn.flash_attn_kvpacked_func(
        q, kv, causal=causal, window_size=window, softcap=softcap, return_attn_probs=True
    )
    assert none is None
    assert lse.shape == (2, 6, seqlen_q)
    for b in range(2):
        wanted = by_definition(q[b], *kv[b].unbind(1), causal, window, softcap)
        torch.testing.assert_close(out[b].double(), wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[b].double(), wanted[1], atol=1e-5, rtol=1e-5)
    # rows that see no key are told by the mask, not by the arithmetic
    assert (out[lse.transpose(1, 2) == -math.inf] == 0).all()
    assert len(calls) == 1


def test_one_tensor_of_all_and_rows_that_are_not_adjacent(calls: list[Any]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 11, 16, 4, 3).permute(0, 1, 4, 3, 2)  # head_dim is not the last stride
    q, k, v = qkv.unbind(2)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, None, True)
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, causal=True))
    wanted, _ = by_definition(q[1], k[1], v[1], True, (-1, -1), 0.0)
    torch.testing.assert_close(out[1].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "runs"),
    [
        ([5, 5, 5], [9, 9, 9], 1),
        ([4, 7, 7, 1], [4, 7, 7, 30], 3),
        ([3, 0, 3, 6], [5, 4, 5, 0], 3),  # no queries: its keys part two equal neighbours
        ([3, 0, 3], [5, 0, 5], 1),  # and where it has none, it does not
        ([9, 3], [2, 8], 2),  # causal: seven rows see nothing
        ([0, 0], [3, 4], 0),
        ([], [], 0),
    ],
)
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(False, (-1, -1), 0.0), (True, (-1, -1), 0.0), (True, (3, -1), 0.0)],
)
def test_packed_sequences(
    calls: list[Any],
    lengths_q: list[int],
    lengths_k: list[int],
    runs: int,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> None:
    (q, cu_q), (k, cu_k), (v, _) = (
        packed(lengths_q, 4, 0),
        packed(lengths_k, 2, 1),
        packed(lengths_k, 2, 2),
    )
    q = torch.cat([q, torch.randn(2, 4, 16)])  # rows that belong to no sequence
    out, lse, none = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max(lengths_q, default=0), 50,
        causal=causal, window_size=window, softcap=softcap, return_attn_probs=True,
    )  # fmt: skip
    assert none is None
    assert (out.shape, lse.shape) == (q.shape, (4, len(q)))
    assert out.is_contiguous()
    assert lse.is_contiguous()
    bounds = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (q0, q1), (k0, k1) in bounds:
        wanted = by_definition(q[q0:q1], k[k0:k1], v[k0:k1], causal, window, softcap)
        torch.testing.assert_close(out[q0:q1].double(), wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, q0:q1].double(), wanted[1], atol=1e-5, rtol=1e-5)
    end = sum(lengths_q)
    assert (out[end:] == 0).all()
    assert (lse[:, end:] == -math.inf).all()
    assert len(calls) == runs


def test_equal_lengths_are_not_copied() -> None:
    x, cu = packed([6, 6], 2, 0)
    lone = flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, 6, 6)
    batch = flash_attn.flash_attn_func(*[x.view(2, 6, 2, 16)] * 3)
    assert torch.equal(lone, batch.flatten(0, 1))
    assert lone.untyped_storage().nbytes() == lone.nbytes  # a view of one output, not a join


def test_gradients_are_those_of_each_sequence() -> None:
    x, cu = packed([4, 7], 2, 0)
    x.requires_grad_()
    warn.forget()
    with pytest.warns(RuntimeWarning, match="no backward kernels"):
        out = flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, 7, 7, causal=True)
    out.square().sum().backward()
    y = x.detach().double().requires_grad_()
    for start, end in itertools.pairwise(cu.tolist()):
        part = y[start:end]
        by_definition(part, part, part, True, (-1, -1), 0.0)[0].square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, r"dropout_p=0\.1: kernels of autoflash have no dropout"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes is of shape \(2,\)"),
        ({"block_table": torch.ones(2, 1, dtype=torch.int32)}, "no paged cache"),
    ],
)
def test_what_no_kernel_does(options: dict[str, Any], message: str) -> None:
    x, cu = packed([6, 6], 2, 0)
    with pytest.raises(UnsupportedProblem, match=message):
        flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, 6, 6, **options)
    if "block_table" not in options:
        with pytest.raises(UnsupportedProblem, match=message):
            flash_attn.flash_attn_func(*[x.view(2, 6, 2, 16)] * 3, **options)


def test_gradients_that_must_repeat_are_left_to_pytorchs_switch() -> None:
    x = torch.randn(1, 4, 2, 16, requires_grad=True)
    with pytest.raises(UnsupportedProblem, match="use_deterministic_algorithms"):
        flash_attn.flash_attn_func(x, x, x, deterministic=True)
    with torch.no_grad():  # the output repeats anyway
        assert flash_attn.flash_attn_func(x, x, x, deterministic=True).shape == x.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q": torch.ones(2, 6, 2, 16)}, r"q is of shape \(2, 6, 2, 16\); a packed tensor"),
        (
            {"cu_seqlens_q": torch.tensor([0, 6, 12])},
            r"q is torch\.int64 of shape \(3,\)",
        ),
        ({"cu_seqlens_q": [0, 6, 12]}, r"cu_seqlens_q is \[0, 6, 12\]; an int32 tensor"),
        (
            {"cu_seqlens_k": torch.tensor([0, 12], dtype=torch.int32)},
            "3 entries and",
        ),
        ({"cu_seqlens_k": torch.tensor([0, 6, 13], dtype=torch.int32)}, "beyond the 12 rows of k"),
        ({"cu_seqlens_q": torch.tensor([0, 7, 6], dtype=torch.int32)}, r"=\[0, 7, 6\] does not"),
        ({"cu_seqlens_q": torch.tensor([1, 6, 12], dtype=torch.int32)}, "does not start at 0"),
        ({"v": torch.ones(11, 2, 16)}, "k has 12 rows and v 11; each key needs a value"),
        ({"max_seqlen_k": 5}, "max_seqlen_k=5, but a sequence of cu_seqlens_k has 6 rows"),
    ],
)
def test_lengths_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    x, cu = packed([6, 6], 2, 0)
    good = {
        "q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu,
        "max_seqlen_q": 6, "max_seqlen_k": 6,
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        flash_attn.flash_attn_varlen_func(**{**good, **given})


def test_packed_tensors_of_another_shape() -> None:
    with pytest.raises(InvalidInput, match=r"kv is of shape \(1, 4, 2, 16\)"):
        flash_attn.flash_attn_kvpacked_func(torch.ones(1, 4, 2, 16), torch.ones(1, 4, 2, 16))
