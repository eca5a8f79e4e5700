from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from autoflash import device as devices
from autoflash.build.kernel import Artifact, Kernel, Launch, Resources
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import UnknownName
from autoflash.problem import Problem
from autoflash.tuning import expected, formula, reference
from autoflash.tuning.inputs import bshd, make_inputs

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small, and threads that wait for each other are slow where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reference.forget()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cpu() -> Device:
    return devices.for_arch("cpu")


class PythonKernel(Kernel):
    """A kernel written in PyTorch: right, unless one of its steps is replaced."""

    def __init__(self, **steps: Callable[..., object]) -> None:
        source = Source("test/python", "python", "", "fwd", "float32", True, {})
        super().__init__(Artifact(source, "cpu", "", Path(), Resources(0.0, 0)))
        self.steps = steps
        self.problems: list[tuple[int, ...]] = []

    def prepare(self, scalars: tuple[int, ...]) -> Launch:
        raise NotImplementedError

    def _step(self, name: str, value: torch.Tensor, *more: object) -> torch.Tensor:
        changed = self.steps[name](value, *more) if name in self.steps else value
        assert isinstance(changed, torch.Tensor)
        return changed

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        softmax_scale: float,
        layout: str = "bshd",
    ) -> None:
        self.problems.append((*q.shape, *k.shape))
        qt, kt, vt = (bshd(t, layout).transpose(1, 2).float() for t in (q, k, v))
        group = qt.shape[1] // kt.shape[1]
        kt, vt = kt.repeat_interleave(group, 1), vt.repeat_interleave(group, 1)
        kt = self._step("heads", kt, group)
        scores = self._step("scores", qt @ kt.transpose(2, 3) * softmax_scale)
        shift = kt.shape[2] - qt.shape[2]
        rows, keys = torch.arange(qt.shape[2])[:, None], torch.arange(kt.shape[2])
        hidden = torch.zeros(len(rows), len(keys), dtype=torch.bool)
        if self.steps.get("causal", lambda: False)():
            hidden = self._step("hidden", keys > rows + shift, rows, keys)
        scores = scores.masked_fill(hidden, -math.inf)
        scores = self._step("masked", scores)
        if "weights" in self.steps:
            weights = self._step("weights", scores)
        else:
            weights = torch.softmax(scores, -1).nan_to_num(0.0)
        made = self._step("out", (weights @ vt).to(out.dtype)).transpose(1, 2)
        bshd(out, layout).copy_(made)
        if lse is not None:
            lse.copy_(self._step("lse", scores.logsumexp(-1)))
        if "memory" in self.steps:
            self.steps["memory"](q, k, v, out, lse)


def causal() -> bool:
    return True


CASES = (
    "b1s300h2d64c-float32",
    "b1s300h2d64f-bfloat16",
    "b2s130x200h4/2d40c-float16",
    "b1s200x90h2d24x56c-bfloat16",
    "b1s1x700h8/1d128c-float32",
    "b1s65h2d64f-float32-unaligned",
    "b2s77h2d256c-bfloat16-unaligned",
)


@pytest.mark.parametrize("name", CASES)
def test_a_right_kernel_passes(name: str, cpu: Device) -> None:
    problem = Problem.parse(name)
    kernel = PythonKernel(causal=lambda: problem.causal)
    verdict = reference.check(kernel, problem, cpu)
    assert verdict.ok, verdict.reason
    assert verdict.error_ratio is not None
    assert 0 < verdict.error_ratio < 1.5  # of 2: right kernels are not close to the limit
    assert verdict.reason == ""
    assert len(kernel.problems) == len(reference.stress_cases(problem)) + 2


def _one_tile_less(scores: torch.Tensor) -> torch.Tensor:
    """Forget the second 32 keys, wherever there are some more."""
    if scores.shape[-1] < 100:
        return scores
    keys = torch.arange(scores.shape[-1])
    return scores.masked_fill((keys >= 32) & (keys < 64), -math.inf)


def _unstable(scores: torch.Tensor) -> torch.Tensor:
    """Softmax without subtracting the maximum, in half precision's range."""
    exps = torch.exp(scores).to(torch.float16).float()
    return (exps / exps.sum(-1, keepdim=True)).nan_to_num(0.0)


def _one_more(hidden: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return keys > rows + 1 + hidden.shape[1] - hidden.shape[0]


def _wrong_heads(k: torch.Tensor, group: int) -> torch.Tensor:
    """h % kv_heads instead of h // group."""
    kv = k[:, ::group]
    return kv.repeat(1, group, 1, 1)


@pytest.mark.parametrize(
    ("mistake", "steps"),
    [
        ("forgets a tile of keys", {"masked": _one_tile_less}),
        ("overflows", {"weights": _unstable}),
        ("mixes up groups", {"heads": _wrong_heads}),
        ("aligns the mask top-left", {"hidden": lambda hidden, rows, keys: keys > rows}),
        ("lets a row see one key more", {"hidden": _one_more}),
        ("scales twice", {"scores": lambda scores: scores * 1.02}),
        ("gives lse to base 2", {"lse": lambda lse: lse / math.log(2)}),
        ("is off by 1e-3 in lse", {"lse": lambda lse: lse + 1e-3}),
        ("gives empty rows an lse", {"lse": lambda lse: lse.nan_to_num(neginf=0.0)}),
        ("rounds out to 7 bits", {"out": lambda out: _round(out, 6)}),
        ("swaps two rows", {"out": lambda out: out.roll(1, 2)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_kernel_is_found_out(
    mistake: str, steps: dict[str, Callable[..., object]], dtype: str, cpu: Device
) -> None:
    problem = Problem.parse("b1s256h4/2d64c", dtype)
    verdict = reference.check(PythonKernel(causal=causal, **steps), problem, cpu)
    assert not verdict.ok, mistake
    assert verdict.reason.startswith("test/python, b")
    assert dtype in verdict.reason


def _round(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(tensor.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(tensor.dtype)


def test_tf32_is_not_float32(cpu: Device) -> None:
    case = expected.make_case(Problem.parse("b1s256h2d64f-float32"), cpu)
    inputs = case.inputs
    q, k, v = (_round(tensor, 11) for tensor in (inputs.q, inputs.k, inputs.v))
    PythonKernel()(q, k, v, inputs.out, None, inputs.softmax_scale)
    verdict = case.compare(inputs.out)
    assert not verdict.ok
    assert verdict.error_ratio is not None
    assert verdict.error_ratio > 5


def test_the_reason_gives_index_and_both_values(cpu: Device) -> None:
    problem = Problem.parse("b2s96h2d32f-float32")

    def spoil(out: torch.Tensor) -> torch.Tensor:
        if out.shape == (2, 2, 96, 32):
            out[1, 0, 70, 5] = 123.0
        return out

    verdict = reference.check(PythonKernel(out=spoil), problem, cpu)
    assert not verdict.ok
    assert verdict.where == "out[1, 70, 0, 5]"
    assert "b2s96h2/2d32f-float32" in verdict.reason
    assert "is 123" in verdict.reason
    assert "should be" in verdict.reason
    assert verdict.max_error == pytest.approx(123, abs=5)


def test_a_wrong_row_among_small_ones_is_found(cpu: Device) -> None:
    """Late rows of a long causal problem are small; an error there must not hide behind row 0."""
    problem = Problem.parse("b1s2048h1d64c-bfloat16")
    case = expected.make_case(problem, cpu, whole=False)
    right, _ = formula.exact(case.inputs.q, case.inputs.k, case.inputs.v, causal=True)
    out = right.to(torch.bfloat16)
    assert case.compare(out).ok
    last = out[:, -64:].clone()
    out[:, -64:] = last * 1.03
    moved = (out[:, -64:] - last).abs().max()
    early = (case.rounded - case.out).abs().max()
    assert moved < 2 * early  # the rule over the whole output would let it pass
    assert not case.compare(out).ok


def test_rows_outside_the_sample_are_compared_with_pytorch(cpu: Device) -> None:
    problem = Problem.parse("b1s4096h8d128f-bfloat16")
    case = expected.make_case(problem, cpu)
    assert case.whole is not None
    seen = {(int(b), int(h), int(r) // 64) for b, h, r in case.windows}
    assert {(0, 0, 0), (0, 7, 63)} <= seen
    assert len(seen) < 8 * 64
    out = case.whole.clone()
    assert case.compare(out).ok
    missed = next((h, block) for h in range(8) for block in range(64) if (0, h, block) not in seen)
    head, block = missed
    out[0, 64 * block : 64 * block + 64, head] = out[0, 0:64, head].clone() * 1.5
    verdict = case.compare(out)
    assert not verdict.ok
    assert verdict.where == f"out[0, {64 * block}, {head}, 0]"


def test_everything_unwritten_is_seen(cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d32f-float32")

    def unwrite(q: object, k: object, v: object, out: torch.Tensor, lse: torch.Tensor) -> None:
        out[0, -1, -1, -1] = math.nan

    verdict = reference.check(PythonKernel(memory=unwrite), problem, cpu)
    assert not verdict.ok
    assert "left unwritten at 1 of 64" in verdict.reason  # in the first, small case


def test_an_lse_left_unwritten_is_seen(cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d32f-float32")

    def unwrite(q: object, k: object, v: object, out: object, lse: torch.Tensor | None) -> None:
        if lse is not None:
            lse[0, 0, -1] = math.nan

    verdict = reference.check(PythonKernel(memory=unwrite), problem, cpu)
    assert "lse is NaN or was left unwritten" in verdict.reason


@pytest.mark.parametrize("where", [-1, 1])
def test_writing_outside_of_out_is_seen(where: int, cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d32f-float32")

    def stray(q: object, k: object, v: object, out: torch.Tensor, lse: object) -> None:
        base = out.storage_offset()
        place = base - 1 if where < 0 else base + out.numel()
        torch.as_strided(out, (1,), (1,), place).fill_(0.0)

    verdict = reference.check(PythonKernel(memory=stray), problem, cpu)
    assert "wrote outside of out" in verdict.reason


def test_changing_an_input_is_seen_and_harms_no_later_kernel(cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d32f-float32")

    def change(q: object, k: torch.Tensor, v: object, out: object, lse: object) -> None:
        k[0, 0, 0, 0] += 1.0

    assert reference.check(PythonKernel(), problem, cpu).ok
    assert "changed its inputs" in reference.check(PythonKernel(memory=change), problem, cpu).reason
    assert reference.check(PythonKernel(), problem, cpu).ok


def test_damage_between_two_checks_harms_no_later_kernel(cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d32f-float32")
    kept: list[torch.Tensor] = []

    def remember(q: torch.Tensor, k: object, v: object, out: object, lse: object) -> None:
        kept.append(q)

    assert reference.check(PythonKernel(memory=remember), problem, cpu).ok
    for q in kept:
        q.zero_()
    assert reference.check(PythonKernel(), problem, cpu).ok


def test_results_that_move_are_a_race(cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d32f-float32")
    runs = [0]

    def wobble(out: torch.Tensor) -> torch.Tensor:
        runs[0] += 1
        return out * (1 + 1e-7 * (runs[0] % 2))

    verdict = reference.check(PythonKernel(out=wobble), problem, cpu)
    assert not verdict.ok
    assert "a race" in verdict.reason


def test_what_a_kernel_raises_passes_through(cpu: Device) -> None:
    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        reference.check(PythonKernel(out=fail), Problem.parse("b1s8h1d16f"), cpu)


def test_stress_cases_keep_the_traits_and_cover_the_edges() -> None:
    problem = Problem.parse("b4s4096h32/8d80x96c-float16-unaligned")
    cases = reference.stress_cases(problem)
    assert {case.problem.group_size for case in cases} == {4}
    assert all(case.problem.traits == problem.traits for case in cases)
    lengths = [(case.problem.seqlen_q, case.problem.seqlen_k) for case in cases]
    assert any(q > k > 0 for q, k in lengths)
    assert any(k == 0 for _, k in lengths)
    assert any(q == 1 for q, _ in lengths)
    assert {case.layout for case in cases} == {"bshd", "bhsd"}
    assert any(not case.lse for case in cases)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("name", ["b2s50x70h4/2d24c", "b1s9x4h2d16c", "b1s33h2d16x40f"])
def test_exact_agrees_with_pytorch_in_float64(name: str, layout: str, cpu: Device) -> None:
    problem = Problem.parse(name, "float32")
    inputs = make_inputs(problem, cpu, layout=layout)
    out, lse = formula.exact(inputs.q, inputs.k, inputs.v, causal=problem.causal, layout=layout)
    q, k, v = (bshd(t, layout).transpose(1, 2).double() for t in (inputs.q, inputs.k, inputs.v))
    mask = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool)
    if problem.causal:
        mask = mask.tril(problem.seqlen_k - problem.seqlen_q)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    wanted = wanted.masked_fill(~mask.any(1)[:, None], 0.0)
    torch.testing.assert_close(bshd(out, layout).transpose(1, 2), wanted)
    k = k.repeat_interleave(problem.group_size, 1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(problem.head_dim)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_exact_chunks_change_nothing(cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Problem.parse("b1s100h1d16c-float32"), cpu)
    whole = formula.exact(inputs.q, inputs.k, inputs.v, causal=True)
    monkeypatch.setitem(formula._SCORES_BYTES, "cpu", 8 * 100 * 7)
    chunked = formula.exact(inputs.q, inputs.k, inputs.v, causal=True)
    torch.testing.assert_close(chunked, whole, rtol=1e-14, atol=1e-14)


def test_attention_without_keys_is_zero(cpu: Device) -> None:
    inputs = make_inputs(Problem.parse("b1s5x0h2d16f-float32"), cpu)
    out, lse = formula.exact(inputs.q, inputs.k, inputs.v, causal=False)
    assert not out.any()
    assert bool((lse == -math.inf).all())


def test_low_precision_is_rounded_and_near(cpu: Device) -> None:
    for dtype, eps in (("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 2**-24)):
        case = expected.make_case(Problem.parse("b1s128h2d64f", dtype), cpu)
        error = (case.rounded - case.out).norm() / case.out.norm()
        assert eps / 8 < float(error) < 8 * eps
        # Exactly what the dtype can hold.
        assert torch.equal(case.rounded.to(getattr(torch, dtype)).double(), case.rounded)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", ["b2s7x9h4/2d20x36f", "b1s3h2d127f", "b1s3h2d64f"])
def test_inputs_are_as_aligned_as_the_problem_says(name: str, aligned: bool, layout: str) -> None:
    device = devices.for_arch("cpu")
    for dtype in ("float32", "float16"):
        problem = dataclasses.replace(Problem.parse(name, dtype), aligned=aligned)
        inputs = make_inputs(problem, device, layout=layout)
        for tensor in (inputs.q, inputs.k, inputs.v, inputs.out):
            numbers = [tensor.data_ptr(), *(s * tensor.itemsize for s in tensor.stride()[:3])]
            assert tensor.stride(3) == 1
            assert (tensor.data_ptr() % 16 == 0) == aligned
            assert all(number % 16 == 0 for number in numbers) == aligned
        assert bshd(inputs.q, layout).shape == (
            problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim,
        )  # fmt: skip
        assert inputs.lse.is_contiguous()
        assert inputs.out.isnan().all()
        assert inputs.lse.isnan().all()


def test_inputs_follow_the_seed(cpu: Device) -> None:
    problem = Problem.parse("b1s64h2d16f")
    one, same, other = (make_inputs(problem, cpu, seed) for seed in (1, 1, 2))
    assert torch.equal(one.q, same.q)
    assert not torch.equal(one.q, other.q)
    assert float(one.q.float().std()) == pytest.approx(1, abs=0.1)
    assert float(make_inputs(problem, cpu, 1, q_factor=8.0).q.float().std()) > 6
    with pytest.raises(UnknownName, match="hbsd"):
        make_inputs(problem, cpu, 1, "hbsd")


def test_an_output_of_another_shape_is_refused(cpu: Device) -> None:
    case = expected.make_case(Problem.parse("b1s64h2d16f"), cpu)
    assert "shape" in case.compare(torch.zeros(1, 64, 2, 8)).reason


def test_kernels_run_with_the_threads_there_were(cpu: Device) -> None:
    seen: list[int] = []

    def look(out: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return out

    torch.set_num_threads(2)
    assert reference.check(PythonKernel(out=look), Problem.parse("b1s64h2d16f-float32"), cpu).ok
    assert set(seen) == {2}
    assert torch.get_num_threads() == 2

    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        reference.check(PythonKernel(out=fail), Problem.parse("b1s64h2d16f-float32"), cpu)
    assert torch.get_num_threads() == 2
