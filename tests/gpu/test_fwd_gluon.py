"""Is gluon/fwd_sm90 right on the Hopper GPU found here?

By the FlashAttention rule on fresh random inputs, with outputs poisoned by NaN: `reference.check`
tries small and awkward sizes first, then the problem named, twice, and compares the bits.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os

import pytest
from support.problems import drawn, tensors

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.config import Config, Value
from autoflash.problem import Problem
from autoflash.tuning import reference

pytestmark = pytest.mark.gpu

TEMPLATE = installed().get("gluon/fwd_sm90")


RIGHT = [
    # Lengths and masks of one kernel each.
    "b2s512h4/2d64c", "b2s1023x1024h4/2d64f-float16", "b1s1024x1023h4d128c-float16",
    "b2s777x2100h4/2d128f", "b2s2048h4d128c", "b1s4000x17h2d64c", "b1s2048h4d256c",
    "b1s1500h2d256f", "b2s4096h33/11d128c", "b2s2048h33d64f",
    # Head dims: one part, two parts, unequal.
    *(f"b1s300x333h2d{dim}c" for dim in (40, 48, 72, 80, 96, 112, 136, 144, 160, 192, 200, 248)),
    "b1s300x333h2d248f-float16", "b1s300x333h2d192x128c", "b1s300x333h2d64x256f",
    "b1s300x333h2d40x96c-float16", "b1s300x333h2d128x72f",
    # Groups of query heads, from decoding to prefill.
    "b2s1x4000h16/2d128c", "b2s7x333h6/1d128c", "b2s300x333h6/2d128f", "b1s300x333h12/4d64c",
    "b2s50x900h64/1d64c-float16", "b3s20x700h8/4d192f",
    # Windows: causal, two-sided, one-sided, of one key, wider than a tile and narrower.
    "b2s700h4/2d64cw100", "b1s1000h2d128cw1", "b1s1000h2d128cw0", "b2s333x515h4/2d128fw50x20",
    "b1s700x300h2d64fw3x1", "b1s300x900h2d64fw500x30", "b1s300x700h2d128fwinfx5",
    "b1s900h2d128fw40xinf", "b1s2000h2d256cw1023",
    # Softcap.
    "b2s300x333h2d128ccap50", "b2s300x333h2d64fcap5-float16", "b1s500h4/1d256cw127cap30",
    *drawn(3, 16, [40, 64, 64, 96, 128, 128, 192, 256]),
]  # fmt: skip

LONE: dict[str, Value] = {"num_consumer_warpgroups": 1, "pingpong": False, "block_n": 64}
PAIRED: dict[str, Value] = {"schedule": "paired", "head_order": "rows"}
TILES: dict[str, Value] = {"schedule": "tiles", "head_order": "l2"}
VARIED: list[tuple[str, dict[str, Value]]] = [
    # (problem, what differs from the default): every branch of the body
    ("b2s1100h4/2d128c", PAIRED),
    ("b3s1100h33d64c-float16", PAIRED | {"num_consumer_warpgroups": 3}),
    ("b3s900h33d64c", PAIRED | {"block_n": 64, "num_stages": 3}),
    ("b2s1100h4/2d128c", TILES),
    ("b2s1100h4/2d128c", TILES | {"head_order": "rows"}),
    ("b3s1100h33d64c", TILES | {"num_consumer_warpgroups": 3}),
    ("b2s700h66d64fw333x70", {"schedule": "static", "head_order": "rows"}),
    ("b2s1100h4/2d128f", {"pingpong": False}),
    ("b1s1100h2d256c", {"pingpong": True}),
    ("b2s1100h4/2d128c-float16", {"overlap": False, "late_wait": False}),
    ("b2s1100h4/2d128f", {"late_wait": False, "rescale_slack": 0}),
    ("b2s900h4/2d128c", {"num_stages": 3, "block_n": 64}),
    ("b2s1100h4/2d64f", {"num_stages": 2}),
    ("b2s1100h4/2d64f", {"num_consumer_warpgroups": 2}),
    ("b2s900h4/2d128c", LONE),
    ("b2s60x900h4/2d128f", LONE),
    ("b2s1100h4/2d64cw90", {"block_n": 64}),
    ("b2s1100h4/2d128f", {"producer_registers": 40}),
    ("b2s1100h4/2d128c", {"rescale_slack": 0, "late_wait": False}),
    ("b2s1100h4/2d96cw300-float16", {"rescale_slack": 8}),
    ("b1s1100h2d256f", {"rescale_slack": 0}),
    ("b1s1100h2d192c", PAIRED | {"late_wait": False}),
    ("b2s1100h8/2d128c", {"pack_gqa": True}),
    ("b2s1101h8/4d64f-float16", {"pack_gqa": True, "num_consumer_warpgroups": 3}),
    ("b1s333x700h16/1d96cw99cap20", {"pack_gqa": True}),
    ("b2s513h16/2d192x128c", PAIRED | {"pack_gqa": True}),
]


def problem_of(name: str) -> Problem:
    """The problem; a skip where the template does not serve it."""
    problem = Problem.parse(name)
    if (reason := TEMPLATE.refusal(problem, device.native())) is not None:
        pytest.skip(f"gluon/fwd_sm90 does not serve {name} here: {reason}")
    return problem


def kernel_of(problem: Problem, values: dict[str, Value] | None = None) -> build.Kernel:
    here = device.native()
    default = dict(TEMPLATE.default_config(problem, here).pairs)
    config = Config.of(TEMPLATE.name, default | (values or {}))
    return build.build(TEMPLATE.render(config, problem, here), here)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Everything that the tests need, compiled side by side: one takes some 3 s."""
    here = device.native()

    def compile_it(one: tuple[str, dict[str, Value]]) -> None:
        problem = Problem.parse(one[0])
        if TEMPLATE.refusal(problem, here) is None:
            default = dict(TEMPLATE.default_config(problem, here).pairs)
            config = Config.of(TEMPLATE.name, default | one[1])
            build.compile_source(TEMPLATE.render(config, problem, here), here)

    wanted = [
        *((name, {}) for name in RIGHT),
        *VARIED,
        *((name, values) for name, values, _ in NOTHING),
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(compile_it, one) for one in wanted]:
            done.exception()  # the test that needs it says so


@pytest.mark.parametrize("name", RIGHT)
def test_the_default_is_right(name):
    problem = problem_of(name)
    verdict = reference.check(kernel_of(problem), problem, device.native(), seed=len(name))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(("name", "values"), VARIED)
def test_every_branch_is_right(name, values):
    problem = problem_of(name)
    verdict = reference.check(kernel_of(problem, values), problem, device.native(), seed=len(name))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("values", [{}, {"rescale_slack": 8}])
def test_scores_that_grow_from_tile_to_tile(values):
    """By 2^5 a tile: the base of a row stays or moves, and output and lse must follow it."""
    import torch

    problem = problem_of("b1s300x1100h2d64f")
    q, k, v, out, lse = tensors(problem)
    q.fill_(1.0)
    rising = torch.linspace(0.35, -0.15, 1100, device="cuda")  # the last tile comes first
    k.copy_(rising[None, :, None, None].expand_as(k))
    kernel_of(problem, values)(q, k, v, out, lse, 1.0)
    scores = 64 * k[0, :, 0, 0].double()
    wanted = torch.einsum("j,jhd->hd", torch.softmax(scores, 0), v[0].double())
    torch.testing.assert_close(out.double(), wanted.expand_as(out), rtol=2e-2, atol=2e-2)
    whole = torch.logsumexp(scores, 0).expand_as(lse)
    torch.testing.assert_close(lse.double(), whole, rtol=1e-6, atol=1e-3)


NOTHING = [
    # (problem a kernel is built for, what differs from the default, sizes of the call)
    ("b1s300h2d64c", {}, (0, 300, 300)),
    ("b1s300h2d64c", {}, (2, 0, 5)),
    # No keys, so an address of 0: with O in a place of its own, and in that of Q; every schedule.
    ("b1s300h2d64c", {}, (2, 5, 0)),
    ("b1s300h2d64f", {}, (2, 1300, 0)),
    ("b1s300h2d64fw30x7", {}, (2, 130, 0)),
    ("b1s300h2d128x64c", PAIRED, (2, 1300, 0)),
    ("b1s300h2d128c", PAIRED, (2, 1300, 0)),
    ("b1s300h2d256f", {}, (3, 130, 0)),
    ("b1s300h2d256c-float16", PAIRED, (3, 1300, 0)),
    ("b1s300h2d96x192ccap5", {}, (3, 130, 0)),
    ("b1s30x500h8/2d128c", {"pack_gqa": True}, (3, 30, 0)),
]


@pytest.mark.parametrize(("name", "values", "sizes"), NOTHING)
def test_zero_sizes(name, values, sizes):
    import torch

    usual = problem_of(name)
    batch, seqlen_q, seqlen_k = sizes
    problem = dataclasses.replace(usual, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    q, k, v, out, lse = tensors(problem)
    kernel_of(usual, values)(q, k, v, out, lse, 0.125)
    torch.cuda.synchronize()
    assert not out.isnan().any()
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()


def test_strides_and_what_lies_between():
    """Heads first, rows of a wider tensor, one row of keys for all batches; no lse."""
    import torch

    problem, usual = Problem.parse("b3s300h2d64c"), problem_of("b1s300h2d64c")
    kernel = kernel_of(usual)
    q, k, v, wanted, lse = tensors(problem)
    k, v = k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    kernel(q, k.contiguous(), v.contiguous(), wanted, lse, 0.125)
    wide = torch.full((3, 2, 300, 80), math.nan, device="cuda", dtype=q.dtype)
    wide_q, out = wide.clone()[..., 8:72].transpose(1, 2), wide[..., 8:72].transpose(1, 2)
    wide_q.copy_(q)
    kernel(wide_q, k, v, out, None, 0.125)
    assert torch.equal(out, wanted)
    assert wide[..., :8].isnan().all()
    assert wide[..., 72:].isnan().all()


def test_it_runs_in_a_cuda_graph():
    import torch

    problem = problem_of("b1s300h2d64c")
    kernel = kernel_of(problem)
    q, k, v, out, lse = tensors(problem)
    wanted = out.clone()
    kernel(q, k, v, wanted, lse, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(q, k, v, out, lse, 0.125)
    out.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
