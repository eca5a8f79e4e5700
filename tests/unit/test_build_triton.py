"""Does the Triton builder compile without a GPU, remember, fail cleanly and launch as promised?"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoflash.build import triton as builder
from autoflash.codegen import ops
from autoflash.codegen.catalog import installed
from autoflash.codegen.template import Source
from autoflash.device import KNOWN_GPUS
from autoflash.errors import BuildError, CompileError, ToolchainMissing
from autoflash.problem import Problem

pytest.importorskip("triton", reason="triton has no wheel for this platform")

SM80 = KNOWN_GPUS["sm80"]
PROBLEM = Problem.parse("b2s512h4d32f-float16")
HEADER = "import triton\nimport triton.language as tl\n\n\n"
KERNEL = HEADER + "@triton.jit\ndef kernel({parameters}):\n{body}\n"


def rendered() -> Source:
    template = installed().get("triton/fwd")
    return template.render(template.default_config(PROBLEM, SM80), PROBLEM, SM80)


def source_of(body: str) -> Source:
    text = KERNEL.format(parameters=ops.FWD.python_parameters, body=body)
    return replace(rendered(), template="test/broken", text=text)


def test_a_module_compiles_without_a_gpu(capfd):
    artifact = builder.compile_source(rendered(), SM80)
    resources = artifact.resources
    assert {path.name for path in artifact.directory.iterdir()} >= {
        "kernel.py",
        "kernel.cubin",
        "kernel.json",
        "meta.json",
    }
    assert resources.num_threads == 256
    assert 16 < resources.registers <= 255
    assert resources.spill_bytes == 0
    assert 0 < resources.smem_bytes <= SM80.smem_bytes_per_block
    assert resources.binary_bytes == (artifact.directory / "kernel.cubin").stat().st_size
    assert capfd.readouterr() == ("", "")


def test_what_is_compiled_is_not_compiled_again(monkeypatch):
    first = builder.compile_source(rendered(), SM80)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert builder.compile_source(rendered(), SM80) == first


def test_the_binary_depends_neither_on_time_nor_on_place(cache_dir, tmp_path, monkeypatch):
    first = builder.compile_source(rendered(), SM80)
    binary = (first.directory / "kernel.cubin").read_bytes()
    first.directory.rename(tmp_path / "elsewhere")
    second = builder.compile_source(rendered(), SM80)
    assert second.digest == first.digest
    assert (second.directory / "kernel.cubin").read_bytes() == binary


def test_arch_and_compiler_settings_are_part_of_the_digest(monkeypatch):
    class Found(Exception):
        pass

    def refuse(digest, _fill):
        raise Found(digest)

    def digest_for(arch: str) -> str:
        with pytest.raises(Found) as found:
            builder.compile_source(rendered(), KNOWN_GPUS[arch])
        return str(found.value)

    monkeypatch.setattr(builder.store, "find_or_make", refuse)
    plain = digest_for("sm80")
    assert plain != digest_for("sm90")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert plain == digest_for("sm80")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/another/ptxas")
    assert plain != digest_for("sm80")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    missing_name(q)", "missing_name"),
        ("    tl.static_assert(False, 'tiles do not fit')", "tiles do not fit"),
        ("    tl.store(q + tl.arange(0, 48), 0.0)", "arange's range must be a power of 2"),
        (
            "    tl.inline_asm_elementwise('nonsense.f32 $0, $1;', '=f,f', [softmax_scale], "
            "tl.float32, is_pure=False, pack=1)",
            "nonsense",
        ),
    ],
)
def test_a_rejected_source_is_a_compile_error_with_the_reason(body, said, cache_dir, capfd):
    with pytest.raises(CompileError) as caught:
        builder.compile_source(source_of(body), SM80)
    message = str(caught.value)
    assert message.startswith("test/broken: triton rejected it for sm80: ")
    assert said in message
    assert "\n" not in message
    assert said in caught.value.log
    assert capfd.readouterr() == ("", "")
    assert not list((cache_dir / "kernels").rglob("kernel.py")), "a failure leaves nothing behind"


def test_a_compiler_that_dies_is_a_compile_error():
    broken = replace(rendered(), template="test/broken", text="import os\n\nos.abort()\n")
    with pytest.raises(CompileError, match="killed by SIGABRT"):
        builder.compile_source(broken, SM80)


def test_a_compiler_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(builder, "COMPILE_TIMEOUT_S", 0.5)
    broken = replace(rendered(), template="test/broken", text="import time\n\ntime.sleep(60)\n")
    with pytest.raises(CompileError, match="took more than"):
        builder.compile_source(broken, SM80)


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        ("x\nptxas fatal   : Unresolved extern function 'f'\ny", 1, "Unresolved extern function"),
        ("ptxas /tmp/k.ptx, line 9; error   : Unknown symbol 'z'\n", 1, "Unknown symbol 'z'"),
        ("k.py:3:4: error: operand #0 is wrong\nRuntimeError: failed", 1, "operand #0 is wrong"),
        ("LLVM ERROR: out of things\n", -6, "LLVM ERROR: out of things"),
        ("", -11, "killed by SIGSEGV"),
        ("Traceback\n  File\nNameError: name 'x' is not defined\n", 1, "NameError: name 'x'"),
        ("", 3, "exit code 3"),
    ],
)
def test_the_line_that_says_why_is_found(output, code, reason):
    assert reason in builder._first_error(output, code)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(builder, "version", lambda: None)
    with pytest.raises(ToolchainMissing, match="pip install"):
        builder.compile_source(rendered(), SM80)


GLUON = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def kernel({parameters}):
    rows = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(lse + rows, rows * softmax_scale, mask=rows < seqlen_q)


def grid(batch):
    return (batch,)
"""
INTERPRETED = """
import pickle, sys
from autoflash.build import triton as builder
from autoflash.device import KNOWN_GPUS
from autoflash.errors import BuildError
try:
    builder.load(builder.compile_source(pickle.load(sys.stdin.buffer), KNOWN_GPUS["sm80"]))
except BuildError as error:
    print(error)
"""


def gluon_source() -> Source:
    text = GLUON.format(parameters=ops.FWD.python_parameters)
    return replace(rendered(), template="test/gluon", text=text, options={"num_warps": 4})


def test_a_gluon_module_compiles_by_its_own_way_in(cache_dir):
    artifact = builder.compile_source(gluon_source(), SM80)
    assert artifact.resources.num_threads == 128
    metadata = json.loads((artifact.directory / "kernel.json").read_text())
    assert metadata["name"] == "kernel"


def test_what_gluon_rejects_is_a_compile_error(cache_dir):
    broken = gluon_source().text.replace("[4], [0]", "[2], [0]")  # 2 warps, where there are 4
    with pytest.raises(CompileError, match="test/gluon: triton rejected it for sm80") as caught:
        builder.compile_source(replace(gluon_source(), text=broken), SM80)
    assert "warps" in caught.value.log


def test_the_interpreter_says_that_it_runs_no_gluon(cache_dir):
    child = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        input=pickle.dumps(gluon_source()),
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    )
    said = child.stdout.decode()
    assert said.startswith("test/gluon: ")
    assert "TRITON_INTERPRET=1" in said
    assert "templates/triton" in said


def test_version_is_that_of_the_package():
    import triton

    assert builder.version() == triton.__version__


def test_loading_without_a_gpu_is_a_build_error():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(BuildError, match="cannot be loaded here"):
        builder.load(builder.compile_source(rendered(), SM80))


def test_scalars_reach_a_kernel_as_what_they_are(cache_dir):
    # Those that a launch passes: sizes and window in 32 bits, strides in 64, the cap as a float.
    types = ops.FWD.triton_signature("float16")
    assert [types[argument.name] for argument in ops.FWD.scalars] == [
        *["i32"] * 7,
        *["i64"] * 12,
        "fp32",
    ]
    body = "    tl.store(lse + 0, window_left + 2.0 * window_right + softcap)"
    assert builder.compile_source(source_of(body), SM80).resources.binary_bytes > 0


def compiled_with(
    launcher: SimpleNamespace, grid: tuple[int, ...], **more: object
) -> builder._Compiled:
    """A loaded kernel without a device: what `prepare` reads is set by hand."""
    kernel = builder._Compiled.__new__(builder._Compiled)
    kernel._module = SimpleNamespace(grid=lambda: grid, **more)
    binary = SimpleNamespace(function=11, packed_metadata=(8, 1, 1024))
    kernel._functions = {"kernel": builder._CompiledFunction(kernel, binary, launcher)}
    return kernel


def launcher_with(calls: list[tuple], scratch: int = 0, **more: object) -> SimpleNamespace:
    return SimpleNamespace(
        launch=lambda *args: calls.append(args),
        launch_cooperative_grid=False,
        launch_pdl=False,
        num_ctas=1,
        global_scratch_size=scratch,
        **more,
    )


SCALARS: tuple[int | float, ...] = (*range(100, 119), 30.5)
POINTERS = (1, 2, 3, 4, 0)


def test_launch_hands_triton_3_6_its_flat_argument_list():
    calls: list[tuple] = []
    launch = compiled_with(launcher_with(calls), (6,)).prepare(SCALARS)
    launch(*POINTERS, 0.5, 77)
    head = (6, 1, 1, 77, 11, False, False, None, None, (8, 1, 1024), None, None, None)
    assert calls == [(*head, *POINTERS, 0, *SCALARS, 0.5)]


def test_launch_hands_later_tritons_a_signature_and_a_tuple():
    calls: list[tuple] = []
    launcher = launcher_with(calls, arg_annotations=["a"], kernel_signature=b"s")
    compiled_with(launcher, (6, 2)).prepare(SCALARS)(*POINTERS, 0.5, 77)
    head = (6, 2, 1, 77, 11, False, False, (8, 1, 1024), None, None, None, None, None, ["a"], b"s")
    assert calls == [(*head, (*POINTERS, 0, *SCALARS, 0.5))]


def test_descriptors_get_memory_from_torch(monkeypatch):
    import torch

    asked: list[tuple] = []

    def empty(size, *, dtype, device):
        asked.append((size, dtype, device))
        return "memory"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch, "empty", empty)
    calls: list[tuple] = []
    launch = compiled_with(launcher_with(calls, scratch=256), (6,)).prepare(SCALARS)
    assert asked == []
    launch(*POINTERS, 0.5, 77)
    launch(*POINTERS, 0.5, 77)
    assert asked == [(6 * 256, torch.uint8, 3)] * 2
    assert calls[0][7] == "memory"


def test_grids_see_the_scalars_that_they_name():
    def grid(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left):
        return (batch, seqlen_k, window_left)

    calls: list[tuple] = []
    kernel = compiled_with(launcher_with(calls), ())
    kernel._module.grid = grid
    kernel.prepare(SCALARS)(*POINTERS, 0.5, 77)
    assert calls[0][:3] == (100, 102, 105)


def test_a_workspace_is_allocated_for_every_call_and_given_to_both_functions(monkeypatch):
    import torch

    held: list[torch.Tensor] = []

    def empty(size, *, dtype, device):
        assert (dtype, device) == (torch.uint8, 3)
        held.append(torch.zeros(size, dtype=dtype))
        return held[-1]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch, "empty", empty)
    calls: list[tuple] = []
    kernel = compiled_with(
        launcher_with(calls),
        (6, 4),
        workspace=lambda batch, seqlen_q: 10 * (seqlen_q - batch),
        combine_grid=lambda batch: (batch,),
    )
    second = SimpleNamespace(function=22, packed_metadata=(4, 1, 0))
    combine = builder._CompiledFunction(kernel, second, launcher_with(calls))
    kernel._functions["combine"] = combine
    launch = kernel.prepare(SCALARS)
    assert held == []
    launch(*POINTERS, 0.5, 77)
    launch(*POINTERS, 0.5, 77)
    assert [tensor.numel() for tensor in held] == [10, 10]
    grids, functions, addresses = zip(*((c[:3], c[4], c[18]) for c in calls), strict=True)
    assert grids == ((6, 4, 1), (100, 1, 1)) * 2
    assert functions == (11, 22) * 2
    first, last = (tensor.data_ptr() for tensor in held)
    assert addresses == (first, first, last, last)

    calls.clear()
    kernel.prepare((7, 7, *SCALARS[2:]))(*POINTERS, 0.5, 77)  # no memory: nothing to combine
    assert [(c[:3], c[4], c[18]) for c in calls] == [((6, 4, 1), 11, 0)]


def test_a_second_function_is_compiled_too_and_the_first_is_what_is_reported():
    plain = builder.compile_source(source_of("    tl.store(lse, softcap)"), SM80)
    more = source_of("    tl.store(lse, softcap)").text
    more += "\n\n@triton.jit\ndef combine(" + ops.FWD.python_parameters + "):\n"
    more += "    at = tl.arange(0, 1024)\n    tl.store(workspace + at, tl.sqrt(softcap + at))\n"
    source = replace(source_of(""), text=more)
    artifact = builder.compile_source(source, SM80)
    assert {path.name for path in artifact.directory.iterdir()} >= {
        *(f"{name}.{end}" for name in ("kernel", "combine") for end in ("cubin", "json")),
    }
    found = artifact.resources
    assert found.registers == plain.resources.registers
    assert found.num_threads == source.options["num_warps"] * 32
    described = json.loads((artifact.directory / "combine.json").read_text())
    assert (described["name"], described["num_warps"]) == ("combine", 4)


def test_an_empty_grid_launches_nothing():
    calls: list[tuple] = []
    launch = compiled_with(launcher_with(calls), (0,)).prepare(SCALARS)
    launch(*POINTERS, 0.5, 77)
    assert calls == []


def test_meta_says_what_compiled_it():
    meta = json.loads(
        Path(builder.compile_source(rendered(), SM80).directory / "meta.json").read_text()
    )
    assert meta["arch"] == "sm80"
    assert meta["compiler"] == f"triton {builder.version()}"
    assert meta["template"] == "triton/fwd"
    assert meta["warnings"] == []
