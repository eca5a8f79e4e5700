"""Are the 8-bit forward templates right on the device found here?

By the rule of `reference.check`, which draws descales that differ from head to head; here also
what the descales alone do, and what the order of keys inside a kernel must not change.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import random
from collections.abc import Callable

import pytest

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.problem import Problem
from autoflash.tuning import reference

pytestmark = pytest.mark.gpu

TEMPLATES = [n for n, t in installed().templates.items() if t.op == "fwd_fp8"]
USUAL = "b1s300h2d64c"


def fp8(name: str) -> Problem:
    return Problem.parse(f"{name}-float8_e4m3fn")


def drawn(seed: int, count: int) -> list[str]:
    """Random problems: every trait may meet every other."""
    some = random.Random(seed)
    names = []
    for _ in range(count):
        kv_heads, group = some.choice([1, 2, 3]), some.choice([1, 1, 2, 5])
        dim = 16 * some.randint(1, 16)
        dim_v = some.choice([dim, dim, 16 * some.randint(1, 16)])
        mask = some.choice(["c", "f", f"cw{some.randint(0, 900)}",
                            f"fw{some.randint(0, 900)}x{some.randint(1, 900)}"])  # fmt: skip
        names.append(
            f"b{some.randint(1, 3)}s{some.randint(1, 1500)}x{some.randint(1, 1500)}"
            f"h{kv_heads * group}/{kv_heads}d{dim}x{dim_v}{mask}{some.choice(['', '', 'cap30'])}"
        )
    return names


RIGHT = [
    # Lengths and masks.
    "b2s512h4/2d64c", "b2s1023x1024h4d64f", "b1s1024x1023h4d128c", "b2s777x2100h4/2d128f",
    "b2s2048h4d128c", "b1s4000x17h2d64c", "b1s2048h4d256c", "b1s1500h2d256f",
    # Head dims: whole, padded, unequal.
    *(f"b1s300x333h2d{dim}c" for dim in (16, 32, 48, 80, 96, 112, 144, 160, 192, 224, 240)),
    "b1s300x333h2d192x128c", "b1s300x333h2d64x256f", "b1s300x333h2d256x64c", "b1s300x333h2d48x16f",
    "b1s300x333h2d16x208c",
    # Groups of query heads, from decoding to prefill.
    "b2s1x4000h16/2d128c", "b2s7x333h6/1d128c", "b2s300x333h6/2d128f", "b1s300x333h12/4d64c",
    # Windows and softcap.
    "b2s700h4/2d64cw100", "b1s1000h2d128cw0", "b2s333x515h4/2d128fw50x20", "b1s700x300h2d64fw3x1",
    "b1s300x700h2d128fwinfx5", "b1s900h2d128fw40xinf", "b1s2000h2d256cw1023",
    "b2s300x333h2d128ccap50", "b2s300x333h2d64fcap5", "b1s500h4/1d256cw127cap30",
    *drawn(1, 12),
]  # fmt: skip
SPACE = ["b2s513x700h4/2d128c", "b2s513h4/2d64f", "b1s513x300h2d256c", "b2s9x513h8/2d128c",
         "b1s700h2d128fw60x200cap30", "b1s300h2d192x128f", "b1s300x333h2d80c"]  # fmt: skip
SPACE_SAMPLE = 8


def default(template: str, problem: Problem) -> Config:
    found, here = installed().get(template), device.native()
    if (reason := found.refusal(problem, here)) is not None:
        pytest.skip(f"{template} does not serve {problem.name}: {reason}")
    return found.default_config(problem, here)


def sampled(template: str, problem: Problem) -> list[Config]:
    default(template, problem)  # or skips
    configs = installed().get(template).space(problem, device.native()).configs
    return random.Random(problem.name).sample(configs, min(SPACE_SAMPLE, len(configs)))


def kernel_of(template: str, problem: Problem, config: Config | None = None) -> build.Kernel:
    here = device.native()
    config = config or default(template, problem)
    return build.build(installed().get(template).render(config, problem, here), here)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """Everything that the selected tests need, compiled side by side: one takes some 10 s."""
    wanted: list[tuple[str, Problem, Config]] = []
    for item in request.session.items:
        if item.module is not request.module or "template" not in item.callspec.params:
            continue
        template = item.callspec.params["template"]
        problem = fp8(item.callspec.params.get("name", USUAL))
        try:
            if item.originalname == "test_the_space":
                wanted += [(template, problem, config) for config in sampled(template, problem)]
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


class Call:
    """The tensors of a call of a problem: random inputs, outputs poisoned by NaN."""

    def __init__(self, problem: Problem) -> None:
        import torch

        p = problem

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)

        self.q = drawn(p.batch, p.seqlen_q, p.num_heads, p.head_dim)
        self.k = drawn(p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim)
        self.v = drawn(p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim_v)
        shape = (p.batch, p.seqlen_q, p.num_heads, p.head_dim_v)
        self.out = torch.full(shape, math.nan, device="cuda", dtype=torch.bfloat16)
        shape = (p.batch, p.num_heads, p.seqlen_q)
        self.lse = torch.full(shape, math.nan, device="cuda")

    def run(self, kernel: build.Kernel, scale: float = 0.125, **more: object):
        """Out and lse, new ones; q may be given anew."""
        import torch

        q = more.pop("q", self.q)
        out, lse = torch.full_like(self.out, math.nan), torch.full_like(self.lse, math.nan)
        kernel(q, self.k, self.v, out, lse, scale, **more)
        return out, lse


@pytest.fixture
def filled() -> Callable[..., object]:
    """(batch, num_kv_heads) descales of one value."""
    import torch

    def make(value: float, batch: int = 1, heads: int = 2) -> torch.Tensor:
        return torch.full((batch, heads), value, device="cuda")

    return make


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_default_is_right(template, name):
    problem = fp8(name)
    verdict = reference.check(
        kernel_of(template, problem), problem, device.native(), seed=len(name)
    )
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("name", SPACE)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_space(template, name):
    """A sample of all that a search may pick."""
    problem = fp8(name)
    for config in sampled(template, problem):
        kernel = kernel_of(template, problem, config)
        verdict = reference.check(kernel, problem, device.native(), seed=len(name))
        assert verdict.ok, f"{config}: {verdict.reason}"


@pytest.mark.parametrize("name", [USUAL, "b1s300h4/2d128f", "b1s300h2d64ccap5"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_absent_descales_are_ones(template, name, filled):
    import torch

    problem = fp8(name)
    kernel, call = kernel_of(template, problem), Call(problem)
    out, lse = call.run(kernel, problem=problem)
    one = filled(1.0)
    for descales in ((one, one, one), (None, one, None)):
        again, again_lse = call.run(kernel, problem=problem, descales=descales)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("name", [USUAL, "b1s300h2d64ccap5"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_descales_of_powers_of_two_are_exact(template, name, filled):
    """Of q and k they are part of the scale, of v a factor of out; the softcap comes after."""
    import torch

    problem = fp8(name)
    kernel, call = kernel_of(template, problem), Call(problem)
    out, lse = call.run(kernel, 0.125, problem=problem)
    descales = (filled(4.0), filled(0.5), filled(0.25))
    again, again_lse = call.run(kernel, 0.0625, problem=problem, descales=descales)
    assert torch.equal(again.float() * 4, out.float())
    assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_key_brings_its_own_value(template):
    """One key outweighs all others: which one, and every column of its value, must come out."""
    import torch

    problem = fp8("b1s224x224h2d128f")
    kernel, call = kernel_of(template, problem), Call(problem)
    # Key i and query i are alike in a pattern of their own: a score of 2048, elsewhere about 180.
    pattern = (torch.rand(224, 128, device="cuda") > 0.5).float() * 2 - 1
    call.q, call.k = (
        (pattern * 4).to(call.q.dtype)[None, :, None].expand(1, 224, 2, 128).contiguous()
        for _ in range(2)
    )
    out, _ = call.run(kernel, 1.0)
    assert torch.equal(out.float(), call.v.float())


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 300, 300), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("template", TEMPLATES)
def test_zero_sizes(template, batch, seqlen_q, seqlen_k):
    import torch

    usual = fp8(USUAL)
    problem = dataclasses.replace(usual, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    out, lse = Call(problem).run(kernel_of(template, usual))
    torch.cuda.synchronize()
    assert not out.isnan().any()
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_strides(template):
    """Heads first, rows of a wider tensor, and one row of keys for all batches; no lse."""
    import torch

    usual, problem = fp8(USUAL), fp8("b3s300h2d64c")
    kernel, call = kernel_of(template, usual), Call(problem)
    call.k, call.v = (t[:1].expand(3, -1, -1, -1).contiguous() for t in (call.k, call.v))
    wanted, _ = call.run(kernel)
    store = torch.zeros(3, 2, 300, 96, device="cuda", dtype=call.q.dtype)
    q = store[..., 16:80].transpose(1, 2)
    q.copy_(call.q)
    wide = torch.full((3, 2, 300, 80), math.nan, device="cuda", dtype=torch.bfloat16)
    out = wide[..., 8:72].transpose(1, 2)
    k, v = (t[:1].expand(3, -1, -1, -1) for t in (call.k, call.v))
    kernel(q, k, v, out, None, 0.125)
    assert torch.equal(out, wanted)
    assert wide[..., :8].isnan().all()
    assert wide[..., 72:].isnan().all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_runs_in_a_cuda_graph(template):
    import torch

    problem = fp8(USUAL)
    kernel, call = kernel_of(template, problem), Call(problem)
    wanted, _ = call.run(kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(call.q, call.k, call.v, call.out, call.lse, 0.125)
    call.out.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(call.out, wanted)
