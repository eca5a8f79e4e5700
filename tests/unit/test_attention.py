"""autoflash.attention from tensors to launch, on the CPU, with a kernel written in Python."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import autoflash
from autoflash.build import Artifact, Kernel, Launch, Resources
from autoflash.codegen import ops
from autoflash.codegen.catalog import Catalog
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.device import Device, native
from autoflash.errors import BuildError, DatabaseCorrupt, InvalidInput, UnsupportedProblem
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.runtime import fallback, prepare, request, serving
from autoflash.runtime import options as options_of
from autoflash.runtime.dispatch import Dispatcher

TEMPLATE = """{#---
summary = "A kernel for tests: what runs is Python in tests/unit/test_attention.py."
source  = "this test"
op      = "OP"

[accepts]
"device is a CPU" = "device.arch == 'cpu'"
"head_dim is a multiple of 8 up to 256" = "problem.head_dim % 8 == 0 and problem.head_dim <= 256"

[tunables]
block_m = [32, 64]

[default]
block_m = 64
---#}
{{ "causal" if problem.causal else "full" }} {{ block_m }}
{{ "local" if problem.local else "" }}
{{ "capped" if problem.softcapped else "" }}
"""


class PythonKernel(Kernel):
    """Attention in float64 by its definition, on memory at the addresses that it is given."""

    def __init__(self, source: Source, device: Device) -> None:
        resources = Resources(compile_s=0.0, binary_bytes=0)
        super().__init__(Artifact(source, device.arch, source.digest, Path(), resources))
        self.launches: list[tuple[Any, ...]] = []
        self.prepared: list[dict[str, Any]] = []

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        source = self.artifact.source
        op = ops.get(source.op)
        names = [argument.name for argument in op.scalars]
        bound: dict[str, Any] = dict(zip(names, scalars, strict=True))
        self.prepared.append(bound)
        marks = source.text.split()
        window: tuple[int | None, int | None] = (None, 0 if "causal" in marks else None)
        if "local" in marks:  # bounds alone say it then, whether it is causal or not
            window = (bound["window_left"], bound["window_right"])

        def view(address: int, name: str, seqlen: int, heads: int, dim: int) -> torch.Tensor:
            dtype = getattr(torch, source.dtype)
            if name == "out" and dtype.itemsize == 1:
                dtype = torch.bfloat16
            strides = [bound[f"{name}_stride_{axis}"] for axis in ("batch", "seq", "head")]
            if source.aligned:
                assert address % 16 == 0
                assert all(stride * dtype.itemsize % 16 == 0 for stride in strides)
            shape = (bound["batch"], seqlen, heads, dim)
            reach = 1 + sum((n - 1) * step for n, step in zip(shape, [*strides, 1], strict=True))
            memory = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
            return torch.frombuffer(memory, dtype=dtype).as_strided(shape, [*strides, 1])

        def launch(*arguments: Any) -> None:
            q_at, k_at, v_at, out_at, lse_at, *descales_at, scale, num_threads = arguments
            self.launches.append(arguments)
            assert len(arguments) == len(op.pointers) + 2
            assert num_threads == torch.get_num_threads()
            sizes = (bound["seqlen_q"], bound["num_heads"])
            kv_sizes = (bound["seqlen_k"], bound["num_kv_heads"])
            dim, dim_v = DIMS["fwd"]
            out = view(out_at, "out", *sizes, dim_v)
            inputs = [
                view(q_at, "q", *sizes, dim),
                view(k_at, "k", *kv_sizes, dim),
                view(v_at, "v", *kv_sizes, dim_v),
            ]
            for index, address in enumerate(descales_at):
                if address:
                    factors = (bound["batch"], bound["num_kv_heads"])
                    memory = (ctypes.c_char * (4 * math.prod(factors))).from_address(address)
                    descale = torch.frombuffer(memory, dtype=torch.float32).view(factors)
                    inputs[index] = scaled(inputs[index], descale)
            wanted, lse = by_definition(
                inputs[0], inputs[1], inputs[2], False, scale,
                window, bound["softcap"] if "capped" in marks else 0.0,
            )  # fmt: skip
            out.copy_(wanted)
            if lse_at:
                memory = (ctypes.c_char * (4 * lse.numel())).from_address(lse_at)
                torch.frombuffer(memory, dtype=torch.float32).copy_(lse.flatten())

        return launch


# Parts of PyTorch warn of themselves when they are imported.
IMPORTS_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

DIMS: dict[str, tuple[int, int]] = {}
"""(head_dim, head_dim_v) of the kernel, which a real one would have compiled in."""


def scaled(x: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen, heads, dim) in float64, times a factor for each sequence and kv head."""
    factors = descale.double().repeat_interleave(x.shape[2] // descale.shape[1], 1)
    return x.double() * factors[:, None, :, None]


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, seqlen, heads, dim) and lse (batch, heads, seqlen) in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left = seqlen_k if window[0] is None else window[0]
    right = 0 if causal else seqlen_q if window[1] is None else window[1]
    sees = [
        [-left <= j - (i + seqlen_k - seqlen_q) <= right for j in range(seqlen_k)]
        for i in range(seqlen_q)
    ]
    sees_key = torch.tensor(sees, dtype=torch.bool).reshape(seqlen_q, seqlen_k)
    scores = scores.masked_fill(~sees_key, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None].masked_fill(lse[..., None].isinf(), 0.0))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


class Bench:
    """The process's own serving, with Python kernels on the CPU and records to choose."""

    def __init__(self, root: Path) -> None:
        (root / "cpp").mkdir()
        for op in ops.OPS:
            (root / f"cpp/{op}.cpp.jinja").write_text(TEMPLATE.replace('"OP"', f'"{op}"'))
        self.catalog = Catalog.load(root)
        self.records: list[Record] = []
        self.kernels: list[PythonKernel] = []
        self.fail: Callable[[Source], None] = lambda source: None

    def build(self, source: Source, device: Device) -> Kernel:
        self.fail(source)
        self.kernels.append(PythonKernel(source, device))
        return self.kernels[-1]

    def dispatcher(self) -> Dispatcher:
        return Dispatcher(native(), lambda: self.records, self.catalog, self.build)

    @property
    def launches(self) -> int:
        return sum(len(kernel.launches) for kernel in self.kernels)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    serving.reset()
    serving.use("cpu", 0, made.dispatcher())
    DIMS["fwd"] = (16, 16)
    yield made
    serving.reset()


@pytest.fixture
def _only_pytorch() -> Iterator[None]:
    serving.reset()
    yield
    serving.reset()


def tensors(
    seqlen_q: int = 5,
    seqlen_k: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dim_v: int = 16,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    layout: str = "bshd",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    DIMS["fwd"] = (dim, dim_v)
    shapes = ((seqlen_q, heads, dim), (seqlen_k, kv_heads, dim), (seqlen_k, kv_heads, dim_v))
    made = [torch.randn(batch, *shape).to(dtype) for shape in shapes]
    if layout == "bhsd":
        made = [tensor.transpose(1, 2).contiguous() for tensor in made]
    return made[0], made[1], made[2]


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = (-1, -1) if window_size is None else window_size
    left, right = (None if bound == -1 else bound for bound in bounds)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    if layout == "bhsd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = by_definition(
        q.detach(), k.detach(), v.detach(), causal, scale, (left, right), softcap
    )
    return (out.transpose(1, 2) if layout == "bhsd" else out).to(q.dtype), lse.float()


def agree(
    got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]
) -> None:
    torch.testing.assert_close(
        got[0], wanted[0], atol=2e-2 if got[0].itemsize == 2 else 1e-5, rtol=0
    )
    torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=1e-5)


SIZES = [(1, 1), (5, 7), (7, 5), (1, 6), (6, 1), (4, 4)]


# What is served ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_a_kernel_gets_what_it_needs(
    bench: Bench, seqlen_q: int, seqlen_k: int, causal: bool, layout: str
) -> None:
    q, k, v = tensors(seqlen_q, seqlen_k, dim_v=24, layout=layout)
    result = autoflash.attention(q, k, v, causal=causal, return_lse=True, layout=layout)
    agree(result, expected(q, k, v, causal=causal, layout=layout))
    assert bench.launches == 1
    again = autoflash.attention(q, k, v, causal=causal, layout=layout)
    assert torch.equal(again, result[0])
    assert again.is_contiguous()
    assert bench.launches == 2
    assert bench.kernels[0].launches[1][4] == 0  # no lse wanted: a null pointer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_templates(bench: Bench, dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype=dtype)
    out, lse = autoflash.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    agree((out, lse), expected(q, k, v))
    assert bench.launches == 1


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
@pytest.mark.usefixtures("bench")
def test_pytorch_serves_the_same_semantics(
    seqlen_q: int, seqlen_k: int, kv_heads: int, causal: bool, layout: str
) -> None:
    q, k, v = tensors(
        seqlen_q, seqlen_k, kv_heads=kv_heads, dim=12, dim_v=20, dtype=torch.float64, layout=layout
    )
    with pytest.warns(RuntimeWarning, match="no template takes dtype float64"):
        result = autoflash.attention(q, k, v, causal=causal, return_lse=True, layout=layout)
    agree(result, expected(q, k, v, causal=causal, layout=layout))
    alone = autoflash.attention(q, k, v, causal=causal, layout=layout)
    assert torch.equal(alone, result[0])
    assert alone.is_contiguous()


def test_the_lse_of_pytorch_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(9, 7)
    monkeypatch.setattr(fallback, "_SCORES_AT_ONCE", 2 * 4 * 7 * 2)  # two rows at a time
    lse = fallback.attention(
        q, k, v, causal=True, softmax_scale=0.25, return_lse=True, layout="bshd"
    )[1]
    torch.testing.assert_close(lse, expected(q, k, v, causal=True)[1])


def test_a_head_dim_that_no_template_takes_is_served_by_pytorch(bench: Bench) -> None:
    q, k, v = tensors(dim=12, dim_v=12)
    with pytest.warns(RuntimeWarning, match="multiple of 8 up to 256") as told:
        result = autoflash.attention(q, k, v, return_lse=True)
    assert len(told) == 1
    autoflash.attention(*tensors(6, 6, dim=12, dim_v=12))  # told once: a warning is an error here
    agree(result, expected(q, k, v))
    assert bench.launches == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_sizes(
    bench: Bench, dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int, causal: bool
) -> None:
    q, k, v = tensors(seqlen_q, seqlen_k, batch=batch, dim_v=24, dtype=dtype)
    for _ in range(2):
        out, lse = autoflash.attention(q, k, v, causal=causal, return_lse=True)
        assert torch.equal(out, torch.zeros(batch, seqlen_q, 4, 24, dtype=dtype))
        assert torch.equal(lse, torch.full((batch, 4, seqlen_q), -math.inf))
    assert bench.launches == 0


def test_strides_reach_the_kernel(bench: Bench) -> None:
    q, k, v = tensors(6, 8, heads=4, kv_heads=4)
    wanted = expected(q, k, v)
    packed = torch.stack([torch.zeros_like(k), k, v], dim=3)[:, :, :, 1:]  # a view into more
    swapped = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = autoflash.attention(swapped, packed[:, :, :, 0], packed[:, :, :, 1], return_lse=True)
    agree(got, wanted)
    assert got[0].is_contiguous()
    one = k[:, :, :1].expand(-1, -1, 4, -1)  # stride 0
    agree(autoflash.attention(q, one, v, return_lse=True), expected(q, one, v))
    assert bench.launches == 2
    assert bench.kernels[0].prepared[0]["k_stride_head"] == 3 * 16


@pytest.mark.parametrize("which", ["address", "stride", "output"])
def test_what_is_not_aligned_gets_a_kernel_that_does_not_rely_on_it(
    bench: Bench, which: str
) -> None:
    q, k, v = tensors(heads=2, dim_v=18 if which == "output" else 16)
    if which == "address":
        k = torch.cat([k.flatten()[:1], k.flatten()])[1:].view(k.shape)
    elif which == "stride":
        wide = torch.randn(2, 5, 2, 17)
        wide[..., :16] = q
        q = wide[..., :16]
    agree(autoflash.attention(q, k, v, return_lse=True), expected(q, k, v))
    assert [kernel.artifact.source.aligned for kernel in bench.kernels] == [False]
    agree(autoflash.attention(*tensors(heads=2), return_lse=True), expected(*tensors(heads=2)))
    assert [kernel.artifact.source.aligned for kernel in bench.kernels] == [False, True]


@pytest.mark.parametrize("scale", [0.5, 2, np.float64(0.25), -0.5, 0.0, 1e-45, -3])
def test_any_finite_scale(bench: Bench, scale: float) -> None:
    q, k, v = tensors()
    got = autoflash.attention(q, k, v, causal=True, softmax_scale=scale, return_lse=True)
    agree(got, expected(q, k, v, causal=True, softmax_scale=float(scale)))
    assert bench.launches == 1
    assert bench.kernels[0].launches[0][5] >= 2.0**-126


# Windows, softcap and eight bits ----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(3, 1), (2, None), (-1, 2), (0, 0), (4, -1)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(9, 12), (12, 9)])
def test_windows_and_softcaps_reach_the_kernel(
    bench: Bench,
    seqlen_q: int,
    seqlen_k: int,
    window_size: tuple[int | None, int | None],
    causal: bool,
    softcap: float,
    layout: str,
) -> None:
    q, k, v = tensors(seqlen_q, seqlen_k, dim_v=24, layout=layout)
    options: dict[str, Any] = {
        "causal": causal, "window_size": window_size, "softcap": softcap, "layout": layout,
    }  # fmt: skip
    result = autoflash.attention(q, k, v, **options, return_lse=True)
    agree(result, expected(q, k, v, **options))
    assert torch.equal(autoflash.attention(q, k, v, **options), result[0])
    assert bench.launches == 2
    assert [len(kernel.prepared) for kernel in bench.kernels] == [1]  # the second was a hit


def test_windows_and_softcaps_of_all_values_share_a_kernel(bench: Bench) -> None:
    q, k, v = tensors(9, 12)
    for left, right, softcap in ((1, 2, 0.5), (3, 1, 2.5), (5, 5, 30.0)):
        options: dict[str, Any] = {"window_size": (left, right), "softcap": softcap}
        agree(
            autoflash.attention(q, k, v, **options, return_lse=True), expected(q, k, v, **options)
        )
    [kernel] = bench.kernels
    bound = [(p["window_left"], p["window_right"], p["softcap"]) for p in kernel.prepared]
    assert bound == [(1, 2, 0.5), (3, 1, 2.5), (5, 5, 30.0)]


@pytest.mark.parametrize(
    ("options", "mark"),
    [
        ({"window_size": (None, 0)}, "causal"),
        ({"window_size": (-1, 0)}, "causal"),
        ({"window_size": [None, 0]}, "causal"),
        ({"window_size": (99, 0)}, "causal"),
        ({"window_size": (None, 3), "causal": True}, "causal"),
        ({"window_size": (None, None)}, "full"),
        ({"window_size": (99, 99), "softcap": 0}, "full"),
        ({"window_size": (np.int64(99), -1), "softcap": np.float32(0)}, "full"),
    ],
)
def test_masks_that_say_the_same_are_the_same_kernel(
    bench: Bench, options: dict[str, Any], mark: str
) -> None:
    q, k, v = tensors(9, 12)
    wanted = expected(q, k, v, causal=mark == "causal")
    for _ in range(2):
        agree(autoflash.attention(q, k, v, **options, return_lse=True), wanted)
    assert [kernel.artifact.source.text.split() for kernel in bench.kernels] == [[mark, "64"]]


def eight_bits(**sizes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tensors(dtype=torch.float8_e4m3fn, **sizes)


def assert_scaled(
    got: Any,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    descales: dict[str, torch.Tensor],
    tolerance: float,
    **options: Any,
) -> None:
    """That (out, lse) are attention of what 8 bits and their descales stand for."""
    exact = [
        scaled(x, descales[name]) if name in descales else x.double()
        for x, name in zip(given, ("q_descale", "k_descale", "v_descale"), strict=True)
    ]
    wanted, lse = expected(exact[0], exact[1], exact[2], **options)
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0].double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], lse, atol=tolerance, rtol=tolerance)


DESCALES = [(), ("q_descale", "k_descale", "v_descale"), ("k_descale",), ("q_descale", "v_descale")]


@pytest.mark.parametrize("names", DESCALES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softmax_scale": -0.5, "softcap": 2.0}])
def test_eight_bits_with_and_without_descales(
    bench: Bench, names: tuple[str, ...], options: dict[str, Any]
) -> None:
    q, k, v = eight_bits(dim_v=32)
    descales = {name: torch.rand(2, 2) + 0.5 for name in names}
    for _ in range(2):
        got = autoflash.attention(q, k, v, **descales, **options, return_lse=True)
        assert_scaled(got, (q, k, v), descales, 1e-2, **options)
        alone = autoflash.attention(q, k, v, **descales, **options)
        assert torch.equal(alone, got[0])
    [kernel] = bench.kernels
    assert kernel.artifact.source.op == "fwd_fp8"
    assert len(kernel.prepared) == 1
    for launch in kernel.launches:
        given = [name in descales for name in ("q_descale", "k_descale", "v_descale")]
        assert [address != 0 for address in launch[5:8]] == given


def test_descales_of_any_strides(bench: Bench) -> None:
    q, k, v = eight_bits(dim_v=32)
    one = torch.tensor(0.5).expand(2, 2)
    turned = (torch.rand(2, 2) + 0.5).t()
    for _ in range(2):
        descales = {"q_descale": one, "k_descale": turned, "v_descale": turned.contiguous()}
        got = autoflash.attention(q, k, v, **descales, return_lse=True)
        assert_scaled(got, (q, k, v), descales, 1e-2)
    assert bench.launches == 2


def test_eight_bits_by_pytorch(bench: Bench) -> None:
    q, k, v = eight_bits(dim=12, dim_v=20)
    descales = {"q_descale": torch.rand(2, 2), "v_descale": torch.rand(2, 2)}
    with pytest.warns(RuntimeWarning, match="multiple of 8 up to 256"):
        got = autoflash.attention(q, k, v, **descales, window_size=(2, 1), return_lse=True)
    assert_scaled(got, (q, k, v), descales, 4e-2, window_size=(2, 1))
    assert bench.launches == 0


def test_eight_bits_of_zero_size(bench: Bench) -> None:
    for descales in ({}, {"v_descale": torch.ones(2, 2)}):
        q, k, v = eight_bits(seqlen_k=0)
        out, lse = autoflash.attention(q, k, v, **descales, return_lse=True)
        assert torch.equal(out, torch.zeros(2, 5, 4, 16, dtype=torch.bfloat16))
        assert torch.isneginf(lse).all()
    assert bench.launches == 0


def test_autocast_leaves_eight_bits_alone(bench: Bench) -> None:
    q, k, v = eight_bits()
    descales = {"k_descale": torch.rand(2, 2)}
    with torch.autocast("cpu", torch.float16):
        got = autoflash.attention(q, k, v, **descales, return_lse=True)
    assert_scaled(got, (q, k, v), descales, 1e-2)
    assert bench.launches == 1


def test_gradients_of_a_descale(bench: Bench) -> None:
    q, k, v = eight_bits()
    factor = torch.ones(2, 2, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="no backward kernels"):
        out = autoflash.attention(q, k, v, v_descale=factor)
    out.float().sum().backward()
    wanted, _ = expected(q.double(), k.double(), v.double())
    by_head = wanted.sum(dim=(1, 3)).view(2, 2, 2).sum(-1)  # out is linear in what v stands for
    assert factor.grad is not None
    torch.testing.assert_close(factor.grad.double(), by_head, atol=0.2, rtol=2e-2)
    with torch.no_grad():
        autoflash.attention(q, k, v, v_descale=factor)
    assert bench.launches == 1


# What is refused --------------------------------------------------------------------------------


def test_shapes(bench: Bench) -> None:
    q, k, v = tensors()
    refused: list[tuple[tuple[Any, Any, Any], dict[str, Any], str]] = [
        ((q.numpy(), k, v), {}, "q is a ndarray; a torch.Tensor"),
        ((q, None, v), {}, "k is a NoneType"),
        ((q[0], k, v), {}, r"q has 3 dimensions, \(5, 4, 16\).*unsqueeze\(0\)"),
        ((q, k.half(), v), {}, r"dtypes differ: q torch.float32, k torch.float16.*\.to\("),
        ((q, k, v.to("meta")), {}, "devices differ: q cpu, k cpu, v meta"),
        ((q[:1], k, v), {}, "batch differs: q 1, k 2, v 2"),
        ((q, k[:, :3], v), {}, "seqlen differs between k, 3, and v, 7"),
        ((q, k[:, :, :1], v), {}, "num_heads differs between k, 1, and v, 2"),
        ((q[:, :, :3], k, v), {}, "q has 3 heads, k and v 2.*must be a multiple"),
        ((q, k[..., :8], v), {}, "head_dim differs between q, 16, and k, 8"),
        ((q[:, :, :0], k, v), {}, "num_heads is q 0"),
        ((q[..., :0], k[..., :0], v), {}, "head_dim is q 0"),
        ((q.repeat(1, 1, 1, 2)[..., ::2], k, v), {}, r"q's last dimension has stride 2.*q.contig"),
        ((q, k, v.to_sparse()), {}, "v is sparse or nested"),
        ((q, k, v), {"layout": "sbhd"}, "unknown layout 'sbhd'.*Known: bhsd, bshd"),
        ((q, k, v), {"layout": ["bshd"]}, "unknown layout"),
        ((q, k, v), {"causal": "yes"}, "causal='yes' is a str"),
        ((q, k, v), {"softmax_scale": math.nan}, "softmax_scale=nan is not a finite"),
        ((q, k, v), {"softmax_scale": -math.inf}, "softmax_scale=-inf is not a finite"),
        ((q, k, v), {"softmax_scale": 1e39}, "not a finite float32"),
        ((q, k, v), {"softmax_scale": "1"}, "softmax_scale='1' is a str"),
        ((q, k, v), {"softmax_scale": torch.tensor(1.0)}, r"\.item\(\)"),
        ((q, k, v), {"window_size": 128}, r"window_size=128 is not a pair; \(left, right\)"),
        ((q, k, v), {"window_size": (1, 2, 3)}, r"window_size=\(1, 2, 3\) is not a pair"),
        ((q, k, v), {"window_size": "12"}, "window_size='12' is not a pair"),
        ((q, k, v), {"window_size": torch.ones(2)}, r"tensor of shape \(2,\) is not a pair"),
        ((q, k, v), {"window_size": (-2, 0)}, r"left is -2; .* from 0 up .* None \(or -1\)"),
        ((q, k, v), {"window_size": [0, -7]}, "right is -7"),
        ((q, k, v), {"window_size": (True, 0)}, "left is True, a bool; a whole number"),
        ((q, k, v), {"window_size": (0, 1.5)}, "right is 1.5, a float"),
        ((q, k, v), {"window_size": (torch.tensor(3), 0)}, r"left is tensor .*\.item\(\)"),
        ((q, k, v), {"softcap": -30.0}, r"softcap=-30.0 is neither 0.0 \(off\) nor a positive"),
        ((q, k, v), {"softcap": math.nan}, "softcap=nan is neither"),
        ((q, k, v), {"softcap": math.inf}, "softcap=inf is neither"),
        ((q, k, v), {"softcap": 1e-45}, "from 1.18e-38 to 3.4e[+]38"),
        ((q, k, v), {"softcap": True}, "softcap=True is a bool; a float"),
        ((q, k, v), {"softcap": None}, "softcap=None is a NoneType; a float is needed, 0.0 for"),
        ((q, k, v), {"softcap": torch.tensor(30.0)}, r"softcap=tensor .*\.item\(\)"),
    ]
    for times in range(2):  # the second time, the right call is remembered
        for arguments, options, message in refused:
            with pytest.raises(InvalidInput, match=message):
                autoflash.attention(*arguments, **options)
        assert bench.launches == times
        autoflash.attention(q, k, v)
    assert bench.launches == 2


def test_what_is_wrong_with_eight_bits(bench: Bench) -> None:
    q, k, v = tensors()
    few = eight_bits()
    ones = torch.ones(2, 2)
    refused: list[tuple[tuple[Any, Any, Any], dict[str, Any], str]] = [
        ((few[0], k, v), {}, "dtypes differ: .*8 bits or none: quantise the others too, or deq"),
        ((few[0], few[1], v.bfloat16()), {"q_descale": ones}, "dtypes differ"),
        ((q, k, v), {"k_descale": ones}, "k_descale is given, but .* are torch.float32.*Leave it"),
        (few, {"q_descale": 0.5}, "q_descale=0.5 is a float; a float32 torch.Tensor of shape"),
        (few, {"v_descale": ones.bfloat16()}, r"v_descale is torch.bfloat16.*v_descale\.float"),
        (few, {"q_descale": torch.ones(2, 4)}, r"\(2, 4\); .*, here \(2, 2\)"),
        (few, {"q_descale": torch.tensor(0.5)}, r"\(\); .*q_descale\.expand\(2, 2\)"),
        (few, {"k_descale": ones.to("meta")}, r"k_descale is on meta.*k_descale\.to\('cpu'\)"),
        (few, {"k_descale": ones.to_sparse()}, "k_descale is sparse"),
    ]
    for times in range(2):  # the second time, the right call is remembered
        for arguments, options, message in refused:
            with pytest.raises(InvalidInput, match=message):
                autoflash.attention(*arguments, **options)
        assert bench.launches == times
        autoflash.attention(*few, q_descale=ones, k_descale=ones, v_descale=ones)
    assert bench.launches == 2


def test_a_wrong_layout_is_guessed(bench: Bench) -> None:
    q, k, v = tensors(5, 7, heads=4, kv_heads=2, layout="bhsd")
    with pytest.raises(InvalidInput, match="would fit layout='bhsd'"):
        autoflash.attention(q, k, v)
    assert bench.launches == 0


def test_dtypes_that_nothing_takes(bench: Bench) -> None:
    for dtype in (torch.int32, torch.complex64, torch.float8_e5m2):
        q, k, v = (tensor.to(dtype) for tensor in tensors())
        with pytest.raises(UnsupportedProblem, match=f"dtype {dtype}.*Convert"):
            autoflash.attention(q, k, v)
    assert bench.launches == 0


def test_what_pytorch_cannot_do_either_says_what_it_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(fallback, "scaled_dot_product_attention", refuse)
    with (
        pytest.warns(RuntimeWarning, match="multiple of 8"),
        pytest.raises(UnsupportedProblem, match="PyTorch says: no such kernel"),
    ):
        autoflash.attention(*tensors(dim=12, dim_v=12))
    assert bench.launches == 0


def test_the_trace_of_torchscript_is_refused(bench: Bench) -> None:
    q, k, v = tensors()
    autoflash.attention(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        with pytest.raises(UnsupportedProblem, match=r"torch\.export"):
            torch.jit.trace(autoflash.attention, (q, k, v))
    assert bench.launches == 1


# A hit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window_size": (2, 1), "softcap": 3.0}])
def test_a_hit_checks_reads_and_locks_nothing(
    bench: Bench, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors()
    few, factor = eight_bits(), torch.full((2, 2), 0.5)
    first = autoflash.attention(q, k, v, **options)
    scaled_first = autoflash.attention(*few, k_descale=factor, **options)

    def touched(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a hit came here")

    for module, name in (
        (request, "check"), (request, "problem_of"), (serving, "dispatcher"),
        (options_of, "window_of"), (options_of, "softcap_of"),
        (prepare, "kernel_call"), (os.environ, "get"), (warnings, "warn"),
        (serving, "_lock"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, touched)
    assert torch.equal(autoflash.attention(q, k, v, **options), first)
    assert torch.equal(autoflash.attention(q.clone(), k.clone(), v.clone(), **options), first)
    agree(
        autoflash.attention(q, k, v, softmax_scale=0.25, return_lse=True, **options),
        (first, *expected(q, k, v, **options)[1:]),
    )
    again = autoflash.attention(*few, k_descale=factor.clone(), **options)
    assert torch.equal(again, scaled_first)
    assert bench.launches == 6


def test_what_was_prepared_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_CALLS", 8)
    q, k, v = tensors(1, 40)
    for seqlen_k in range(1, 41):  # decoding: a new key with every token
        got = autoflash.attention(q, k[:, :seqlen_k], v[:, :seqlen_k], return_lse=True)
        agree(got, expected(q, k[:, :seqlen_k], v[:, :seqlen_k]))
        assert len(serving.prepared) <= 8
    assert len(bench.kernels) == 1


def test_threads_may_call_at_once(bench: Bench) -> None:
    q, k, v = tensors()
    wanted = expected(q, k, v)
    barrier = threading.Barrier(6)
    results = []

    def ask() -> None:
        barrier.wait()
        results.extend(autoflash.attention(q, k, v, return_lse=True) for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    for result in results:
        agree(result, wanted)
    assert len(bench.kernels) == 1


def test_a_forked_child_does_not_wait_for_its_parents_locks() -> None:
    code = """
import os, threading, warnings
warnings.simplefilter("ignore")
from autoflash.device import native
from autoflash.problem import Problem
from autoflash.codegen import catalog
from autoflash.runtime import serving
from autoflash.runtime.dispatch import Dispatcher
made = Dispatcher(native(), [], catalog.installed(), lambda source, device: 1 / 0)
serving.use("cpu", 0, made)
held, done = threading.Event(), threading.Event()
def hold():
    with serving._lock, made._lock:
        held.set()
        done.wait()
thread = threading.Thread(target=hold, daemon=True)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    served = serving.dispatcher("cpu", 0).serve(Problem.parse("b1s1h1d64f-float32"))
    os._exit(0 if served.rule == "torch" else 1)
_, status = os.waitpid(child, 0)
done.set()
print("child", os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "child 0", done.stderr


# What stands above it ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [*SIZES, (5, 0)])
def test_gradients_are_right(
    bench: Bench, seqlen_q: int, seqlen_k: int, causal: bool, layout: str
) -> None:
    inputs = tensors(seqlen_q, seqlen_k, dim_v=24, layout=layout)
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
    with pytest.warns(RuntimeWarning, match="no backward kernels yet"):
        out, lse = autoflash.attention(q, k, v, causal=causal, return_lse=True, layout=layout)
    autoflash.attention(q, k, v, causal=causal, layout=layout)  # told once
    agree((out.detach(), lse.detach()), expected(*inputs, causal=causal, layout=layout))
    # In float64 by the definition, through rows that see a key.
    seen = torch.isfinite(lse.detach())
    into_out, into_lse = torch.randn_like(out), torch.randn_like(lse)
    (out * into_out).sum().add((lse[seen] * into_lse[seen]).sum()).backward()
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    swapped = [t.transpose(1, 2) if layout == "bhsd" else t for t in exact]
    hidden = max(seqlen_q - seqlen_k, 0) if causal or seqlen_k == 0 else 0
    wanted, wanted_lse = by_definition(
        swapped[0][:, hidden:], swapped[1], swapped[2], causal, 1 / math.sqrt(16)
    )
    into = (into_out.transpose(1, 2) if layout == "bhsd" else into_out)[:, hidden:]
    ((wanted * into).sum() + (wanted_lse * into_lse[:, :, hidden:]).sum()).backward()
    for got, reference in zip((q, k, v), exact, strict=True):
        assert got.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=1e-5, rtol=1e-4)
    assert bench.launches == 0


def test_a_call_that_needs_no_gradients_uses_the_kernel(bench: Bench) -> None:
    q, k, v = tensors()
    wanted = expected(q, k, v)
    learned = torch.nn.Parameter(k)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out, lse = autoflash.attention(q.clone().requires_grad_(), learned, v, return_lse=True)
            agree((out, lse), wanted)
            assert type(out) is torch.Tensor
            assert not out.requires_grad
    assert bench.launches == 2


@IMPORTS_TORCHSCRIPT
def test_forward_mode_gradients(bench: Bench) -> None:
    q, k, v = tensors()
    along = torch.randn_like(q)
    with forward_ad.dual_level():
        with pytest.warns(RuntimeWarning, match="no backward kernels"):
            dual = autoflash.attention(forward_ad.make_dual(q, along), k, v, causal=True)
        tangent = forward_ad.unpack_dual(dual).tangent
        plain = autoflash.attention(q, k, v)  # in a level, but of no tangents
    assert bench.launches == 1
    agree((plain, torch.ones(1)), (expected(q, k, v)[0], torch.ones(1)))
    step = 1e-6
    ahead, behind = (
        by_definition(q + sign * step * along.double(), k, v, True, 0.25)[0] for sign in (1, -1)
    )
    assert tangent is not None
    torch.testing.assert_close(tangent.double(), (ahead - behind) / (2 * step), atol=1e-4, rtol=0)


def test_transforms_of_functions_are_served_by_pytorch(bench: Bench) -> None:
    q, k, v = (tensor.unsqueeze(0).repeat(2, 1, 1, 1, 1) for tensor in tensors(4, 6, kv_heads=4))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = torch.func.vmap(autoflash.attention)(q, k, v)
    assert "no storage of their own" in str([entry.message for entry in told])
    torch.testing.assert_close(out[1], expected(q[1], k[1], v[1])[0], atol=1e-5, rtol=0)
    assert bench.launches == 0


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (3, -1), "softcap": 1.5},
        {"window_size": (2, 1)},
        {"softcap": 1.5, "causal": True, "softmax_scale": -0.3},
    ],
)
def test_gradients_under_a_window_and_a_softcap(bench: Bench, options: dict[str, Any]) -> None:
    inputs = tensors(6, 9)
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
    with pytest.warns(RuntimeWarning, match="no backward kernels yet"):
        out = autoflash.attention(q, k, v, **options)
    into = torch.randn_like(out)
    out.backward(into)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    left, right = (None if x == -1 else x for x in options.get("window_size", (-1, -1)))
    wanted, _ = by_definition(
        exact[0], exact[1], exact[2], options.get("causal", False),
        options.get("softmax_scale", 0.25), (left, right), options.get("softcap", 0.0),
    )  # fmt: skip
    wanted.backward(into.double())
    torch.testing.assert_close(out.detach().double(), wanted.detach(), atol=1e-5, rtol=0)
    for got, reference in zip((q, k, v), exact, strict=True):
        assert got.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=1e-5, rtol=1e-4)
    assert bench.launches == 0


@IMPORTS_TORCHSCRIPT
def test_transforms_of_a_window_and_a_softcap(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "_SCORES_AT_ONCE", 64)  # in parts, which it cannot recompute
    q, k, v = tensors(6, 9)

    def call(q: torch.Tensor) -> torch.Tensor:
        return autoflash.attention(q, k, v, window_size=(3, 2), softcap=2.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradient = torch.func.grad(lambda q: call(q).sum())(q)
        both = torch.func.vmap(call)(torch.stack([q, 2 * q]))
        _, tangent = torch.func.jvp(call, (q,), (torch.ones_like(q),))
    exact = q.double().requires_grad_()
    by_definition(exact, k, v, False, 0.25, (3, 2), 2.0)[0].sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(gradient.double(), exact.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        both[1], expected(2 * q, k, v, window_size=(3, 2), softcap=2.0)[0], atol=1e-5, rtol=0
    )
    # d/dq of the sum along ones, and the sum of the tangent along ones, are one number.
    torch.testing.assert_close(tangent.sum().double(), exact.grad.sum(), atol=1e-4, rtol=1e-4)
    assert bench.launches == 0


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(bench: Bench, grad: bool) -> None:
    q, k, v = tensors()
    wanted = expected(*(tensor.bfloat16() for tensor in (q, k, v)))
    told = pytest.warns(RuntimeWarning) if grad else contextlib.nullcontext()
    with torch.autocast("cpu", torch.bfloat16), told:
        got = autoflash.attention(q.requires_grad_(grad), k, v, return_lse=True)
        mixed = autoflash.attention(q, k.bfloat16(), v)  # what a layer in autocast may give
    assert got[0].dtype == mixed.dtype == torch.bfloat16
    agree((got[0].detach(), got[1].detach()), wanted)
    assert bench.launches == (0 if grad else 2)


def test_autocast_leaves_float64_alone(bench: Bench) -> None:
    q, k, v = tensors(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(RuntimeWarning, match="float64"):
        out = autoflash.attention(q, k, v)
    torch.testing.assert_close(out, expected(q, k, v)[0])
    assert bench.launches == 0


def test_autocast_that_is_off_casts_nothing(bench: Bench) -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert autoflash.attention(q, k, v).dtype == torch.float32
    assert bench.launches == 1


# One operator to the compiler -------------------------------------------------------------------


def test_torch_compile_without_a_break(bench: Bench) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return autoflash.attention(q * 2, k, v, causal=True, return_lse=True)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen_k in (5, 6, 7):
        q, k, v = tensors(5, seqlen_k)
        agree(compiled(q, k, v), expected(q * 2, k, v, causal=True))
    assert bench.launches == 3
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile_of_windows_and_softcaps_that_change(
    bench: Bench, grad: bool, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "_SCORES_AT_ONCE", 256)  # parts, where PyTorch serves

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Any, cap: float) -> Any:
        return autoflash.attention(q * 2, k, v, window_size=window, softcap=cap, return_lse=True)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for window, softcap in (((3, 2), 1.5), ((4, 1), 2.5), ((2, -1), 0.5), (None, 0.0)):
        q, k, v = tensors(6, 9)
        out, lse = compiled(q.requires_grad_(grad), k, v, window, softcap)
        options: dict[str, Any] = {"window_size": window, "softcap": softcap}
        agree((out.detach(), lse.detach()), expected(q * 2, k, v, **options))
        if grad:
            out.sum().backward()
            eager = q.detach().clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                autoflash.attention(eager * 2, k, v, **options).sum().backward()
            assert q.grad is not None
            assert eager.grad is not None
            torch.testing.assert_close(q.grad, eager.grad, atol=1e-5, rtol=1e-4)
    assert bench.launches == (0 if grad else 4)
    torch.compiler.reset()


def test_gradients_of_compiled_eight_bits(bench: Bench) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: torch.Tensor) -> Any:
        return autoflash.attention(q, k, v, v_descale=factor, causal=True)

    given = eight_bits()
    eager, compiled = (torch.full((2, 2), 0.5, requires_grad=True) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="no backward kernels"):
        model(*given, eager).float().sum().backward()
    compile_ = torch.compile(model, fullgraph=True, backend="aot_eager")
    compile_(*given, compiled).float().sum().backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    assert eager.grad.abs().max() > 0.1
    torch.testing.assert_close(compiled.grad, eager.grad)
    assert bench.launches == 0
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.usefixtures("bench")
def test_the_operator_with_gradients_keeps_pytorchs_rules(return_lse: bool, layout: str) -> None:
    autoflash.attention(*tensors())  # registers it
    for seqlen_q, seqlen_k in ((6, 9), (9, 6)):
        given = tensors(seqlen_q, seqlen_k, dim_v=24, layout=layout)
        q, k, v = (tensor.requires_grad_() for tensor in given)
        torch.library.opcheck(
            torch.ops.autoflash.fwd_by_torch.default,
            (q, k, v, None, None, None, False, 4, 1, 2.0, 0.25, return_lse, layout),
        )


def test_torch_compile_of_eight_bits(bench: Bench) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: torch.Tensor) -> Any:
        out, lse = autoflash.attention(q, k, v, k_descale=factor * 2, return_lse=True)
        return out + 0, lse

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given, factor = eight_bits(), torch.rand(2, 2)
    got = compiled(*given, factor)
    assert_scaled(got, given, {"k_descale": factor * 2}, 1e-2)
    assert bench.launches == 1
    torch.compiler.reset()


@IMPORTS_TORCHSCRIPT
@pytest.mark.slow
def test_inductor(bench: Bench) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return autoflash.attention(q.transpose(1, 2) * 2, k, v.sin(), causal=True) + 1

    q, k, v = tensors(layout="bshd")
    compiled = torch.compile(model, fullgraph=True)
    got = compiled(q.transpose(1, 2).contiguous(), k, v)
    wanted = expected(q * 2, k, v.sin(), causal=True)[0] + 1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert bench.launches == 1
    torch.compiler.reset()


def test_torch_compile_with_gradients_and_autocast(bench: Bench) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return autoflash.attention(q, k, v, causal=True)

    q, k, v = tensors()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v)
    assert out.dtype == torch.bfloat16
    assert bench.launches == 1
    learned = q.clone().requires_grad_()
    compiled(learned, k, v).float().sum().backward()
    again = q.clone().requires_grad_()
    with pytest.warns(RuntimeWarning):
        model(again, k, v).float().sum().backward()
    assert learned.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(learned.grad, again.grad)
    torch.compiler.reset()


def test_torch_export_shows_the_operator(bench: Bench) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return autoflash.attention(q, k, v, causal=True)

    q, k, v = tensors()
    with torch.no_grad():
        program = torch.export.export(Model(), (q, k, v))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.autoflash.fwd.default in targets
    assert bench.launches == 0
    got = program.module()(q, k, v)
    torch.testing.assert_close(got, expected(q, k, v, causal=True)[0], atol=1e-5, rtol=0)
    assert bench.launches == 1


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_operator_keeps_pytorchs_rules(bench: Bench, return_lse: bool, layout: str) -> None:
    autoflash.attention(*tensors())  # registers it
    for seqlen_q, seqlen_k in ((5, 7), (1, 4), (5, 0)):
        q, k, v = tensors(seqlen_q, seqlen_k, dim_v=24, layout=layout)
        arguments = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
        torch.library.opcheck(
            torch.ops.autoflash.fwd.default, (*arguments, True, 0.5, return_lse, layout)
        )
    more = {"window_left": 2, "window_right": 1, "softcap": 3.0}
    torch.library.opcheck(
        torch.ops.autoflash.fwd.default, (*arguments, False, None, return_lse, layout), more
    )
    assert bench.launches > 0


def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(bench: Bench) -> None:
    q, k, v = tensors(dim_v=24)
    real = autoflash.attention(q, k, v, return_lse=True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (q, k, v)]
        results = [
            autoflash.attention(*fakes, return_lse=True),
            autoflash.attention(q, k, v, return_lse=True),  # a mode over real tensors
        ]
    results.append(autoflash.attention(*(t.to("meta") for t in (q, k, v)), return_lse=True))
    for result in results:
        for got, wanted in zip(result, real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (
                wanted.shape, wanted.stride(), wanted.dtype,
            )  # fmt: skip
    assert bench.launches == 1
    few = [tensor.to("meta") for tensor in eight_bits()]
    out, lse = autoflash.attention(*few, v_descale=torch.ones(2, 2, device="meta"), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_a_mistake_in_compiled_code_is_named(bench: Bench) -> None:
    q, k, v = tensors()
    compiled = torch.compile(autoflash.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="seqlen differs between k, 3, and v, 7"):
        compiled(q, k[:, :3], v)
    torch.compiler.reset()
    assert bench.launches == 0


# Where kernels come from ------------------------------------------------------------------------


def record(bench: Bench, problem: Problem, block_m: int) -> Record:
    template = bench.catalog.get("cpp/fwd")
    return Record(
        problem=problem,
        config=Config.of("cpp/fwd", {"block_m": block_m}),
        template_digest=template.digest,
        device=native(),
        outcome="ok",
        policy="test",
        measurement=Measurement(latency_us=1.0, p20_us=1.0, p80_us=1.0, count=1),
    )


PROBLEM = Problem.parse("b2s5x7h4/2d16f-float32")


@pytest.mark.skipif(native().is_cuda, reason="these records are for a CPU; a GPU is here")
def test_a_record_decides_which_kernel_runs(bench: Bench) -> None:
    bench.records.append(record(bench, PROBLEM, 32))
    q, k, v = tensors()
    agree(autoflash.attention(q, k, v, return_lse=True), expected(q, k, v))
    assert bench.kernels[0].artifact.source.text.strip() == "full 32"
    assert len(bench.kernels) == 1


def test_warming_up_for_windows_softcaps_and_eight_bits(bench: Bench) -> None:
    names = ["b2s9x12h4/2d16cw3cap2.5-float32", "b2s9x12h4/2d16fw5x1-float8_e4m3fn"]
    warmed = autoflash.warmup(names, device="cpu")
    assert [each.served.problem.name for each in warmed] == names
    assert len(bench.kernels) == 2
    autoflash.attention(*tensors(9, 12), causal=True, window_size=(4, 2), softcap=7.0)
    few = eight_bits(seqlen_q=9, seqlen_k=12)
    autoflash.attention(*few, window_size=(None, 3), q_descale=torch.ones(2, 2))
    assert [len(kernel.launches) for kernel in bench.kernels] == [1, 1]


def test_warming_up_builds_ahead(bench: Bench) -> None:
    causal = dataclasses.replace(PROBLEM, causal=True)
    first, second = autoflash.warmup([PROBLEM, causal.name], device="cpu")
    assert [first.served.rule, second.served.rule] == ["default", "default"]
    assert [first.served.problem, second.served.problem] == [PROBLEM, causal]
    assert len(bench.kernels) == 2
    autoflash.attention(*tensors())
    autoflash.attention(*tensors(), causal=True)
    assert len(bench.kernels) == 2
    assert bench.launches == 2
    assert autoflash.warmup(PROBLEM.name, device="cpu")[0].to_dict() == {
        "problem": PROBLEM.name,
        "rule": "default",
        "config": {"template": "cpp/fwd", "values": {"block_m": 64}},
        "reason": "the template's default",
        "elapsed_s": pytest.approx(0, abs=60),
    }


@pytest.mark.skipif(native().is_cuda, reason="these records are for a CPU; a GPU is here")
def test_warming_up_takes_in_what_was_tuned_since(bench: Bench) -> None:
    q, k, v = tensors()
    autoflash.attention(q, k, v)
    bench.records.append(record(bench, PROBLEM, 32))
    autoflash.attention(q, k, v)
    assert len(bench.kernels) == 1
    assert autoflash.warmup(PROBLEM, device="cpu")[0].served.rule == "exact"
    autoflash.attention(q, k, v)
    assert [len(kernel.launches) for kernel in bench.kernels] == [2, 1]


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu:0", "not one that PyTorch knows"), ("cuda:99", "CUDA device"), ("meta", "'meta'")],
)
def test_warming_up_refuses_devices_without_kernels(
    bench: Bench, device: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        autoflash.warmup(PROBLEM, device=device)
    with pytest.raises(InvalidInput, match="not of the form"):
        autoflash.warmup(["b1"], device="cpu")
    assert bench.kernels == []


@pytest.mark.skipif(native().is_cuda, reason="these records are for a CPU; a GPU is here")
def test_a_launch_that_fails_is_given_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.records.append(record(bench, PROBLEM, 32))
    usual = PythonKernel.prepare

    def failing(self: PythonKernel, scalars: tuple[int, ...]) -> Launch:
        def launch(*arguments: Any) -> None:
            raise BuildError("out of resources")

        return launch if "32" in self.artifact.source.text else usual(self, scalars)

    monkeypatch.setattr(PythonKernel, "prepare", failing)
    q, k, v = tensors()
    with pytest.warns(RuntimeWarning, match="BuildError: out of resources") as told:
        result = autoflash.attention(q, k, v, return_lse=True)
    assert len(told) == 1
    agree(result, expected(q, k, v))
    autoflash.attention(*tensors(6, 6))
    assert [kernel.artifact.source.text.strip() for kernel in bench.kernels] == [
        "full 32", "full 64",
    ]  # fmt: skip


def test_when_nothing_builds_pytorch_serves(bench: Bench) -> None:
    def fail(source: Source) -> None:
        raise BuildError("there is no compiler")

    bench.fail = fail
    q, k, v = tensors()
    with pytest.warns(RuntimeWarning, match="there is no compiler") as told:
        result = autoflash.attention(q, k, v, return_lse=True)
    assert len(told) == 1
    agree(result, expected(q, k, v))
    agree(autoflash.attention(q, k, v, return_lse=True), expected(q, k, v))
    bench.fail = lambda source: None
    assert autoflash.warmup(PROBLEM, device="cpu")[0].served.rule == "default"
    autoflash.attention(q, k, v)
    assert bench.launches == 1


def test_a_database_that_cannot_be_read_costs_only_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoflash.database import Database

    def corrupt(*arguments: Any, **options: Any) -> None:
        raise DatabaseCorrupt("autoflash.db is not a database of ours")

    monkeypatch.setattr(Database, "open", corrupt)
    reading = Dispatcher(native(), lambda: serving.stored(native()), bench.catalog, bench.build)
    serving.use("cpu", 0, reading)
    q, k, v = tensors()
    with pytest.warns(RuntimeWarning, match="not a database of ours"):
        got = autoflash.attention(q, k, v, return_lse=True)
    agree(got, expected(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_only_pytorch", "cache_dir")
def test_the_installed_templates_serve_from_the_database(dtype: torch.dtype) -> None:
    from autoflash.codegen import catalog
    from autoflash.database import Database
    from autoflash.device import of_tensor

    device = of_tensor("cpu", None)
    problem = dataclasses.replace(
        Problem.parse("b2s33x65h4/2d64c"), dtype=str(dtype).removeprefix("torch.")
    )
    template = catalog.installed().serving(problem, device)[0]
    default = template.default_config(problem, device)
    chosen = next(c for c in template.space(problem, device).configs if c != default)
    winner = Record(
        problem=problem,
        config=chosen,
        template_digest=template.digest,
        device=device,
        outcome="ok",
        policy="test",
        measurement=Measurement(latency_us=1.0, p20_us=1.0, p80_us=1.0, count=1),
        default_us=2.0,
    )
    with Database.open() as database:
        assert database.set_best(winner)
    [warmed] = autoflash.warmup(problem, device="cpu")
    assert (warmed.served.rule, warmed.served.config) == ("exact", chosen)
    q, k, v = tensors(33, 65, dim=64, dim_v=64, dtype=dtype)
    agree(
        autoflash.attention(q, k, v, causal=True, return_lse=True),
        expected(q, k, v, causal=True),
    )
    other = tensors(17, 31, heads=2, kv_heads=2, dim=64, dim_v=40, dtype=dtype)
    agree(autoflash.attention(*other, return_lse=True), expected(*other))
