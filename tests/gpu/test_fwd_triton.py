"""Is triton/fwd right on the device found here? All it promises, by the FlashAttention rule."""

from __future__ import annotations

import math
import random

import pytest

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.problem import Problem

pytestmark = pytest.mark.gpu

LENGTHS = [
    (1, 1), (3, 3), (64, 128), (239, 1), (1, 239), (113, 203), (128, 217), (384, 256),
    (1023, 1024), (1024, 1023), (2048, 2048), (5, 0), (0, 5), (17, 4000),
]  # fmt: skip
DTYPES = ["bfloat16", "float16", "float32"]


def visible_mask(problem, torch):
    offset = problem.seqlen_k - problem.seqlen_q
    mask = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool, device="cuda")
    right = 0 if problem.causal else problem.window_right
    if right is not None:
        mask = mask.tril(offset + right)
    if problem.window_left is not None:
        mask = mask.triu(offset - problem.window_left)
    return mask


def formula(q, k, v, scale, problem, dtype):
    """Attention by its definition in `dtype`, heads second: (out, lse)."""
    import torch

    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    k = k.repeat_interleave(problem.group_size, 1)
    v = v.repeat_interleave(problem.group_size, 1)
    scores = q @ (k * scale).transpose(-1, -2)
    if problem.softcapped:
        scores = (scores / problem.softcap).tanh() * problem.softcap
    scores = scores.masked_fill(~visible_mask(problem, torch), -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0) if problem.seqlen_k else scores
    return weights @ v, scores.double().logsumexp(-1)


def check(problem: Problem, config: Config, *, scale=None, layout="bshd", wider=0, lse=True):
    import torch

    template, here = installed().get("triton/fwd"), device.native()
    kernel = build.build(template.render(config, problem, here), here)
    dtype = getattr(torch, problem.dtype)
    scale = 1 / math.sqrt(problem.head_dim) if scale is None else scale
    torch.manual_seed(0)

    def tensor(rows, heads, dim):
        shape = (rows, heads) if layout == "bshd" else (heads, rows)
        made = torch.randn(problem.batch, *shape, dim + wider, device="cuda").to(dtype)
        made = made[..., wider : wider + dim]
        return made if layout == "bshd" else made.transpose(1, 2)

    q = tensor(problem.seqlen_q, problem.num_heads, problem.head_dim)
    k = tensor(problem.seqlen_k, problem.num_kv_heads, problem.head_dim)
    v = tensor(problem.seqlen_k, problem.num_kv_heads, problem.head_dim_v)
    out = tensor(problem.seqlen_q, problem.num_heads, problem.head_dim_v).fill_(math.nan)
    got_lse = torch.full(
        (problem.batch, problem.num_heads, problem.seqlen_q), math.nan, device="cuda"
    )
    kernel(q, k, v, out, got_lse if lse else None, scale, problem=problem)
    torch.cuda.synchronize()
    if not out.numel():
        return
    exact, exact_lse = formula(q, k, v, scale, problem, torch.float64)
    plain, _ = formula(q, k, v, scale, problem, dtype)
    got = out.transpose(1, 2)
    rounding = 2 * ((exact.to(dtype) + 0.3 - 0.3).double() - exact).abs().max()  # as FA3 does
    factor = 3 if problem.softcapped else 2  # as the FlashAttention tests allow
    allowed = factor * (plain.double() - exact).abs().max() + rounding
    if dtype == torch.float32:  # PyTorch is right to the last bit on one row; exp2 on a GPU is not
        allowed += 1e-6 * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"{problem.name} {config}: {error:.3g} > {allowed:.3g}"
    hidden = exact_lse == -math.inf
    assert not got[hidden].count_nonzero()
    if lse:
        assert torch.equal(got_lse == -math.inf, hidden)
        torch.testing.assert_close(
            got_lse[~hidden].double(), exact_lse[~hidden], rtol=1e-5, atol=1e-5
        )
    else:
        assert got_lse.isnan().all()


def default(problem: Problem, **values) -> Config:
    template = installed().get("triton/fwd")
    config = template.default_config(problem, device.native())
    return Config.of(template.name, {**config, **values})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", "cf")
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_lengths(seqlen_q, seqlen_k, mask, dtype):
    problem = Problem.parse(f"b2s{seqlen_q}x{seqlen_k}h4/2d64{mask}-{dtype}")
    check(problem, default(problem))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_head_dims(head_dim, dtype):
    problem = Problem.parse(f"b1s300x333h2d{head_dim}c-{dtype}")
    check(problem, default(problem))


@pytest.mark.parametrize("dims", ["192x128", "64x256", "40x24", "16x128", "128x72"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dim_v(dims, dtype):
    problem = Problem.parse(f"b1s300x333h2d{dims}c-{dtype}")
    check(problem, default(problem))


@pytest.mark.parametrize("heads", ["6/6", "6/2", "6/1", "16/2"])
@pytest.mark.parametrize("seqlen_q", [1, 7, 300])
def test_groups(heads, seqlen_q):
    problem = Problem.parse(f"b2s{seqlen_q}x333h{heads}d128c")
    check(problem, default(problem))


@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-3, 5.0])
@pytest.mark.parametrize("split_loop", [True, False])
def test_scales(scale, split_loop):
    problem = Problem.parse("b1s300x333h2d64c")
    if not split_loop and device.native().capability // 10 not in (9, 10):
        pytest.skip("the branch is for wgmma and tcgen05")
    check(problem, default(problem, split_loop=split_loop), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "wider", "aligned"), [("bhsd", 0, True), ("bshd", 8, True), ("bshd", 3, False)]
)
def test_strides(layout, wider, aligned, dtype):
    suffix = "" if aligned else "-unaligned"
    problem = Problem.parse(f"b2s200x333h4/2d64c-{dtype}{suffix}")
    check(problem, default(problem), layout=layout, wider=wider)


WINDOWS = ["w64", "w0", "w1000", "wx", "w40x25", "w0x17", "w17x0", "winfx33", "w500x1"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", ["300", "513x700", "700x200", "1x900", "9x900", "5x0", "2x1"])
def test_windows(lengths, window, dtype):
    if window == "wx":  # any, other for every case
        pick = random.Random(f"{lengths} {dtype}")
        window = f"w{pick.randrange(600)}x{pick.randrange(600)}"
    mask = f"f{window}" if "x" in window else f"c{window}"
    problem = Problem.parse(f"b2s{lengths}h4/2d64{mask}-{dtype}")
    check(problem, default(problem))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 96, 128, 136, 192, 200, 256])
def test_head_dims_with_a_window_and_a_softcap(head_dim, dtype):
    problem = Problem.parse(f"b1s300x333h2d{head_dim}fw60x31cap20-{dtype}")
    check(problem, default(problem))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", ["1e-20", "0.5", "5", "50", "1e6"])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0, 4.0])
def test_softcaps(scale, cap, dtype):
    problem = Problem.parse(f"b1s300x333h2d64ccap{cap}-{dtype}")
    check(problem, default(problem), scale=scale)


@pytest.mark.parametrize("heads", ["6/6", "6/2", "6/1", "16/2"])
@pytest.mark.parametrize("seqlen_q", [1, 7, 300])
def test_groups_with_a_window(seqlen_q, heads):
    problem = Problem.parse(f"b2s{seqlen_q}x777h{heads}d128cw200cap30")
    check(problem, default(problem))


@pytest.mark.parametrize("split_loop", [True, False])
@pytest.mark.parametrize("loads", ["pointers", "tma"])
@pytest.mark.parametrize("mask", ["cw150", "fw150x90", "fw150x90cap15", "ccap15"])
def test_every_way_through_a_window(mask, loads, split_loop):
    if device.native().capability // 10 not in (9, 10):
        pytest.skip("these tiles are for wgmma and tcgen05")
    problem = Problem.parse(f"b2s700x800h4/2d64{mask}")
    tile = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
    check(problem, default(problem, **tile, loads=loads, split_loop=split_loop, head_order="rows"))
    if "c" in mask[:1]:
        check(problem, default(problem, **tile, loads=loads, split_loop=split_loop,
                               head_order="l2"))  # fmt: skip
    if loads == "tma" and "w" in mask:
        check(problem, default(problem, **tile, loads=loads, split_loop=split_loop,
                               head_order="rows", ctas_per_sm=2))  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "wider", "aligned"), [("bhsd", 0, True), ("bshd", 8, True), ("bshd", 3, False)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_with_a_window(dtype, layout, wider, aligned):
    suffix = "" if aligned else "-unaligned"
    problem = Problem.parse(f"b2s200x333h4/2d64fw70x30cap9-{dtype}{suffix}")
    check(problem, default(problem), layout=layout, wider=wider)


def test_keys_outside_the_window_are_not_visited():
    import torch

    problem = Problem.parse("b1s1024h2d64cw100")
    template, here = installed().get("triton/fwd"), device.native()
    config = default(problem)
    kernel = build.build(template.render(config, problem, here), here)
    q, k, v = (torch.randn(1, 1024, 2, 64, device="cuda").bfloat16() for _ in range(3))
    wanted, out = torch.empty_like(q), torch.empty_like(q)
    kernel(q, k, v, wanted, None, 0.1, problem=problem)
    k[:, :512] = v[:, :512] = math.nan
    kernel(q, k, v, out, None, 0.1, problem=problem)
    near = 512 + 100 + config["block_m"] + config["block_n"]  # tiles from here on see later keys
    assert out[:, 512].isnan().all()
    assert torch.equal(out[:, near:], wanted[:, near:])


@pytest.mark.parametrize("softcap", ["", "cap20"])
def test_a_nan_stays_in_its_row(softcap):
    import torch

    problem = Problem.parse(f"b1s300h2d64f{softcap}")
    template, here = installed().get("triton/fwd"), device.native()
    kernel = build.build(template.render(default(problem), problem, here), here)
    q, k, v = (torch.randn(1, 300, 2, 64, device="cuda").bfloat16() for _ in range(3))
    q[0, 77, 1, 5] = math.nan
    out = torch.empty_like(q)
    kernel(q, k, v, out, None, 0.125, problem=problem)
    spoilt = out.isnan()
    assert spoilt[0, 77, 1].all()
    spoilt[0, 77, 1] = False
    assert not spoilt.any()


def test_no_lse():
    problem = Problem.parse("b1s300h2d64c")
    check(problem, default(problem), lse=False)


@pytest.mark.parametrize(
    "name",
    ["b2s513x700h4/2d128c", "b2s513h4/2d64f", "b1s513x300h2d256c", "b1s300h2d96c-float16",
     "b1s300h2d64c-float32", "b2s9x513h8/2d128c", "b2s513x700h4/2d128cw150cap20",
     "b2s513h4/2d64fw100x77", "b1s513x300h2d256cw90", "b1s300h2d64fw30x60cap7-float32",
     "b2s9x513h8/2d128cw200"],
)  # fmt: skip
def test_the_space(name):
    """A sample of all that a search may pick."""
    problem = Problem.parse(name)
    space = installed().get("triton/fwd").space(problem, device.native())
    for config in random.Random(name).sample(space.configs, min(12, len(space))):
        check(problem, config)


def test_tensors_beyond_two_to_the_31_elements():
    import torch

    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    problem = Problem.parse("b1s128x1100h1d64c")
    template, here = installed().get("triton/fwd"), device.native()
    kernel = build.build(template.render(default(problem), problem, here), here)
    step = (1 << 31) // 1000 // 64 * 64 + 64  # between keys: the last ones lie beyond 2^31
    store = torch.empty(1100 * step, device="cuda", dtype=torch.bfloat16)
    k = store.as_strided((1, 1100, 1, 64), (store.numel(), step, 64, 1))
    k.normal_()
    q = torch.randn(1, 128, 1, 64, device="cuda").bfloat16()
    v = torch.randn(1, 1100, 1, 64, device="cuda").bfloat16()
    out, lse = torch.empty_like(q), torch.empty(1, 1, 128, device="cuda")
    kernel(q, k, v, out, lse, 0.125)
    near, near_lse = torch.empty_like(out), torch.empty_like(lse)
    kernel(q, k.contiguous(), v, near, near_lse, 0.125)
    assert torch.equal(out, near)
    assert torch.equal(lse, near_lse)


def test_it_runs_in_a_cuda_graph():
    import torch

    problem = Problem.parse("b2s300h4d128c")
    template, here = installed().get("triton/fwd"), device.native()
    kernel = build.build(template.render(default(problem), problem, here), here)
    q, k, v = (torch.randn(2, 300, 4, 128, device="cuda").bfloat16() for _ in range(3))
    out, wanted = torch.empty_like(q), torch.empty_like(q)
    kernel(q, k, v, wanted, None, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(q, k, v, out, None, 0.1)
    out.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
