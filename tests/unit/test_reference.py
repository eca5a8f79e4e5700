from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
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

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
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
        *,
        problem: Problem | None = None,
        descales: Sequence[torch.Tensor | None] = (),
    ) -> None:
        self.problems.append((*q.shape, *k.shape))
        qt, kt, vt = (bshd(t, layout).transpose(1, 2).float() for t in (q, k, v))
        group = qt.shape[1] // kt.shape[1]
        kt, vt = kt.repeat_interleave(group, 1), vt.repeat_interleave(group, 1)
        kt = self._step("heads", kt, group)
        if descales:
            factors = [self._step("descale", d, index) for index, d in enumerate(descales)]
            wide = [d.repeat_interleave(group, 1)[:, :, None, None] for d in factors]
            qt, kt, vt = qt * wide[0], kt * wide[1], vt * wide[2]
        scores = self._step("scores", qt @ kt.transpose(2, 3) * softmax_scale)
        if problem is not None and problem.softcapped:
            capped = problem.softcap * torch.tanh(scores / problem.softcap)
            scores = self._step("softcap", capped, scores)
        shift = kt.shape[2] - qt.shape[2]
        rows, keys = torch.arange(qt.shape[2])[:, None], torch.arange(kt.shape[2])
        hidden = torch.zeros(len(rows), len(keys), dtype=torch.bool)
        if problem is not None and problem.causal:
            hidden = self._step("hidden", keys > rows + shift, rows, keys)
        if problem is not None and problem.window_right is not None:
            after = keys > rows + shift + problem.window_right
            hidden = hidden | self._step("after", after, rows + shift, keys)
        if problem is not None and problem.window_left is not None:
            before = keys < rows + shift - problem.window_left
            hidden = hidden | self._step("before", before, rows + shift, keys)
        scores = scores.masked_fill(hidden, -math.inf)
        scores = self._step("masked", scores)
        if "weights" in self.steps:
            made = self._step("weights", scores) @ vt
        elif q.dtype == torch.float8_e4m3fn and len(keys):
            weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
            total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
            made = weights.to(q.dtype).float() @ vt / total
        else:
            made = torch.softmax(scores, -1).nan_to_num(0.0) @ vt
        made = self._step("out", made.to(out.dtype)).transpose(1, 2)
        bshd(out, layout).copy_(made)
        if lse is not None:
            lse.copy_(self._step("lse", scores.logsumexp(-1)))
        if "memory" in self.steps:
            self.steps["memory"](q, k, v, out, lse)


CASES = (
    "b1s300h2d64c-float32",
    "b1s300h2d64f-bfloat16",
    "b2s130x200h4/2d40c-float16",
    "b1s200x90h2d24x56c-bfloat16",
    "b1s1x700h8/1d128c-float32",
    "b1s65h2d64f-float32-unaligned",
    "b2s77h2d256c-bfloat16-unaligned",
    "b1s300h4/2d64cw70-bfloat16",
    "b1s200x260h2d64fw30x9-float16",
    "b1s260x200h2d40fwinfx20-float32",
    "b1s300h2d64fw0xinf-bfloat16",
    "b1s300h2d64ccap50-bfloat16",
    "b1s150x90h4/2d64cw33cap15-float16",
    "b1s200h2d64fcap1.5-float32",
    "b1s300h4/2d64c-float8_e4m3fn",
    "b1s90x200h2d128x64f-float8_e4m3fn",
    "b2s200h2d64cw40cap30-float8_e4m3fn",
    "b1s70h2d40f-float8_e4m3fn-unaligned",
)


@pytest.mark.parametrize("name", CASES)
def test_a_right_kernel_passes(name: str, cpu: Device) -> None:
    problem = Problem.parse(name)
    kernel = PythonKernel()
    verdict = reference.check(kernel, problem, cpu)
    assert verdict.ok, verdict.reason
    assert verdict.error_ratio is not None
    assert 0 < verdict.error_ratio < 1.5  # of 2 or 3: right kernels are not close to the limit
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
    verdict = reference.check(PythonKernel(**steps), problem, cpu)
    assert not verdict.ok, mistake
    assert verdict.reason.startswith("test/python, b")
    assert dtype in verdict.reason


Steps = dict[str, Callable[..., object]]


def _refused(name: str, cpu: Device, **steps: Callable[..., object]) -> str:
    verdict = reference.check(PythonKernel(**steps), Problem.parse(name), cpu)
    assert not verdict.ok
    return verdict.reason


@pytest.mark.parametrize(
    ("mistake", "steps"),
    [
        ("sees no window", {"before": lambda hidden, place, keys: hidden & False}),
        ("sees one key more", {"before": lambda hidden, place, keys: hidden.roll(-1, 0)}),
        ("sees one key less", {"before": lambda hidden, place, keys: hidden.roll(1, 1)}),
        ("sees nothing to the left", {"before": lambda hidden, place, keys: keys < place}),
        ("forgets what is after", {"after": lambda hidden, place, keys: hidden & False}),
        ("sees one key less after", {"after": lambda hidden, place, keys: hidden.roll(-1, 1)}),
        ("is causal too", {"after": lambda hidden, place, keys: keys > place}),
        ("gives empty rows the mean", {"weights": lambda scores: _mean_where_empty(scores)}),
        ("gives empty rows NaN", {"weights": lambda scores: torch.softmax(scores, -1)}),
    ],
)
@pytest.mark.parametrize("name", ["b1s2048h2d32fw1023x512-float32", "b1s512h2d32fw60x40-bfloat16"])
def test_a_wrong_window_is_found_out(mistake: str, steps: Steps, name: str, cpu: Device) -> None:
    assert _refused(name, cpu, **steps), mistake


def _mean_where_empty(scores: torch.Tensor) -> torch.Tensor:
    keys = max(scores.shape[-1], 1)
    return torch.softmax(scores, -1).nan_to_num(1.0 / keys)


@pytest.mark.parametrize("name", ["b1s256h2d64ccap50-bfloat16", "b1s256h2d64fcap20-float32"])
@pytest.mark.parametrize(
    ("mistake", "steps"),
    [
        ("caps nothing", {"softcap": lambda capped, scores: scores}),
        ("cuts instead", {"softcap": lambda capped, scores: scores.clamp(-20.0, 20.0)}),
        ("has a tanh by series", {"softcap": lambda capped, s: s - s**3 / 3 / 20.0**2}),
    ],
)
def test_a_wrong_softcap_is_found_out(mistake: str, steps: Steps, name: str, cpu: Device) -> None:
    assert _refused(name, cpu, **steps), mistake


@pytest.mark.parametrize(
    ("mistake", "steps"),
    [
        ("has no descale of q", {"descale": lambda d, index: d if index else torch.ones_like(d)}),
        ("swaps heads' descales", {"descale": lambda d, index: d.flip(1) if index == 2 else d}),
        ("forgets a tile of keys", {"masked": _one_tile_less}),
        ("scales by 1.02 more", {"scores": lambda scores: scores * 1.02}),
        ("gives lse without descales", {"lse": lambda lse: lse * 0.9}),
    ],
)
def test_a_wrong_kernel_of_8_bits_is_found_out(mistake: str, steps: Steps, cpu: Device) -> None:
    assert "float8" in _refused("b1s300h4/2d64c-float8_e4m3fn", cpu, **steps), mistake


def test_what_softcap_allows_is_three_errors_not_two(cpu: Device) -> None:
    found = []
    for name in ("b1s128h1d64f-bfloat16", "b1s128h1d64fcap1e6-bfloat16"):
        case = expected.make_case(Problem.parse(name), cpu, q_factor=1.0, whole=False)
        # An output of 2.5 errors of PyTorch's in each element, rounding apart.
        out = case.out.clone()
        out += 2.5 * (case.rounded - case.out)
        verdict = case.compare(out.reshape(1, 128, 1, 64))
        assert verdict.error_ratio is not None
        assert 2 < verdict.error_ratio < 3
        found.append(verdict.ok)
    assert found == [False, True]


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


@pytest.mark.parametrize(
    "name",
    [
        "b4s4096h32/8d80x96c-float16-unaligned",
        "b4s4096h32/8d128cw1023-bfloat16",
        "b4s4096h32/8d128fw128x128-bfloat16",
        "b4s4096h32/8d256ccap50-bfloat16",
        "b4s4096h32/8d128f-float8_e4m3fn",
    ],
)
def test_stress_cases_keep_the_traits_and_cover_the_edges(name: str) -> None:
    problem = Problem.parse(name)
    cases = reference.stress_cases(problem)
    assert {case.problem.group_size for case in cases} == {4}
    for case in cases:
        differing = {t for t, value in problem.traits.items() if case.problem.traits[t] != value}
        # A window that hides nothing is none; a kernel for windows can do that too.
        assert differing <= ({"local"} if problem.local else set())
        assert case.problem.softcap == problem.softcap
    lengths = [(case.problem.seqlen_q, case.problem.seqlen_k) for case in cases]
    assert any(q > k > 0 for q, k in lengths)
    assert any(k == 0 for _, k in lengths)
    assert any(q == 1 for q, _ in lengths)
    assert {case.layout for case in cases} == {"bshd", "bhsd"}
    assert any(not case.lse for case in cases)


@pytest.mark.parametrize("mask", ["cw1023", "fw128x128", "fwinfx5"])
def test_stress_cases_cover_the_edges_of_windows(mask: str) -> None:
    problem = Problem.parse(f"b4s4096h32/8d128{mask}")
    cases = [case.problem for case in reference.stress_cases(problem) if case.problem.local]
    assert any(p.window_left == 0 for p in cases)  # of one key, if causal
    assert any(p.seqlen_q == 1 for p in cases)
    seen = [formula.visible(torch.arange(p.seqlen_q), *_mask(p)) for p in cases]
    firsts, ends = zip(*(s.unbind(1) for s in seen), strict=True)
    assert any(bool((first >= end).any()) for first, end in zip(firsts, ends, strict=True))
    assert any(int((first >= end).sum()) > 256 for first, end in zip(firsts, ends, strict=True))
    assert any(int(first.min()) > 256 for first in firsts)
    if not problem.causal:
        short = zip(cases, ends, strict=True)
        assert any(p.seqlen_k - int(end.min()) > 128 for p, end in short if int(end.min()))


def _mask(p: Problem) -> tuple[int, int, bool, int | None, int | None]:
    return p.seqlen_q, p.seqlen_k, p.causal, p.window_left, p.window_right


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    "name",
    [
        "b2s50x70h4/2d24c", "b1s9x4h2d16c", "b1s33h2d16x40f", "b1s50x70h4/2d24cw7",
        "b1s40x9h2d16fw3x6", "b1s40h2d16fw0xinf", "b1s50x70h4/2d24cw9cap2", "b1s9h2d16fcap0.5",
    ],
)  # fmt: skip
def test_exact_agrees_with_pytorch_in_float64(name: str, layout: str, cpu: Device) -> None:
    problem = Problem.parse(name, "float32")
    inputs = make_inputs(problem, cpu, layout=layout, q_factor=3.0)
    out, lse = formula.exact(
        inputs.q, inputs.k, inputs.v, causal=problem.causal, window_left=problem.window_left,
        window_right=problem.window_right, softcap=problem.softcap, layout=layout,
    )  # fmt: skip
    q, k, v = (bshd(t, layout).transpose(1, 2).double() for t in (inputs.q, inputs.k, inputs.v))
    k, v = (t.repeat_interleave(problem.group_size, 1) for t in (k, v))
    mask = torch.tensor(
        [
            [_sees(problem, row, key) for key in range(problem.seqlen_k)]
            for row in range(problem.seqlen_q)
        ]
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(problem.head_dim)
    if problem.softcapped:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    wanted = (torch.softmax(scores, -1) @ v).masked_fill(~mask.any(1)[:, None], 0.0)
    torch.testing.assert_close(bshd(out, layout).transpose(1, 2), wanted)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    naive = formula.naive(
        q, k, v, causal=problem.causal, window_left=problem.window_left,
        window_right=problem.window_right, softcap=problem.softcap,
        softmax_scale=inputs.softmax_scale,
    )  # fmt: skip
    torch.testing.assert_close(naive, wanted)


def _sees(p: Problem, row: int, key: int) -> bool:
    """The definition, pair by pair."""
    ahead = key - (row + p.seqlen_k - p.seqlen_q)
    right = 0 if p.causal else p.window_right
    return (right is None or ahead <= right) and (p.window_left is None or -ahead <= p.window_left)


def test_exact_takes_descales(cpu: Device) -> None:
    inputs = make_inputs(Problem.parse("b2s30x40h4/2d16c-float8_e4m3fn"), cpu)
    assert [tuple(d.shape) for d in inputs.descales] == [(2, 2)] * 3
    given = (inputs.q, inputs.k, inputs.v)
    out, lse = formula.exact(*given, causal=True, descales=inputs.descales)
    wide = []
    for tensor, descale in zip(given, inputs.descales, strict=True):
        made = tensor.double()
        for b in range(2):
            for h in range(made.shape[2]):
                made[b, :, h] *= float(descale[b, h // (made.shape[2] // 2)])
        wide.append(made)
    torch.testing.assert_close((out, lse), formula.exact(*wide, causal=True))
    without = formula.exact(*given, causal=True, descales=(None, None, inputs.descales[2]))
    torch.testing.assert_close(without[1], formula.exact(*given, causal=True)[1])
    assert not torch.allclose(without[0], formula.exact(*given, causal=True)[0])


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
    nothing = torch.zeros(5, 2, dtype=torch.int64)
    head = (inputs.q[0, :, 0], inputs.k[0, :, 0], inputs.v[0, :, 0], nothing, 0.25)
    for weights in (None, torch.float8_e4m3fn):
        rounded = formula.low_precision_rows(*head, weights_dtype=weights)
        assert torch.equal(rounded, torch.zeros(5, 16))


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


def test_inputs_of_8_bits(cpu: Device) -> None:
    problem = Problem.parse("b3s70h8/2d64f-float8_e4m3fn")
    inputs = make_inputs(problem, cpu)
    assert {t.dtype for t in (inputs.q, inputs.k, inputs.v)} == {torch.float8_e4m3fn}
    assert inputs.out.dtype == torch.bfloat16
    assert inputs.out.isnan().all()
    assert float(inputs.k.float().std()) == pytest.approx(1, abs=0.1)
    for descale in inputs.descales:
        assert descale.shape == (3, 2)
        assert descale.dtype == torch.float32
        assert len(descale.unique()) == 6
        assert 0.5 <= float(descale.min()) < float(descale.max()) <= 2
    assert len({float(descale[0, 0]) for descale in inputs.descales}) == 3
    larger = make_inputs(problem, cpu, q_factor=8.0)
    torch.testing.assert_close(larger.descales[0], 8 * inputs.descales[0])
    assert torch.equal(larger.q.float(), inputs.q.float())
    before = inputs.fingerprint()
    inputs.descales[2][1, 1] += 1
    assert inputs.fingerprint() != before
    assert make_inputs(Problem.parse("b1s8h1d16f"), cpu).descales == ()


def test_a_cap_shows_in_a_case_and_not_in_inputs_to_time(cpu: Device) -> None:
    problem = Problem.parse("b1s256h2d64ccap50-bfloat16")
    assert float(make_inputs(problem, cpu).q.float().std()) == pytest.approx(1, abs=0.1)
    case = expected.make_case(problem, cpu)
    assert float(case.inputs.q.float().std()) == pytest.approx(12.5, abs=0.5)
    assert case.whole is None  # PyTorch has no fused one


@pytest.mark.parametrize(
    "name",
    ["b1s300h2d64cw70-float32", "b1s300h4/2d64fw90x3-bfloat16", "b1s300h2d64f-float8_e4m3fn"],
)
def test_windows_and_8_bits_are_compared_with_pytorch(name: str, cpu: Device) -> None:
    problem = Problem.parse(name)
    case = expected.make_case(problem, cpu)
    assert case.whole is not None
    assert case.whole.dtype == getattr(torch, problem.out_dtype)
    assert case.compare(case.whole).ok
    spoilt = dataclasses.replace(case, windows=case.windows[:1])
    out = case.whole.clone()
    out[0, 130:190, 1] *= 1.5
    verdict = dataclasses.replace(
        spoilt, out=case.out[:1], lse=case.lse[:1], rounded=case.rounded[:1]
    ).compare(out)
    assert "PyTorch's" in verdict.reason
    assert verdict.where == "out[0, 128, 1, 0]"


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
