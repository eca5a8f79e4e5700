"""Does PyTorch's registry of flash attentions take autoflash, and give its kernel back?

There is no CUDA here: calls go to the same kernel, put in place for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library
from torch.nn import attention as registry

from autoflash.integrations import flash_impl, register_torch
from autoflash.runtime import serving

NAME = "aten::_scaled_dot_product_flash_attention"
flash = torch.ops.aten._scaled_dot_product_flash_attention.default
of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def kernels(dispatch_key: str) -> list[str]:
    lines = torch._C._dispatch_dump(NAME).splitlines()
    return [line for line in lines if line.startswith(f"{dispatch_key}:")]


def test_registered_activated_listed_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._registry, "_FLASH_ATTENTION_IMPLS", {})
    before = kernels("CUDA")
    assert register_torch() == "autoflash"
    assert register_torch("second") == "second"
    assert registry.list_flash_attention_impls() == ["autoflash", "second"]
    assert registry.current_flash_attention_impl() is None
    assert kernels("CUDA") == before  # registered is not activated
    for name in ("autoflash", "second", "autoflash"):
        registry.activate_flash_attention_impl(name)
        assert registry.current_flash_attention_impl() == name
        (ours,) = kernels("CUDA")
        assert "flash_impl.py" in ours
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    assert kernels("CUDA") == before


# On the CPU -------------------------------------------------------------------------------------


class PyTorchs:
    """Stands for PyTorch's _flash_attention_forward, which has no CPU kernel, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        self.calls += 1
        dropout_p, is_causal = rest[4], rest[5]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = of_cpu(q, k, v, 0.0, is_causal, scale=options.get("scale"))
        assert dropout_p in (0.0, 0.5)
        seed = torch.zeros(2, dtype=torch.uint64)
        return out.transpose(1, 2), lse, seed, seed[0].clone(), q.new_empty(0)


@pytest.fixture
def pytorchs() -> Iterator[PyTorchs]:
    """Our kernel in PyTorch's dispatcher, and what stands below it."""
    serving.reset()
    below, library = PyTorchs(), Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", below, "CPU")
    handle = flash_impl.activate("CPU")
    assert len(kernels("CPU")) == 1
    yield below
    handle.remove()
    library._destroy()
    assert kernels("CPU") == []
    serving.reset()


_numbers = torch.Generator().manual_seed(0)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_numbers)


def packed() -> tuple[Tensor, ...]:
    return some(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)


def rows_first(heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """As nn.MultiheadAttention has them: (seqlen, batch, num_heads, head_dim) in memory."""
    return tuple(some(17, 2, each, 16).permute(1, 2, 0, 3) for each in (heads, kv_heads, kv_heads))


def placing(x: Tensor) -> list[int]:
    """The strides that place elements: those of a single row, head or batch do not."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


CALLS = {
    "plain": ([some(2, 3, 17, 16) for _ in range(3)], False, None),
    "causal, scaled": ([some(2, 3, 17, 16), some(2, 3, 17, 16), some(2, 3, 17, 16)], True, 0.3),
    "transposed": ([some(2, 17, 3, 16).transpose(1, 2) for _ in range(3)], True, None),
    "packed": (packed(), False, None),
    "rows first": (rows_first(3, 3), True, 0.3),
    "rows first, one sequence": ([x[:1] for x in rows_first(3, 3)], False, None),
    "rows first, grouped": (rows_first(6, 2), False, None),
    "one row": ([some(2, 3, 1, 16), some(2, 3, 17, 16), some(2, 3, 17, 16)], False, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_that_the_operator_returns(name: str, pytorchs: PyTorchs) -> None:
    (q, k, v), is_causal, scale = CALLS[name]
    got = flash(q, k, v, 0.0, is_causal, scale=scale)
    out, lse = of_cpu(q, k, v, 0.0, is_causal, scale=scale)
    torch.testing.assert_close(got[0], out, rtol=0, atol=2e-6)
    torch.testing.assert_close(got[1], lse, rtol=0, atol=2e-6)
    assert pytorchs.calls == 0
    # What torch.compile takes for granted is what comes.
    fake = flash(*(x.to("meta") for x in (q, k, v)), 0.0, is_causal)
    assert got[0].shape == fake[0].shape
    assert placing(got[0]) == placing(torch.empty_like(q))
    assert (got[1].shape, got[1].stride(), got[1].dtype) == (
        fake[1].shape,
        fake[1].stride(),
        torch.float32,
    )
    assert got[2:6] == (None, None, q.shape[2], k.shape[2])
    assert [(x.shape, x.dtype) for x in got[6:]] == [(x.shape, x.dtype) for x in fake[6:]]


def test_pytorchs_backward_takes_what_it_returns(pytorchs: PyTorchs) -> None:
    q, k, v = (x.requires_grad_() for x in (some(2, 3, 17, 16) for _ in range(3)))
    grad = some(2, 3, 17, 16)
    out, lse, *_ = flash(q, k, v, 0.0, True)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    got = backward(grad, q, k, v, out, lse, 0.0, True)
    expected = torch.autograd.grad(of_cpu(q, k, v, 0.0, True)[0], (q, k, v), grad)
    assert pytorchs.calls == 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_what_autoflash_does_not_take_is_pytorchs(
    pytorchs: PyTorchs, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (some(1, 2, 9, 16) for _ in range(3))
    calls = [
        (q, k, v, 0.5),
        (q, k[:, :, :5], v[:, :, :5], 0.0, True),  # rows without keys, of which the lse differs
        (q.double(), k.double(), v.double()),
        (q, *(x[..., :12] for x in (k, v))),  # a mistake, in PyTorch's words
    ]
    for number, call in enumerate(calls[:-1], start=1):
        out, lse = flash(*call)[:2]
        assert out.shape == call[0].shape
        assert lse.shape == (1, 2, 9)
        assert pytorchs.calls == number
    with pytest.raises(RuntimeError):
        flash(*calls[-1])
    monkeypatch.setattr(serving, "call", lambda *_: fallback_call(q))
    flash(q, k, v)  # PyTorch serves for autoflash, and comes back here
    assert pytorchs.calls == len(calls) + 1


def fallback_call(q: Tensor) -> tuple[Tensor, Tensor]:
    """What autoflash does where no kernel could be launched after all."""
    out, lse, *_ = flash(q, q, q)
    return out, lse
