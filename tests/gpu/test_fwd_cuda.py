"""Are the forward templates of templates/cuda right on the device found here?

By the FlashAttention rule on fresh random inputs, with outputs poisoned by NaN: `reference.check`
tries small and awkward sizes first, then the problem named, twice.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import random

import pytest
from support.problems import drawn, tensors

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.problem import Problem
from autoflash.tuning import reference

pytestmark = pytest.mark.gpu

TEMPLATES = [
    name
    for name, template in installed().templates.items()
    if template.language == "cuda" and template.op == "fwd"
]


RIGHT = [
    # Lengths and masks of one kernel each.
    "b2s512h4/2d64c", "b2s1023x1024h4/2d64f-float16", "b1s1024x1023h4d128c-float16",
    "b2s777x2100h4/2d128f", "b2s2048h4d128c", "b1s4000x17h2d64c", "b1s2048h4d256c",
    "b1s1500h2d256f",
    # Head dims: whole, padded, unequal.
    *(f"b1s300x333h2d{dim}c" for dim in (16, 24, 32, 40, 48, 72, 80, 96, 112, 136, 160, 192, 224)),
    "b1s300x333h2d248f-float16", "b1s300x333h2d192x128c", "b1s300x333h2d64x256f",
    "b1s300x333h2d40x24c-float16", "b1s300x333h2d16x128c", "b1s300x333h2d128x72f",
    # Groups of query heads, from decoding to prefill.
    "b2s1x4000h16/2d128c", "b2s7x333h6/1d128c", "b2s300x333h6/2d128f", "b1s300x333h12/4d64c",
    # Windows: causal, two-sided, one-sided, of one key, wider than a tile and narrower.
    "b2s700h4/2d64cw100", "b1s1000h2d128cw1", "b1s1000h2d128cw0", "b2s333x515h4/2d128fw50x20",
    "b1s700x300h2d64fw3x1", "b1s300x900h2d64fw500x30", "b1s300x700h2d128fwinfx5",
    "b1s900h2d128fw40xinf", "b1s2000h2d256cw1023",
    # Softcap.
    "b2s300x333h2d128ccap50", "b2s300x333h2d64fcap5-float16", "b1s500h4/1d256cw127cap30",
    # Nothing is a multiple of 16 bytes.
    "b2s200x333h4/2d64c-bfloat16-unaligned", "b1s200x333h2d72fw99x9cap20-float16-unaligned",
    *drawn(1, 16, [32, 64, 64, 96, 128, 128, 192, 256]),
]  # fmt: skip
SPACE = [
    "b2s513x700h4/2d128c", "b2s513h4/2d64f-float16", "b1s513x300h2d256c", "b1s300h2d96c-float16",
    "b1s600h4/2d64cw99", "b1s700h2d128fw60x200cap30", "b2s9x513h8/2d128c", "b1s300h2d192x128f",
    "b1s300x333h2d80c",
]  # fmt: skip
SPACE_SAMPLE = 3
PARTS = [
    "b1s100x5000h4/2d128c", "b1s300x4096h8/1d64f-float16", "b2s70x9001h2d256c", "b1s257x3000h2d96f",
    "b1s200x4000h2d128cw700", "b1s150x2500h2d64fw300x40cap20", "b1s65x1025h1d40x80c-float16",
    "b1s500x1500h2d192x128c", "b1s3000x1100h1d128c",
]  # fmt: skip


def default(template: str, problem: Problem) -> Config:
    found, here = installed().get(template), device.native()
    if (reason := found.refusal(problem, here)) is not None:
        pytest.skip(f"{template} does not serve {problem.name}: {reason}")
    return found.default_config(problem, here)


def sampled(template: str, problem: Problem) -> list[Config]:
    found, here = installed().get(template), device.native()
    if (reason := found.refusal(problem, here)) is not None:
        pytest.skip(f"{template} does not serve {problem.name}: {reason}")
    configs = found.space(problem, here).configs
    some = random.Random(problem.name)
    return [
        *found.seed_configs(problem, here)[:2],
        *some.sample(configs, min(SPACE_SAMPLE, len(configs))),
    ]


def in_parts(template: str, problem: Problem) -> Config:
    """The default, but with the keys shared out among blocks."""
    usual = default(template, problem)
    if "split_kv" not in usual:
        pytest.skip(f"{template} does not split keys")
    split = {"split_kv": True, "schedule": "tiles", "head_order": "rows"}
    return Config.of(template, {**usual, **split})


def kernel_of(template: str, problem: Problem, config: Config) -> build.Kernel:
    here = device.native()
    return build.build(installed().get(template).render(config, problem, here), here)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """Everything that the selected tests need, compiled side by side: one takes some 20 s."""
    wanted = []
    for item in request.session.items:
        if item.module is not request.module or "template" not in item.callspec.params:
            continue
        template = item.callspec.params["template"]
        problem = Problem.parse(item.callspec.params.get("name", "b1s300h2d64c"))
        try:
            if item.originalname == "test_the_space":
                wanted += [(template, problem, config) for config in sampled(template, problem)]
            elif item.originalname == "test_keys_in_parts":
                wanted.append((template, problem, in_parts(template, problem)))
            else:
                wanted.append((template, problem, default(template, problem)))
        except pytest.skip.Exception:
            continue

    def compile_it(one: tuple[str, Problem, Config]) -> None:
        template, problem, config = one
        here = device.native()
        source = installed().get(template).render(config, problem, here)
        try:
            build.compile_source(source, here)
        except Exception:  # the test that needs it says so
            return

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_it, wanted))


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_default_is_right(template, name):
    problem = Problem.parse(name)
    kernel = kernel_of(template, problem, default(template, problem))
    verdict = reference.check(kernel, problem, device.native(), seed=len(name))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("name", SPACE)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_space(template, name):
    """A sample of all that a search may pick."""
    problem = Problem.parse(name)
    for config in sampled(template, problem):
        kernel = kernel_of(template, problem, config)
        verdict = reference.check(kernel, problem, device.native(), seed=len(name))
        assert verdict.ok, f"{config}: {verdict.reason}"


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_keys_in_parts(template, name):
    problem = Problem.parse(name)
    kernel = kernel_of(template, problem, in_parts(template, problem))
    verdict = reference.check(kernel, problem, device.native(), seed=len(name))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 300, 300), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("template", TEMPLATES)
def test_zero_sizes(template, batch, seqlen_q, seqlen_k):
    import torch

    usual = Problem.parse("b1s300h2d64c")
    problem = dataclasses.replace(usual, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    kernel = kernel_of(template, usual, default(template, usual))
    q, k, v, out, lse = tensors(problem)
    kernel(q, k, v, out, lse, 0.125)
    torch.cuda.synchronize()
    assert not out.isnan().any()
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_lse_is_left_out(template):
    import torch

    problem = Problem.parse("b1s300h2d64c")
    kernel = kernel_of(template, problem, default(template, problem))
    q, k, v, out, lse = tensors(problem)
    wanted = out.clone()
    kernel(q, k, v, wanted, lse, 0.125)
    kernel(q, k, v, out, None, 0.125)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("template", TEMPLATES)
def test_strides(template):
    """Heads first, rows of a wider tensor, and one row of keys for all batches."""
    import torch

    problem = Problem.parse("b3s300h2d64c")
    usual = Problem.parse("b1s300h2d64c")
    kernel = kernel_of(template, usual, default(template, usual))
    q, k, v, wanted, lse = tensors(problem)
    k, v = k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    kernel(q, k.contiguous(), v.contiguous(), wanted, lse, 0.125)
    wide = torch.full((3, 2, 300, 80), math.nan, device="cuda", dtype=q.dtype)
    wide_q, out = wide.clone()[..., 8:72].transpose(1, 2), wide[..., 8:72].transpose(1, 2)
    wide_q.copy_(q)
    again = lse.clone()
    kernel(wide_q, k, v, out, again, 0.125)
    assert torch.equal(out, wanted)
    assert torch.equal(again, lse)
    assert wide[..., :8].isnan().all()
    assert wide[..., 72:].isnan().all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_tensors_beyond_two_to_the_31_elements(template):
    import torch

    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    usual, problem = Problem.parse("b1s300h2d64c"), Problem.parse("b1s128x1100h1d64c")
    kernel = kernel_of(template, usual, default(template, usual))
    step = (1 << 31) // 1000 // 64 * 64 + 64  # between keys: the last ones lie beyond 2^31
    store = torch.empty(1100 * step, device="cuda", dtype=torch.bfloat16)
    q, k, v, out, lse = tensors(problem)
    far = store.as_strided((1, 1100, 1, 64), (store.numel(), step, 64, 1))
    far.copy_(k)
    kernel(q, far, v, out, lse, 0.125)
    near, near_lse = torch.empty_like(out), torch.empty_like(lse)
    kernel(q, k, v, near, near_lse, 0.125)
    assert torch.equal(out, near)
    assert torch.equal(lse, near_lse)


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_runs_in_a_cuda_graph(template):
    import torch

    problem = Problem.parse("b1s300h2d64c")
    kernel = kernel_of(template, problem, default(template, problem))
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
