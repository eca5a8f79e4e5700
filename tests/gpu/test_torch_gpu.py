"""Do unmodified models run on autoflash's kernels, by context manager and by PyTorch's registry?

Models have random weights. A result may have twice the error of plain PyTorch in the same
precision, both measured against the same model in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import attention as registry
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflash.integrations import register_torch, route_sdpa
from autoflash.runtime import fallback, serving

pytestmark = pytest.mark.gpu

# Inductor imports parts of PyTorch that warn of themselves.
IMPORTS_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What autoflash serves is served by its kernels, or the test fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("PyTorch served a call that was to be autoflash's")

    serving.reset()
    monkeypatch.setattr(fallback, "attention", refuse)
    torch.manual_seed(0)
    yield
    serving.reset()


@contextmanager
def activated() -> Iterator[list[tuple[int, ...]]]:
    """autoflash as PyTorch's flash attention; gives the shapes of the queries that it served."""
    shapes: list[tuple[int, ...]] = []
    call = serving.call

    def counted(q: Tensor, *rest: Any) -> Any:
        result = call(q, *rest)
        shapes.append(tuple(q.shape))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "call", counted)
        registry.activate_flash_attention_impl(register_torch())
        assert registry.current_flash_attention_impl() == "autoflash"
        try:
            yield shapes
        finally:
            registry.restore_flash_attention_impl()
        assert registry.current_flash_attention_impl() is None


@contextmanager
def flash_only() -> Iterator[None]:
    """F.scaled_dot_product_attention chooses flash attention, and modules choose that function."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def vit() -> tuple[nn.Module, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=16)
    return model.cuda(), torch.randn(4, 3, 224, 224, device="cuda")


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model.cuda(), torch.randn(4, 300, 256, device="cuda")


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int]] = {
    "timm": (vit, 12),
    "nn.TransformerEncoder": (encoder, 3),
}


def exactly(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The same in float64, of a model and an input that bfloat16 holds."""
    return copy.deepcopy(model).double(), x.double()


def in_bfloat16(name: str) -> tuple[nn.Module, Tensor, int]:
    """A model, its input, and how often it attends."""
    make, layers = MODELS[name]
    model, x = make()
    return model.bfloat16(), x.bfloat16(), layers


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    error, other = ((x.double() - exact).norm() / exact.norm() for x in (got, plain))
    assert error <= 2 * other + 1e-3, f"error {error:.3g}, of plain PyTorch {other:.3g}"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_inference_in_a_context(name: str) -> None:
    model, x, layers = in_bfloat16(name)
    model.eval()
    exact_model, exact_x = exactly(model, x)
    exact, plain = exact_model(exact_x), model(x)
    with route_sdpa() as routed:
        got = model(x)
    assert (routed.served, routed.left) == (layers, {})
    assert_as_good(got, plain, exact)


@IMPORTS_TORCHSCRIPT
@pytest.mark.slow
@torch.no_grad()
def test_compiled_inference_in_a_context() -> None:
    model, x, _ = in_bfloat16("timm")
    model.eval()
    exact_model, exact_x = exactly(model, x)
    exact, plain = exact_model(exact_x), model(x)
    assert not serving.prepared
    with route_sdpa():
        got = torch.compile(model)(x)
    assert serving.prepared
    assert_as_good(got, plain, exact)
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_inference_by_the_registry(name: str) -> None:
    model, x, layers = in_bfloat16(name)
    model.eval()
    exact_model, exact_x = exactly(model, x)
    exact = exact_model(exact_x)
    with flash_only():
        plain = model(x)
        with activated() as shapes:
            got = model(x)
        assert len(shapes) == layers
        assert_as_good(got, plain, exact)
        assert torch.equal(model(x), plain)  # PyTorch's own is back
    assert len(shapes) == layers


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of every parameter, for a loss that all outputs are part of."""
    model, x = copy.deepcopy(model), x.detach().clone().requires_grad_()
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    (out * weights.view(out.shape)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_training_by_the_registry_has_the_right_gradients(name: str) -> None:
    model, x, layers = in_bfloat16(name)
    exact = gradients(*exactly(model, x))
    with flash_only():
        plain = gradients(model, x)
        with activated() as shapes:
            got = gradients(model, x)
    assert len(shapes) == layers
    for one, same, reference in zip(got, plain, exact, strict=True):
        assert_as_good(one, same, reference)


@IMPORTS_TORCHSCRIPT
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
def test_compiled_training_by_the_registry(layout: str) -> None:
    """Compiled code takes the strides of outputs for granted."""

    def made() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        if layout == "packed":
            return torch.randn(2, 200, 3, 4, 64, **kind).permute(2, 0, 3, 1, 4).unbind(0)
        if layout == "bshd":
            return tuple(torch.randn(2, 200, 4, 64, **kind).transpose(1, 2) for _ in range(3))
        return tuple(torch.randn(2, 4, 200, 64, **kind) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True).sin()

    def run(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in made()]
        out = call(*leaves)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    exact = run(attend, torch.float64)
    with flash_only():
        plain = run(attend, torch.bfloat16)
        with activated() as shapes:
            got = run(torch.compile(attend, fullgraph=True), torch.bfloat16)
    assert shapes
    assert len(got) == len(exact) == 4
    for one, same, reference in zip(got, plain, exact, strict=True):
        assert_as_good(one, same, reference)
    torch.compiler.reset()


def test_what_no_kernel_takes_is_pytorchs_own_flash_attention() -> None:
    q = torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.bfloat16)
    with flash_only(), activated() as shapes:
        out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        assert shapes == []
        assert out.shape == q.shape
        F.scaled_dot_product_attention(q, q, q)
        assert len(shapes) == 1
