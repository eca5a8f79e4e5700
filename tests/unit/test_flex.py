"""FlexAttention as a family of kernels: which options a mask allows, how one is built and bound."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from autoflash import build
from autoflash import device as devices
from autoflash.build import flex
from autoflash.build.kernel import Artifact, Call, Kernel, Launch, Resources
from autoflash.codegen.catalog import installed
from autoflash.codegen.template import Source
from autoflash.config import Config, Value
from autoflash.device import KNOWN_GPUS, Device
from autoflash.errors import BuildError, CompileError, InvalidInput
from autoflash.problem import Problem
from autoflash.runtime.warmup import warmup
from autoflash.tuning import peers, reference
from autoflash.tuning.cost import call_us
from autoflash.tuning.inputs import make_inputs
from autoflash.tuning.plan import plan

TEMPLATE = installed().get("flex/fwd")
H100 = KNOWN_GPUS["sm90"]
CPU = devices.for_arch("cpu")
TILE: dict[str, Value] = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}


def config_of(problem: Problem, device: Device = H100, **values: Value) -> Config:
    return Config.of(TEMPLATE.name, dict(TEMPLATE.default_config(problem, device)) | values)


def rendered(name: str, device: Device = H100, **values: Value) -> Source:
    problem = Problem.parse(name)
    return TEMPLATE.render(config_of(problem, device, **values), problem, device)


def test_the_default_is_no_option_at_all_and_a_tile_is_whole() -> None:
    name = "flex:b4s4096h32/8d128c"
    assert flex.constants(rendered(name).text) == {"KERNEL_OPTIONS": {}, "MASK_BLOCK": 128}
    options = flex.constants(rendered(name, **TILE, use_tma=True).text)["KERNEL_OPTIONS"]
    assert options == {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
        "fwd_USE_TMA": True,
    }  # fmt: skip
    with pytest.raises(InvalidInput, match="a tile is given whole"):
        rendered(name, block_m=64)


def test_every_option_of_every_feasible_config_is_known_to_flexattention() -> None:
    seen: set[str] = set()
    for name in ("flex:b1s256h2d64c-float32", "flex:b1s256h2d64f-bfloat16"):
        problem = Problem.parse(name)
        for config in TEMPLATE.space(problem, H100).configs[::7]:
            text = TEMPLATE.render(config, problem, H100).text
            seen |= set(flex.constants(text)["KERNEL_OPTIONS"])
    assert len(seen) == 8  # all of them were met
    flex.require_known(seen, "test")
    with pytest.raises(BuildError, match="no kernel option fwd_BLOCK_Q, and would ignore it"):
        flex.require_known({"fwd_BLOCK_Q"}, "test")


def promises(name: str) -> tuple[bool, bool]:
    """Whether ROWS_GUARANTEED_SAFE, and BLOCKS_ARE_CONTIGUOUS, may be given for a problem."""
    problem = Problem.parse(name)
    safe = config_of(problem, rows_guaranteed_safe=True)
    contiguous = config_of(problem, blocks_are_contiguous=True)
    broken = [TEMPLATE.broken(config, problem, H100) for config in (safe, contiguous)]
    return broken[0] is None, broken[1] is None


def walked(name: str) -> tuple[bool, bool]:
    """What the two promise, found by walking the blocks as FlexAttention's kernel does."""
    problem = Problem.parse(name)
    namespace: dict[str, object] = {}
    exec(rendered(name).text, namespace)
    sees = namespace["mask_mod"]
    rows, keys = problem.seqlen_q, problem.seqlen_k
    mask = create_block_mask(sees, None, None, rows, keys, device="cpu")  # type: ignore[arg-type]
    index = torch.arange(rows)[:, None], torch.arange(keys)[None]
    seen = sees(0, 0, *index)  # type: ignore[operator]
    safe = contiguous = True
    for block in range(-(-rows // 128)):
        lists = [
            indices[0, 0, block, : int(counts[0, 0, block])].tolist()
            for counts, indices in (
                (mask.kv_num_blocks, mask.kv_indices),
                (mask.full_kv_num_blocks, mask.full_kv_indices),
            )
        ]
        for visited in lists:
            steps = itertools.pairwise(visited)
            contiguous &= all(after == before + 1 for before, after in steps)
        every = [each * 128 for visited in lists for each in visited]
        for width in (16, 32, 64, 128):
            first = seen[block * 128 : block * 128 + 128, every[0] : every[0] + width]
            safe &= bool(first.any(1).all())
        safe &= bool(every)
    return safe, contiguous


@pytest.mark.parametrize(
    "sizes",
    ["256", "300", "128x129", "200x300", "256x383", "384x639", "256x384", "300x700", "300x200"],
)
@pytest.mark.parametrize("mask", ["c", "cw100", "cw300", "fw40x40", "fw10xinf"])
def test_a_promise_is_made_only_where_the_mask_keeps_it(sizes: str, mask: str) -> None:
    name = f"flex:b1s{sizes}h2d64{mask}"
    if sizes == "300x200" and mask == "c":
        assert promises(name) == (False, True)  # a row of blocks visits none: walked cannot tell
        return
    promised, kept = promises(name), walked(name)
    assert all(not promise or keeps for promise, keeps in zip(promised, kept, strict=True))
    if mask == "c":
        assert promised == kept  # neither is left out where it holds


def test_what_needs_hardware_or_loses_accuracy_is_refused_elsewhere() -> None:
    half, single = Problem.parse("flex:b1s256h2d64c"), Problem.parse("flex:b1s256h2d64c-float32")
    capped = Problem.parse("flex:b1s256h2d64ccap30-float32")
    a100 = KNOWN_GPUS["sm80"]
    tma = config_of(half, use_tma=True)
    assert TEMPLATE.broken(tma, half, H100) is None
    assert "TMA needs Hopper" in str(TEMPLATE.broken(tma, half, a100))
    prescaled = [config_of(each, prescale_qk=True) for each in (single, half, capped)]
    assert TEMPLATE.broken(prescaled[0], single, H100) is None
    for config, problem in zip(prescaled[1:], (half, capped), strict=True):
        assert "not rounded once more" in str(TEMPLATE.broken(config, problem, H100))
    assert [c["mask_block"] for c in TEMPLATE.space(half, CPU).configs] == [64, 128, 256]
    few = Problem.parse("flex:b1s100x256h2d64c")
    assert "128 query rows or more" in str(TEMPLATE.refusal(few, H100))


def test_a_module_that_is_no_python_or_has_unknown_options_is_no_kernel(cache_dir: Path) -> None:
    source = rendered("flex:b1s256h2d64c", CPU)
    broken = dataclasses.replace(source, text="def (")
    with pytest.raises(CompileError, match="flex/fwd: invalid syntax"):
        build.compile_source(broken, CPU)
    misspelt = source.text.replace("KERNEL_OPTIONS = {", 'KERNEL_OPTIONS = {"fwd_BLOCKM": 64,')
    with pytest.raises(BuildError, match="no kernel option fwd_BLOCKM"):
        build.build(dataclasses.replace(source, text=misspelt), CPU)
    kernel = build.build(source, CPU)
    with pytest.raises(BuildError, match="takes tensors"):
        kernel.prepare(())


class Returning(Kernel):
    """A kernel that makes its own output, as foreign ones do; `memory` gives it away."""

    gives_lse = False

    def __init__(self, problem: Problem, memory: bool = False) -> None:
        source = Source("test/returning", "flex", "", "flex", problem.dtype, True, {})
        super().__init__(Artifact(source, "cpu", "", Path(), Resources(0.0, 0)))
        self.memory = memory
        self.asked_lse = False

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        raise NotImplementedError

    def bind(self, q, k, v, out, lse, softmax_scale, layout="bshd", **rest) -> Call:  # type: ignore[no-untyped-def]
        self.asked_lse |= lse is not None
        found: list[torch.Tensor] = []

        def call() -> torch.Tensor:
            if not (self.memory and found):
                found[:] = [peers.get("naive").make(q, k, v, rest["problem"])().transpose(1, 2)]
            return found[0]

        return call


def test_a_kernel_that_returns_its_output_is_checked_and_caught_like_others() -> None:
    problem = Problem.parse("flex:b1s256h4/2d32c-float32")
    inputs = make_inputs(problem, CPU)
    kernel = Returning(problem)
    verdict = reference.check(kernel, problem, CPU)
    assert verdict.ok, verdict.reason
    assert not kernel.asked_lse
    for memory in (False, True):
        call = Returning(problem, memory).bind(
            inputs.q, inputs.k, inputs.v, inputs.out, None, inputs.softmax_scale, problem=problem
        )
        call()
        assert reference.check_timed(call, inputs, CPU).ok is not memory
    assert reference.stress_cases(problem) == []


def test_what_our_own_kernels_are_for_says_what_it_means_for_a_foreign_problem() -> None:
    problem = Problem.parse("flex:b1s512h4/2d64c")
    assert problem.is_foreign
    assert problem.forward == Problem.parse("b1s512h4/2d64c")
    assert call_us(problem, H100, installed()) == call_us(problem.forward, H100, installed())
    with pytest.raises(InvalidInput, match="attention\\(\\) serves no problem of op flex"):
        warmup(problem, device="cpu")
    (planned,) = plan([problem], H100, present=False)
    assert "the device itself, which is not here" in planned.refused["flex/fwd"]
    assert peers.get("flex_default").unavailable(problem, H100) is None
    assert peers.get("flex_default").unavailable(problem.forward, H100)
    assert peers.get("cudnn").unavailable(problem, H100) is None
