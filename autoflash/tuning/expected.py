"""What must come out of a call, and how far may an output be from it?

The rule is FlashAttention's: the largest error against an exact reference may be at most twice that
of PyTorch doing the same arithmetic in the same precision (three times under a softcap), plus a
rounding term. It is applied to windows of rows one by one, and to their root mean square too: over
a whole causal output the first rows, of magnitude 1, would hide anything that goes wrong in the
last ones, of magnitude 0.01.

Source: `tests/test_flash_attn.py` and `hopper/test_flash_attn.py` of FlashAttention, for the rule.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.tuning import formula
from autoflash.tuning.inputs import Inputs, bshd, first_index, make_inputs

if TYPE_CHECKING:
    import torch

FACTOR, FACTOR_SOFTCAP = 2.0, 3.0
"""Errors allowed, in errors of PyTorch in the same precision; the second under a softcap."""
WINDOW = 64
"""Rows judged together: few enough to be of one magnitude, enough for a steady maximum."""
_FLOOR = {"float32": 1e-5, "float16": 2.5e-4, "bfloat16": 2e-3, "float8_e4m3fn": 2e-3}
"""Relative error always allowed: rounding of the output; in float32 a fast exp2 and large logits
(tf32 is off by 3e-4 and does not pass)."""
_LSE_ATOL = {"float32": 1e-5, "float16": 5e-5, "bfloat16": 5e-5, "float8_e4m3fn": 2e-3}
_LSE_RTOL = 1e-5
_LSE_RTOL_8_BITS = 1e-3
"""Of the largest lse: on sm90 sums of products of 8 bits keep 14 bits or so, counted from the
largest product, however small the sum is."""
_TANH_ERROR = 4e-7
"""Of a tanh made of exp2, near 0; in scores it is this times the softcap."""
_COARSE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.05, "float8_e4m3fn": 0.1}
"""Relative distance from PyTorch's fused attention allowed to each block of rows of the whole
output. Right kernels are 0.005 apart in bfloat16, 0.03 with 8 bits; a tile of keys skipped or taken
twice moves rows by more."""
_MASK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Most memory for the mask by which PyTorch is told of a sliding window."""
_SAMPLE_FLOP = {"cpu": 8e8, "cuda": 4e10}
"""Work put into the exact reference: about 0.1 s on two cores, a few ms on an H200."""
_SAMPLE_HEADS = 16


T = TypeVar("T")


class Check(NamedTuple):
    """The verdict on one output, or on one kernel for one problem.

    Attributes:
        ok: whether everything is right.
        error_ratio: largest error in units of PyTorch's, of which FACTOR are allowed, or
            FACTOR_SOFTCAP; None where nothing could be compared.
        reason: what is wrong first, with both values; empty if nothing.
        max_error: largest absolute error.
        where: the worst element, such as "out[0, 3, 1, 7]", or the first wrong one.
        harmed: whether the kernel wrote where it must not, and may have written anywhere.
    """

    ok: bool
    error_ratio: float | None = None
    reason: str = ""
    max_error: float | None = None
    where: str = ""
    harmed: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs and what must come out of them, exactly at a sample of rows, roughly at all.

    Attributes:
        inputs: the tensors of the call.
        windows: (batch, head, first row) of each window, (windows, 3).
        size: rows of a window.
        out: exact, (windows, size, head_dim_v), float64.
        lse: exact, (windows, size), float64.
        rounded: `out` as PyTorch computes it in the problem's dtype, float64; of 8 bits, where it
            computes nothing: in bfloat16 with weights of 8 bits.
        whole: PyTorch's fused attention of everything, (batch, seqlen_q, num_heads, head_dim_v);
            None where it cannot do the problem without storing all scores.
    """

    inputs: Inputs
    windows: torch.Tensor
    size: int
    out: torch.Tensor
    lse: torch.Tensor
    rounded: torch.Tensor
    whole: torch.Tensor | None

    def compare(
        self, out: torch.Tensor, lse: torch.Tensor | None = None, *, layout: str | None = None
    ) -> Check:
        """Judge an output for these inputs.

        Args:
            out: in `layout`.
            lse: (batch, num_heads, seqlen_q), or None to leave it out.
            layout: of `out`; None means that of the inputs.
        """
        out = bshd(out, layout or self.inputs.layout)
        p = self.inputs.problem
        shape = (p.batch, p.seqlen_q, p.num_heads, p.head_dim_v)
        if tuple(out.shape) != shape:
            return Check(False, reason=f"out has shape {tuple(out.shape)}, not {shape}")
        wrong = out.isnan()
        if bool(wrong.any()):
            where = f"out{first_index(wrong)}"
            return Check(False, reason=f"{where} is NaN", where=where)
        if not len(self.windows):
            return Check(True, error_ratio=0.0, max_error=0.0)
        verdict = self._compare_out(out)
        if verdict.ok and lse is not None:
            verdict = self._compare_lse(lse, verdict)
        if verdict.ok and self.whole is not None:
            verdict = self._compare_whole(out, self.whole, verdict)
        return verdict

    def fingerprint(self) -> tuple[int, ...]:
        """Sums over the bits of inputs and references: tells whether a kernel wrote into them."""
        import torch

        kept = [self.out.view(torch.int64), self.lse.view(torch.int64)]
        if self.whole is not None:
            kept.append(self.whole.view(getattr(torch, f"int{8 * self.whole.element_size()}")))
        return (*self.inputs.fingerprint(), *(int(t.sum()) for t in kept))

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices of batch, head and row that together pick all windows of an output."""
        import torch

        batch, head, first = self.windows[:, :, None].unbind(1)
        return batch, head, first + torch.arange(self.size, device=first.device)

    def _compare_out(self, out: torch.Tensor) -> Check:
        import torch

        batch, head, row = self._rows()
        got = out[batch, row, head].double()
        error, theirs = (got - self.out).abs(), (self.rounded - self.out).abs()
        nearest = self.out.to(out.dtype)
        rounding = (nearest + 0.3 - 0.3 - nearest).abs().double()
        problem = self.inputs.problem
        factor = FACTOR_SOFTCAP if problem.softcapped else FACTOR
        floor = _FLOOR[problem.dtype] + _TANH_ERROR * problem.softcap
        # A share of what is allowed beyond PyTorch's errors; so the ratio's limit is the factor.
        slack = 2 / factor * self._largest(rounding)
        if out.dtype == torch.float32:
            slack += floor / factor * self._largest(self.out.abs())
        unit = self._largest(theirs) + slack
        rms_unit = self._rms(theirs) + floor / factor * self._rms(self.out)
        # 0 / 0 is NaN: only zeros were expected, and only zeros came.
        ratio = (self._largest(error) / unit).nan_to_num(0.0, posinf=math.inf)
        rms_ratio = (self._rms(error) / rms_unit).nan_to_num(0.0, posinf=math.inf)
        worst = torch.maximum(ratio, rms_ratio)
        group = int(worst.argmax())
        share = self._share()
        members = slice(group * share, (group + 1) * share)
        place = int(error[members].argmax()) + members.start * error[0].numel()
        window, offset, dim = (int(i) for i in torch.unravel_index(torch.tensor(place), got.shape))
        b, h, first = self.windows[window].tolist()
        value = float(worst[group])
        verdict = Check(
            ok=value <= factor,
            error_ratio=value if math.isfinite(value) else None,
            max_error=float(error.max()),
            where=f"out[{b}, {first + offset}, {h}, {dim}]",
        )
        if verdict.ok:
            return verdict
        if float(ratio[group]) > factor:
            what, is_, most = "error", float(error[members].max()), factor * float(unit[group])
        else:
            what, is_, most = (
                "root mean square error of its rows",
                float(self._rms(error)[group]),
                factor * float(rms_unit[group]),
            )
        reason = (
            f"{verdict.where} (batch, row, head, dim) is {float(got[window, offset, dim]):.6g}, "
            f"should be {float(self.out[window, offset, dim]):.6g}; {what} {is_:.3g}, allowed "
            f"{most:.3g}"
        )
        return verdict._replace(reason=reason)

    def _share(self) -> int:
        """Windows judged together: so many that there are WINDOW rows or more."""
        return -(-WINDOW // self.size)

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """One row of elements per group of windows; the last group is filled by repetition."""
        import torch

        share, count = self._share(), len(values)
        groups = -(-count // share)
        index = torch.arange(groups * share, device=values.device).clamp_max(count - 1)
        return values[index].reshape(groups, -1)

    def _largest(self, values: torch.Tensor) -> torch.Tensor:
        return self._grouped(values).amax(1)

    def _rms(self, values: torch.Tensor) -> torch.Tensor:
        return self._grouped(values).square().mean(1).sqrt()

    def _compare_lse(self, lse: torch.Tensor, verdict: Check) -> Check:
        import torch

        batch, head, row = self._rows()
        got = lse[batch, head, row].double()
        problem = self.inputs.problem
        atol = _LSE_ATOL[problem.dtype] + _TANH_ERROR * problem.softcap
        if problem.element_size == 1:
            largest = self.lse.nan_to_num(neginf=0.0).abs().max()
            atol = max(atol, _LSE_RTOL_8_BITS * float(largest))
        wrong = ~torch.isclose(got, self.lse, rtol=_LSE_RTOL, atol=atol)
        if not bool(wrong.any()):
            return verdict
        window, offset = first_index(wrong)
        b, h, first = self.windows[window].tolist()
        where = f"lse[{b}, {h}, {first + offset}]"
        reason = (
            f"{where} (batch, head, row) is {float(got[window, offset]):.8g}, should be "
            f"{float(self.lse[window, offset]):.8g}"
        )
        return verdict._replace(ok=False, reason=reason, where=where)

    def _compare_whole(self, out: torch.Tensor, whole: torch.Tensor, verdict: Check) -> Check:
        distance = _distance(out, whole)
        limit = _COARSE[self.inputs.problem.dtype]
        if not bool((distance > limit).any()):
            return verdict
        b, block, h = first_index(distance > limit)
        row = block * WINDOW
        where = f"out[{b}, {row}, {h}, 0]"
        reason = (
            f"{where} (batch, row, head, dim) is {float(out[b, row, h, 0]):.6g}, PyTorch's "
            f"{float(whole[b, row, h, 0]):.6g}; these {WINDOW} rows are relatively "
            f"{float(distance[b, block, h]):.2g} apart, allowed {limit:.2g}"
        )
        return verdict._replace(ok=False, reason=reason, where=where)


def _distance(out: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Relative distance of each block of WINDOW rows of each head: (batch, blocks, heads)."""
    import torch

    blocks = -(-out.shape[1] // WINDOW)
    totals = []
    for values in (out.float() - other.float(), other.float()):
        squares = values.square().sum(-1)
        squares = torch.nn.functional.pad(squares, (0, 0, 0, blocks * WINDOW - out.shape[1]))
        totals.append(squares.view(len(out), blocks, WINDOW, -1).sum(2))
    return torch.sqrt(totals[0] / totals[1].clamp_min(1e-30))


def _whole(inputs: Inputs) -> torch.Tensor | None:
    """PyTorch's fused attention in (batch, seqlen, heads, dim), or None where there is none."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    p = inputs.problem
    causal = p.causal and p.seqlen_q > 1
    if not (p.batch and p.seqlen_q and p.seqlen_k) or p.softcapped:
        return None
    mask = None
    if p.local:
        # Rows that see nothing are wrong in some of its kernels.
        if p.seqlen_q > p.seqlen_k or p.seqlen_q * p.seqlen_k > _MASK_BYTES[inputs.q.device.type]:
            return None
        seen = _seen(p, torch.arange(p.seqlen_q, device=inputs.q.device))
        mask = ~formula.hidden(seen, p.seqlen_k)
    elif causal and p.seqlen_q != p.seqlen_k:
        return None
    dtype = getattr(torch, p.out_dtype)
    tensors = [bshd(t, inputs.layout) for t in (inputs.q, inputs.k, inputs.v)]
    if not p.aligned:  # PyTorch's kernels read 16 bytes at once from wherever a tensor begins
        tensors = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    q, k, v = (t.transpose(1, 2) for t in formula.descaled(tensors, inputs.descales, dtype))
    fused = [
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
    ]  # fmt: skip
    try:
        with warnings.catch_warnings(), sdpa_kernel(fused), torch.no_grad():
            warnings.simplefilter("ignore")  # PyTorch warns of each backend that cannot
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal and mask is None,
                scale=inputs.softmax_scale,
                enable_gqa=p.group_size > 1,
            )
    except RuntimeError:
        return None
    return out.transpose(1, 2)


def _seen(problem: Problem, rows: torch.Tensor) -> torch.Tensor:
    """What keys rows of a problem see (formula.visible)."""
    p = problem
    return formula.visible(rows, p.seqlen_q, p.seqlen_k, p.causal, p.window_left, p.window_right)


def make_case(
    problem: Problem,
    device: Device,
    seed: int = 0,
    layout: str = "bshd",
    *,
    q_factor: float | None = None,
    whole: bool = True,
) -> Case:
    """Inputs for a problem, and what must come out of them.

    Args:
        problem: what is asked.
        device: where it runs; the reference is computed there too.
        seed: of the inputs and of the choice of rows.
        layout: of the inputs.
        q_factor: as in make_inputs; None: the usual one.
        whole: whether to compare all rows with PyTorch's fused attention, where there is one.
    """
    import torch

    if q_factor is None:
        q_factor = usual_q_factor(problem)
    inputs = make_inputs(problem, device, seed, layout, q_factor=q_factor)
    where = inputs.q.device
    size, windows = _choose_windows(problem, _SAMPLE_FLOP[where.type], seed)
    tensors = [bshd(tensor, layout) for tensor in (inputs.q, inputs.k, inputs.v)]
    exactly = low = tensors
    weights_dtype = None
    if inputs.descales:
        # 32 bits round a product with a descale by 6e-8, far less than anything rounds here.
        exactly = formula.descaled(tensors, inputs.descales, torch.float32)
        low = formula.descaled(tensors, inputs.descales, getattr(torch, problem.out_dtype))
        weights_dtype = inputs.q.dtype
    outs, lses, rounded = [], [], []
    with torch.no_grad(), formula.no_tf32():
        for (b, h), firsts in windows.items():
            rows = torch.tensor(firsts, device=where)[:, None] + torch.arange(size, device=where)
            rows = rows.flatten()
            kv = h // problem.group_size
            how = (_seen(problem, rows), inputs.softmax_scale, problem.softcap)
            q, k, v = exactly
            out, lse = formula.exact_rows(q[b, rows, h], k[b, :, kv], v[b, :, kv], *how)
            outs.append(out.view(-1, size, problem.head_dim_v))
            lses.append(lse.view(-1, size))
            q, k, v = low
            head = (q[b, rows, h], k[b, :, kv], v[b, :, kv], *how)
            near = formula.low_precision_rows(*head, weights_dtype=weights_dtype)
            rounded.append(near.double().view_as(outs[-1]))
    nothing = torch.empty(0, size, problem.head_dim_v, dtype=torch.float64, device=where)
    places = [(b, h, first) for (b, h), firsts in windows.items() for first in firsts]
    case = Case(
        inputs=inputs,
        windows=torch.tensor(places, dtype=torch.int64, device=where).view(-1, 3),
        size=size,
        out=torch.cat(outs or [nothing]),
        lse=torch.cat(lses or [nothing[..., 0]]),
        rounded=torch.cat(rounded or [nothing]),
        whole=None,
    )
    everything = _whole(inputs) if whole else None
    # A measure must itself be right; one that is not is left out.
    if everything is None or not case.compare(everything, layout="bshd").ok:
        return case
    return dataclasses.replace(case, whole=everything)


def usual_q_factor(problem: Problem) -> float:
    """What q is multiplied by: scores then have a standard deviation of 1 or more.

    Under a softcap it is a quarter of that, so that the cap shows (as in FlashAttention's tests).
    """
    return max(1.0, problem.softcap / 4)


def _choose_windows(
    problem: Problem, flop: float, seed: int
) -> tuple[int, dict[tuple[int, int], list[int]]]:
    """Rows of a window, and (batch, head) -> first rows of its windows.

    All rows where the work allows it, else those of a few heads, the first and the last among them,
    and in each head the first and last rows and others drawn at random.
    """
    p = problem
    if not (p.batch and p.seqlen_q):
        return 1, {}
    size = min(WINDOW, p.seqlen_q)
    firsts = [*range(0, p.seqlen_q - size, size), p.seqlen_q - size]
    heads = [(b, h) for b in range(p.batch) for h in range(p.num_heads)]
    each = 2.0 * size * max(p.seqlen_k, 1) * (p.head_dim + p.head_dim_v)
    affordable = int(flop / each)
    draw = random.Random(seed)
    if affordable < len(heads) * len(firsts):
        heads = _ends_and(draw, heads, max(2, min(_SAMPLE_HEADS, affordable // 4)))
    per_head = max(3, affordable // len(heads))
    return size, {head: _ends_and(draw, firsts, per_head) for head in heads}


def _ends_and(draw: random.Random, items: list[T], count: int) -> list[T]:
    """`count` of the items in their order: the first, the last and others drawn."""
    if count >= len(items):
        return items
    between = draw.sample(range(1, len(items) - 1), max(0, count - 2))
    return [items[i] for i in (0, *sorted(between), len(items) - 1)]
