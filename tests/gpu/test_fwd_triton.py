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
    tile["num_splits"] = 1
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


SPLITS = [
    # Decoding: heads alone and packed, lengths that fill no key tile, parts that are empty.
    "b1s1x8192h32/8d128f",
    "b1s1x8192h32/8d128c",
    "b3s1x777h16/2d64c",
    "b2s1x5000h8d128f-float16",
    "b1s1x20000h8/1d256c",
    "b1s1x70000h4/1d128f",
    "b2s1x3001h8/2d96c",
    "b2s1x3001h8/2d40x24c-float16",
    "b2s1x3001h8/2d128c-bfloat16-unaligned",
    "b2s1x3001h8/2d64c-float32",
    # Verifying drafts: up to 128 rows that share keys.
    "b1s2x8192h32/8d128c",
    "b2s4x3333h32/8d128c",
    "b1s7x3333h6/2d64c-float16",
    "b1s8x8192h32/8d128c",
    "b1s16x8192h32/4d128c",
    "b1s16x4001h8d256f",
    "b1s9x3001h8/2d64c-float32",
    # Prompts in chunks.
    "b1s256x9000h8/1d128c",
    "b1s300x9001h4/2d64f",
    "b1s300x9001h4/2d192x128c",
    "b1s256x5000h8/1d256c-float16",
    "b1s200x3000h2d64c-float32",
    "b1s200x3000h2d80c-bfloat16-unaligned",
    # Masks: rows that see nothing, windows too narrow for parts, causal squares.
    "b1s1024h2d128c",
    "b1s700x600h2d64c",
    "b1s1x9000h8/2d128cw1023",
    "b1s1x9000h8/2d128cw30",
    "b1s5x9000h8/2d128cw3000cap20",
    "b1s300x5000h4/2d64fw900x100",
    "b1s300x5000h4/2d64cw2000cap15-float16",
    "b1s600x520h2d64fw400x30-float32",
    "b1s300x5000h4/2d128ccap30",
]


@pytest.mark.parametrize("name", SPLITS)
def test_keys_in_parts(name):
    problem = Problem.parse(name)
    config = default(problem)
    assert config["num_splits"] == 0
    check(problem, config)


@pytest.mark.parametrize("scale", [0.0, -0.2, 5.0])
def test_scales_with_keys_in_parts(scale):
    problem = Problem.parse("b1s9x3333h8/2d64c")
    check(problem, default(problem), scale=scale)


@pytest.mark.parametrize(("layout", "wider"), [("bhsd", 0), ("bshd", 8)])
def test_strides_with_keys_in_parts(layout, wider):
    problem = Problem.parse("b2s9x3333h8/2d64c")
    check(problem, default(problem), layout=layout, wider=wider)
    check(problem, default(problem), layout=layout, wider=wider, lse=False)


def split_kernel(name: str):
    problem, here = Problem.parse(name), device.native()
    template = installed().get("triton/fwd")
    return build.build(template.render(default(problem), problem, here), here)


def test_the_sizes_of_a_call_decide_into_how_many_parts():
    kernel = split_kernel("b1s1x8192h8/2d128c")
    for batch, keys in ((1, 8192), (1, 65536), (200, 600), (1, 3), (2, 0)):
        check_sizes(kernel, Problem.parse(f"b{batch}s1x{keys}h8/2d128c"))


def check_sizes(kernel, problem: Problem) -> None:
    """`kernel` against the formula, though it was rendered for other sizes."""
    import torch

    torch.manual_seed(0)
    q = torch.randn(problem.batch, problem.seqlen_q, problem.num_heads, 128, device="cuda")
    k, v = torch.randn(2, problem.batch, problem.seqlen_k, problem.num_kv_heads, 128, device="cuda")
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out = torch.full_like(q, math.nan)
    lse = torch.full((problem.batch, problem.num_heads, problem.seqlen_q), math.nan, device="cuda")
    kernel(q, k, v, out, lse, 0.1, problem=problem)
    exact, exact_lse = formula(q, k, v, 0.1, problem, torch.float64)
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["b1s1x30000h32/8d128c", "b2s8x9000h32/8d128c", "b1s256x20000h8/1d128c"]
)
def test_parts_give_the_same_bits_every_time(name):
    import torch

    problem, kernel = Problem.parse(name), split_kernel(name)
    q = torch.randn(problem.batch, problem.seqlen_q, problem.num_heads, 128, device="cuda")
    k, v = torch.randn(2, problem.batch, problem.seqlen_k, problem.num_kv_heads, 128, device="cuda")
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    outs, lses = [], []
    for _ in range(20):
        # What lay in the memory that the workspace takes must not matter.
        del_me = torch.full((1 << 22,), math.nan, device="cuda")
        del del_me
        out = torch.full_like(q, math.nan)
        lse = torch.full(
            (problem.batch, problem.num_heads, problem.seqlen_q), math.nan, device="cuda"
        )
        kernel(q, k, v, out, lse, 0.1, problem=problem)
        outs.append(out)
        lses.append(lse)
    assert not outs[0].isnan().any()
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(lse, lses[0]) for lse in lses)


def test_parts_on_two_streams_do_not_meet():
    import torch

    kernel = split_kernel("b1s1x8192h8/2d128c")
    q = torch.randn(2, 1, 1, 8, 128, device="cuda").bfloat16()
    k, v = torch.randn(2, 2, 1, 8192, 2, 128, device="cuda").bfloat16()
    wanted = [torch.empty_like(q[0]) for _ in range(2)]
    for i in range(2):
        kernel(q[i], k[i], v[i], wanted[i], None, 0.1)
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = torch.full((2, 50, 1, 1, 8, 128), math.nan, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for n in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                kernel(q[i], k[i], v[i], outs[i, n], None, 0.1)
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(outs[i, n], wanted[i]) for n in range(50))


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


@pytest.mark.parametrize("name", ["b2s300h4d128c", "b2s3x5000h4d128c"])
def test_it_runs_in_a_cuda_graph(name):
    import torch

    problem = Problem.parse(name)
    template, here = installed().get("triton/fwd"), device.native()
    kernel = build.build(template.render(default(problem), problem, here), here)
    q = torch.randn(2, problem.seqlen_q, 4, 128, device="cuda").bfloat16()
    k, v = torch.randn(2, 2, problem.seqlen_k, 4, 128, device="cuda").bfloat16()
    out, again, wanted = (torch.empty_like(q) for _ in range(3))
    kernel(q, k, v, wanted, None, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(q, k, v, out, None, 0.1)
        kernel(q, k, v, again, None, 0.1)
    for _ in range(3):
        out.fill_(math.nan)
        again.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)
        assert torch.equal(again, wanted)
