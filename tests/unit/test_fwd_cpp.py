"""Is the C++ forward right: against float64, for every shape, layout and instruction set."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autoflash import build
from autoflash.build import Kernel
from autoflash.codegen import catalog
from autoflash.config import Config
from autoflash.device import Device, for_arch
from autoflash.problem import Problem

CPU = for_arch("cpu")
TEMPLATE = catalog.installed().get("cpp/fwd")
DTYPES = ("float32", "bfloat16", "float16")
ATOL = {"float32": 2e-6, "bfloat16": 2e-3, "float16": 3e-4}
LSE_ATOL = {"float32": 1e-5, "bfloat16": 2e-5, "float16": 1e-5}

AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
ISAS = [isa for isa in ((), AVX2, AVX512, (*AVX512, "avx512_bf16")) if set(isa) <= set(CPU.isa)]


def built(problem: Problem, device: Device = CPU, **tunables: Any) -> Kernel:
    config = Config.of(TEMPLATE.name, {**TEMPLATE.default_config(problem, device), **tunables})
    return build.build(TEMPLATE.render(config, problem, device), device)


def of_shape(dtype: str, sq: int, sk: int, d: int, *, causal: bool = False, **more: Any) -> Problem:
    sizes: dict[str, Any] = {"batch": 2, "num_heads": 2, "num_kv_heads": 2, **more}
    return Problem(dtype=dtype, seqlen_q=sq, seqlen_k=sk, head_dim=d, causal=causal, **sizes)


def tensors(problem: Problem, layout: str, seed: int) -> list[torch.Tensor]:
    """q, k, v and an out full of NaN, contiguous in `layout`."""
    generator = torch.Generator().manual_seed(seed)
    p = problem

    def shape(seqlen: int, heads: int, dim: int) -> tuple[int, ...]:
        return (p.batch, seqlen, heads, dim) if layout == "bshd" else (p.batch, heads, seqlen, dim)

    shapes = [
        shape(p.seqlen_q, p.num_heads, p.head_dim),
        shape(p.seqlen_k, p.num_kv_heads, p.head_dim),
        shape(p.seqlen_k, p.num_kv_heads, p.head_dim_v),
    ]
    dtype = getattr(torch, p.dtype)
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    out = torch.full(shape(p.seqlen_q, p.num_heads, p.head_dim_v), math.nan, dtype=dtype)
    return [*inputs, out]


def visible_mask(problem: Problem) -> torch.Tensor:
    """(seqlen_q, seqlen_k): which keys each row sees."""
    sq, sk = problem.seqlen_q, problem.seqlen_k
    visible = torch.ones(sq, sk, dtype=torch.bool)
    right = 0 if problem.causal else problem.window_right
    if right is not None:
        visible = visible.tril(sk - sq + right)
    if problem.window_left is not None:
        visible = visible.triu(sk - sq - problem.window_left)
    return visible


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of bhsd tensors: out and lse in float64, and out by PyTorch in the tensors' own dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    sk, visible, softcap = k.shape[2], visible_mask(problem), problem.softcap
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1) if sk else torch.full(scores.shape[:3], -math.inf).double()
    out = torch.exp(scores - lse.clamp(min=-1e300)[..., None]) @ v.double()
    if not sk:
        return out, lse, out
    if softcap:
        capped = ((q @ (k * scale).transpose(-1, -2)) / softcap).tanh() * softcap
        weights = capped.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
        return out, lse, weights @ v
    some = visible.any(-1)  # PyTorch's answer for a row without a key is not ours
    low = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some[:, None], scale=scale)
    return out, lse, torch.where(some[:, None], low, 0.0)


def check(
    kernel: Kernel,
    problem: Problem,
    given: list[torch.Tensor],
    layout: str = "bshd",
    scale: float | None = None,
    with_lse: bool = True,
) -> None:
    p = problem
    scale = p.head_dim**-0.5 if scale is None else scale
    lse = torch.full((p.batch, p.num_heads, p.seqlen_q), math.nan) if with_lse else None
    kernel(*given, lse, scale, layout, problem=p)
    q, k, v, out = (x.transpose(1, 2) if layout == "bshd" else x for x in given)
    want, want_lse, low = expected(q, k, v, p, scale)
    assert not out.isnan().any(), f"{p.name}: NaN in out"
    if not out.numel():
        return
    error = (out.double() - want).abs().max().item()
    factor = 3 if p.softcapped else 2  # as in the FlashAttention tests
    allowed = factor * (low.double() - want).abs().max().item() + ATOL[p.dtype]
    assert error <= allowed, f"{p.name}: error {error:.2e}, allowed {allowed:.2e}"
    if lse is not None:
        assert torch.equal(lse.isneginf(), want_lse.isneginf()), f"{p.name}: rows without a key"
        some = ~want_lse.isneginf()
        torch.testing.assert_close(
            lse.double()[some], want_lse[some], atol=LSE_ATOL[p.dtype], rtol=1e-6
        )


HEAD_DIMS = [16, 24, 40, 64, 72, 80, 96, 104, 128, 136, 168, 192, 200, 248, 256]


@pytest.mark.parametrize("number", range(len(HEAD_DIMS)), ids=[f"d{d}" for d in HEAD_DIMS])
def test_head_dims(number: int) -> None:
    # Each head dim meets one dtype and mask; their neighbours meet the others.
    dtype, causal = DTYPES[number % 3], number % 2 == 0
    problem = of_shape(dtype, 113, 203, HEAD_DIMS[number], causal=causal)
    check(built(problem), problem, tensors(problem, "bshd", number))


@pytest.mark.parametrize(
    ("dtype", "d", "dv"), [("float32", 192, 128), ("bfloat16", 64, 40), ("float16", 24, 88),
                           ("bfloat16", 17, 33), ("float32", 1, 3)]
)  # fmt: skip
def test_value_rows_of_another_length(dtype: str, d: int, dv: int) -> None:
    problem = of_shape(dtype, 65, 131, d, head_dim_v=dv, causal=True)
    check(built(problem), problem, tensors(problem, "bshd", 1))


SEQLENS = [
    (1, 1), (1, 3), (3, 1), (1, 257), (31, 32), (33, 64), (64, 33), (64, 128), (127, 131),
    (131, 127), (239, 1), (108, 256), (384, 256), (257, 1023), (300, 7), (0, 5), (5, 0), (0, 0),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_lengths(dtype: str, causal: bool) -> None:
    kernel = built(of_shape(dtype, 64, 64, 64, causal=causal))
    for seed, (sq, sk) in enumerate(SEQLENS):
        problem = of_shape(dtype, sq, sk, 64, causal=causal)
        check(kernel, problem, tensors(problem, "bshd", seed))


WINDOWS = [
    # seqlen_q, seqlen_k, window_left, window_right
    (300, 300, 20, 30), (300, 300, 0, 0), (300, 300, 0, 5), (300, 300, 5, 0), (300, 300, 250, 1),
    (300, 300, None, 7), (300, 300, 7, None), (100, 700, 130, 9), (100, 700, 350, None),
    (700, 100, 9, 130), (700, 100, 5, 5), (700, 100, None, 3), (1, 400, 99, 0), (7, 400, 99, 3),
    (400, 1, 3, 9), (9, 0, 2, 2), (0, 9, 2, 2), (257, 263, 96, 48),
]  # fmt: skip


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows(dtype: str, prepack: bool) -> None:
    sizes = (200, 300) if not prepack else (300, 300)
    kernel = built(of_shape(dtype, *sizes, 64, window_left=9, window_right=9), prepack=prepack)
    for seed, (sq, sk, left, right) in enumerate(WINDOWS):
        problem = of_shape(dtype, sq, sk, 64, window_left=left, window_right=right)
        check(kernel, problem, tensors(problem, "bshd", seed))


@pytest.mark.parametrize("tunables", [{}, {"panels": 2}, {"prepack": True}], ids=str)
def test_windows_of_grouped_heads(tunables: dict[str, Any]) -> None:
    for sq, sk, left, right in ((1, 300, 70, 0), (37, 300, 70, 4), (120, 37, 7, 9)):
        problem = of_shape(
            "bfloat16", sq, sk, 32, num_heads=6, window_left=left, window_right=right
        )
        feasible = tunables if sq > 1 else {}
        check(built(problem, **feasible), problem, tensors(problem, "bshd", sq))


@pytest.mark.parametrize("prepack", [True, False])
def test_keys_far_outside_the_window_are_not_visited(prepack: bool) -> None:
    problem = of_shape("float32", 200, 1000, 64, window_left=100, window_right=50)
    kernel = built(problem, prepack=prepack, block_n=48, panels=1)
    q, k, v, out = tensors(problem, "bshd", 15)
    kernel(q, k, v, out, None, 0.1, problem=problem)
    room = int(TEMPLATE.default_config(problem, CPU)["vectors"]) * 16 + 48  # a panel and a tile
    rows = torch.arange(200)  # that see keys from row + 700 to row + 850
    for poisoned, clean, spoilt in (
        (slice(0, 750), rows + 700 - room >= 750, 0),
        (slice(970, None), rows + 850 + room < 970, 199),
    ):
        bad_k, bad_v, again = k.clone(), v.clone(), torch.full_like(out, math.nan)
        bad_k[:, poisoned] = bad_v[:, poisoned] = math.nan
        kernel(q, bad_k, bad_v, again, None, 0.1, problem=problem)
        assert again[:, spoilt].isnan().all(), "a row that sees poisoned keys"
        assert clean.any()
        assert torch.equal(again[:, clean], out[:, clean])


CAPS = (1e-20, 0.5, 5.0, 50.0, 1e6)


@pytest.mark.parametrize("isa", ISAS, ids=["+".join(isa[-1:]) or "plain" for isa in ISAS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcaps(dtype: str, isa: tuple[str, ...]) -> None:
    device = dataclasses.replace(CPU, isa=isa)
    kernel = built(of_shape(dtype, 75, 140, 72, causal=True, softcap=1.0), device)
    for seed, cap in enumerate(CAPS):
        problem = of_shape(dtype, 75, 140, 72, causal=True, softcap=cap)
        for scale in (None, -0.3, 0.0, 3.0):
            check(kernel, problem, tensors(problem, "bshd", seed), scale=scale)


@pytest.mark.parametrize("isa", ISAS, ids=["+".join(isa[-1:]) or "plain" for isa in ISAS])
def test_windows_with_a_softcap_on_instruction_sets(isa: tuple[str, ...]) -> None:
    device = dataclasses.replace(CPU, isa=isa)
    problem = of_shape("bfloat16", 140, 175, 40, window_left=30, window_right=11, softcap=9.0)
    check(built(problem, device), problem, tensors(problem, "bshd", 16))


def test_eight_bits_are_refused() -> None:
    problem = of_shape("float8_e4m3fn", 64, 64, 64)
    assert TEMPLATE.refusal(problem, CPU) == "op is fwd"


def test_no_batch() -> None:
    problem = of_shape("float32", 8, 8, 64, batch=0)
    check(built(problem), problem, tensors(problem, "bshd", 0))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (5, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_heads(dtype: str, heads: int, kv_heads: int, causal: bool) -> None:
    for sq, sk in ((1, 70), (37, 53), (53, 37)):
        problem = of_shape(dtype, sq, sk, 32, causal=causal, num_heads=heads, num_kv_heads=kv_heads)
        check(built(problem), problem, tensors(problem, "bshd", sq))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_any_base(dtype: str, layout: str) -> None:
    problem = of_shape(dtype, 45, 61, 40, causal=True, num_heads=4, num_kv_heads=2)
    views = []
    for x in tensors(problem, layout, 3):
        b, m, n, d = x.shape
        # A slice out of a larger tensor that starts one element off any alignment.
        room = torch.full((b, m + 2, n + 3, d + 5), math.nan, dtype=x.dtype)
        view = room[:, 1 : m + 1, 2 : n + 2, 1 : d + 1]
        view.copy_(x)
        views.append(view)
    surroundings = views[3]._base
    assert surroundings is not None
    surroundings.fill_(math.nan)
    check(built(problem), problem, views, layout)
    written = (~surroundings.isnan()).sum().item()
    assert written == views[3].numel(), "something was written beside out"


def test_a_broadcast_key() -> None:
    # A stride of 0: one key/value head that PyTorch shows as several.
    problem = of_shape("bfloat16", 20, 30, 64)
    q, k, v, out = tensors(problem, "bshd", 4)
    k, v = (x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))
    check(built(problem), problem, [q, k, v, out])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.2, 1.0, 1e-6])
def test_softmax_scale(dtype: str, scale: float) -> None:
    problem = of_shape(dtype, 70, 90, 64, causal=True)
    check(built(problem), problem, tensors(problem, "bshd", 5), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_grow_along_the_keys(dtype: str) -> None:
    # The running reference of the softmax must move many times, by little and by much.
    problem = of_shape(dtype, 33, 600, 64)
    q, k, v, out = tensors(problem, "bshd", 6)
    k *= torch.linspace(0, 12, 600).to(k.dtype)[None, :, None, None]
    check(built(problem), problem, [q, k, v, out])


def test_lse_is_optional() -> None:
    problem = of_shape("float32", 70, 90, 64)
    check(built(problem), problem, tensors(problem, "bshd", 7), with_lse=False)


def test_hidden_keys_and_what_lies_behind_the_tensors_have_no_influence() -> None:
    problem = of_shape("float32", 40, 50, 64, batch=1)
    given = tensors(problem, "bshd", 8)
    longer = [torch.full((1, 200, 2, 64), math.nan) for _ in range(2)]
    for room, x in zip(longer, given[1:3], strict=True):
        room[:, :50].copy_(x)
    check(built(problem), problem, [given[0], longer[0][:, :50], longer[1][:, :50], given[3]])


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(dtype: str, softcap: float) -> None:
    problem = of_shape(dtype, 40, 50, 64, softcap=softcap)
    q, k, v, out = tensors(problem, "bshd", 14)
    q[0, 7, 1, 5] = math.nan
    built(problem)(q, k, v, out, None, 0.125, problem=problem)
    spoilt = out.isnan()
    assert spoilt[0, 7, 1].all()
    spoilt[0, 7, 1] = False
    assert not spoilt.any()


@pytest.mark.parametrize("isa", ISAS, ids=["+".join(isa[-1:]) or "plain" for isa in ISAS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(dtype: str, isa: tuple[str, ...]) -> None:
    device = dataclasses.replace(CPU, isa=isa)
    problem = of_shape(dtype, 75, 140, 72, causal=True)
    kernel = built(problem, device)
    check(kernel, problem, tensors(problem, "bshd", 9))
    problem = of_shape(dtype, 140, 75, 72, causal=True)  # rows without a key
    check(kernel, problem, tensors(problem, "bshd", 10))


@pytest.mark.parametrize("isa", ISAS, ids=["+".join(isa[-1:]) or "plain" for isa in ISAS])
def test_the_default_is_always_feasible_and_the_space_modest(isa: tuple[str, ...]) -> None:
    device = dataclasses.replace(CPU, isa=isa)
    for sq in (0, 1, 7, 8, 9, 16, 17, 33, 64, 65, 100, 1024):
        for kv_heads in (1, 2, 8):
            for sk in (0, 1, 48, 49, 96, 97, 300):
                problem = of_shape("bfloat16", sq, sk, 64, num_heads=8, num_kv_heads=kv_heads)
                default = TEMPLATE.default_config(problem, device)
                assert TEMPLATE.broken(default, problem, device) is None, problem.name
    for text in ("b1s1024h8d64f", "b1s4096h8d64c", "b2s1x500h8/2d128c", "b1s48h8d64c-float32"):
        assert 12 <= len(TEMPLATE.space(Problem.parse(text), device)) <= 200, text


@pytest.mark.parametrize(
    ("seqlen_q", "mask"),
    [(100, {}), (257, {}), (257, {"window_left": 77, "softcap": 7.0})],
    ids=["packed for each block", "in any order", "window"],
)
def test_every_value_of_every_tunable(seqlen_q: int, mask: dict[str, Any]) -> None:
    problem = of_shape("bfloat16", seqlen_q, 300, 64, causal=True, **mask)
    given = tensors(problem, "bshd", 11)
    space = TEMPLATE.space(problem, CPU).configs
    left = {(name, value) for name, choices in TEMPLATE.tunables.items() for value in choices}
    left &= {pair for config in space for pair in config.pairs}
    while left:
        config = max(space, key=lambda c: len(left & set(c.pairs)))
        left -= set(config.pairs)
        given[3].fill_(math.nan)
        check(built(problem, **config), problem, given)


def test_more_heads_than_the_scratch_memory_holds() -> None:
    # 64 kv heads of 1 MiB each once packed: more than the 64 MiB that are kept, with V.
    problem = of_shape("float32", 3, 2048, 128, batch=2, num_heads=33, num_kv_heads=33)
    check(built(problem, prepack=True), problem, tensors(problem, "bshd", 12))


def test_calls_at_the_same_time() -> None:
    problem = of_shape("float32", 200, 300, 64)
    kernel = built(problem)
    given = [tensors(problem, "bshd", seed) for seed in range(4)]
    threads = [threading.Thread(target=kernel, args=(*g, None, 0.1)) for g in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [g[3].clone() for g in given]
    for g, out in zip(given, together, strict=True):
        kernel(*g, None, 0.1)
        assert torch.equal(g[3], out)


@pytest.mark.parametrize("num_threads", [0, 1, 3, 64])
def test_the_result_does_not_depend_on_the_number_of_threads(num_threads: int) -> None:
    from autoflash.codegen import ops

    problem = of_shape("bfloat16", 100, 100, 64, causal=True)
    kernel = built(problem)
    given = tensors(problem, "bshd", 13)
    kernel(*given, None, 0.125)
    other = torch.full_like(given[3], math.nan)
    launch = kernel.prepare(ops.fwd_scalars((*given[:3], other)))
    launch(*(x.data_ptr() for x in (*given[:3], other)), 0, 0.125, num_threads)
    assert torch.equal(given[3], other)
