"""Does CUDA source become a library, are its faults said in words, does it run without nvcc?"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, cast

import pytest

from autoflash import build, settings
from autoflash.build import cuda, library, memory, nvcc
from autoflash.codegen import ops
from autoflash.codegen.catalog import Catalog
from autoflash.codegen.template import Source
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS, for_arch
from autoflash.errors import BuildError, CompileError, ToolchainMissing
from autoflash.problem import Problem
from autoflash.runtime.dispatch import Dispatcher
from autoflash.runtime.explain import explain
from autoflash.tuning import effort as efforts
from autoflash.tuning.plan import plan
from autoflash.tuning.predict import over_resources, spills_heavily
from autoflash.tuning.run import Run

SM90, SM80 = KNOWN_GPUS["sm90"], KNOWN_GPUS["sm80"]
DATA = Path(__file__).parents[1] / "data" / "naive"
PROBLEM = Problem.parse("b2s128h4/2d64c-float16")

_absent = nvcc.unavailable()
needs_nvcc = pytest.mark.skipif(_absent is not None, reason=f"it needs {_absent}")

BODY = """
#include <cstdint>
{kernel}
extern "C" int launch({parameters}) {{ {body} }}
"""


def source(kernel: str = "", body: str = "return 0;", **options: int) -> Source:
    parameters = ops.FWD.c_parameters("void* stream")
    return Source(
        template="cuda/of-a-test",
        language="cuda",
        text=BODY.format(kernel=kernel, parameters=parameters, body=body),
        op="fwd",
        dtype="float16",
        aligned=True,
        options=options or {"smem_bytes": 0, "num_threads": 128},
    )


@pytest.fixture
def no_nvcc(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a CUDA toolkit, an nvidia-cuda-nvcc package or CUTLASS."""
    hide_nvcc(monkeypatch, tmp_path)


def hide_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AUTOFLASH_NVCC", "AUTOFLASH_CUTLASS", "CUTLASS_PATH"):
        monkeypatch.delenv(name, raising=False)
    settings.get.cache_clear()
    (tmp_path / "empty").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(nvcc, "_cuda_homes", lambda: ())
    monkeypatch.setattr(nvcc, "find_spec", lambda name: None)
    forget()


def forget() -> None:
    nvcc._compiler.cache_clear()
    nvcc._headers.cache_clear()


@pytest.fixture(autouse=True)
def _remembered_is_forgotten() -> Any:
    yield
    settings.get.cache_clear()
    forget()


def counting_nvcc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, then: str = 'exec "$real" "$@"'
) -> Path:
    """AUTOFLASH_NVCC: a script around nvcc that counts what it compiles and links."""
    real = nvcc.compiler().command
    script = tmp_path / "my $nvcc"
    script.write_text(
        f"#!/bin/sh\nreal={real}\n"
        'case "$1" in --version|--dryrun) exec "$real" "$@";; esac\n'
        f'echo >> "{tmp_path}/calls"\n{then}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("AUTOFLASH_NVCC", f"'{script}'")
    settings.get.cache_clear()
    return tmp_path / "calls"


# What nvcc says ---------------------------------------------------------------------------------

TWO_KERNELS = """\
[1/2] nvcc -Xptxas=-v kernel.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z10fwd_kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z10fwd_kernelv
    16 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_Z5emptyv' for 'sm_90a'
ptxas info    : Function properties for _Z5emptyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 500 bytes cmem[0]
ptxas warning : Registers are spilled to local memory in function '_Z10fwd_kernelv', 8 bytes
"""
LOSS = (
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in the function 'f'"
)


def test_the_neediest_kernel_of_a_source_counts() -> None:
    assert nvcc.usage(TWO_KERNELS) == nvcc.Usage(
        registers=168, spill_bytes=8, spill_load_bytes=24, stack_bytes=16, static_smem_bytes=1024
    )
    assert nvcc.usage("").registers is None


def test_warnings_and_losses_are_told_apart() -> None:
    [warning] = nvcc.warnings(TWO_KERNELS)
    assert warning.startswith("ptxas warning : Registers are spilled")
    assert nvcc.loss(TWO_KERNELS) is None
    assert (nvcc.loss(LOSS) or "").startswith("wgmma.mma_async instructions are serialized due to")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "FAILED: [code=1] kernel.o \nnvcc -c kernel.cu\n"
            'include/cute/layout.hpp(1101): error: static assertion failed with "Divisibility"\n'
            "    static_assert(decltype(x)::value);\n"
            "          detected during:\n"
            '            instantiation of "void f(): error" at line 379 of cute/a.hpp\n'
            'kernel.cu(9): error: identifier "x" is undefined\n'
            '2 errors detected in the compilation of "kernel.cu".\n',
            'include/cute/layout.hpp(1101): error: static assertion failed with "Divisibility"',
        ),
        (
            "ptxas info    : 0 bytes gmem\n"
            "ptxas error   : Entry function 'f' uses too much shared data (0x40000 bytes)\n",
            "ptxas error   : Entry function 'f' uses too much shared data (0x40000 bytes)",
        ),
        (
            "ptxas /tmp/k.ptx, line 33; error   : Arguments mismatch for instruction 'mov'\n",
            "ptxas /tmp/k.ptx, line 33; error   : Arguments mismatch for instruction 'mov'",
        ),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_33'\n",
            "nvcc fatal   : Unsupported gpu architecture 'compute_33'",
        ),
        (
            "kernel.cu: In function 'int launch()':\nkernel.cu:3:5: error: 'y' was not declared\n",
            "kernel.cu:3:5: error: 'y' was not declared",
        ),
        ("kernel.cu(2): catastrophic error: cannot open\n", "kernel.cu(2): catastrophic error:"),
        ("sh: line 1: 77 Killed    cicc\n", "sh: line 1: 77 Killed    cicc"),
    ],
)
def test_the_first_real_error_line(output: str, line: str) -> None:
    found = nvcc.ERROR_LINE.search(output)
    assert found
    assert found.group().startswith(line)


def test_backtraces_and_counts_are_no_error_lines() -> None:
    said = 'instantiation of "f" at line 9 of a.hpp\n1 error detected in the compilation of "k.cu".'
    assert nvcc.ERROR_LINE.search(said) is None


# Targets and gates ------------------------------------------------------------------------------


def test_hopper_code_is_for_hopper_alone() -> None:
    assert [nvcc.target(capability) for capability in (80, 90, 120)] == ["80", "90a", "120"]
    assert nvcc.runs_on(90, 90)
    assert not nvcc.runs_on(90, 100)
    assert nvcc.runs_on(80, 86)
    assert not nvcc.runs_on(86, 80)
    assert not nvcc.runs_on(80, 90)


def test_too_much_local_memory_is_not_worth_a_launch() -> None:
    arrays = {"spill_bytes": 0, "stack_bytes": 4096}
    assert "4096 bytes per thread" in (spills_heavily(arrays, SM90) or "")
    assert spills_heavily({"spill_bytes": 16, "stack_bytes": 16}, SM90) is None
    assert spills_heavily({"spill_bytes": 16, "stack_bytes": None}, SM90) is None
    assert "300000 bytes of shared memory" in (over_resources({"smem_bytes": 300_000}, SM90) or "")


@pytest.mark.parametrize("options", [{"smem_bytes": 1}, {"smem_bytes": 1, "num_warps": 4}])
def test_a_declaration_must_say_threads_and_shared_memory(options: dict[str, int]) -> None:
    with pytest.raises(BuildError, match=r"cuda/of-a-test: .*num_threads and smem_bytes"):
        build.compile_source(source(**options), SM90)


def test_the_build_file() -> None:
    compiler = nvcc.Compiler("'/opt/a b$c/nvcc'", "13.0.88", (Path("/t/include/cccl"),), ())
    headers = nvcc.Headers(Path("/site/my cutlass"), "4.2.0")
    text = cuda.ninja_text(compiler, headers, cuda._flags(SM90))
    assert "nvcc = '/opt/a b$$c/nvcc'\n" in text
    assert "-gencode=arch=compute_90a,code=sm_90a" in text
    assert "includes = '-isystem=/site/my cutlass' -isystem=/t/include/cccl\n" in text
    assert re.search(r"command = \$nvcc \$flags \$includes -MD -MF \$out.d -c \$in -o \$out", text)
    assert "depfile = $out.d\n" in text
    assert "pool memory\n  depth = 1\n" in text
    assert text.count("pool = memory\n") == 1
    assert "-shared -cudart=static" in text
    assert "-fvisibility=hidden" in text
    assert "fast_math" not in text


def test_floats_travel_by_their_bits() -> None:
    scalars = tuple(range(len(ops.FWD.scalars) - 1))
    for value in (0.0, -0.0, 30.5, 1e-40, -3.4e38):
        word = library.bound_array(ops.FWD, (*scalars, value))[-1]
        assert ctypes.c_float.from_buffer(ctypes.c_int32(word)).value == pytest.approx(value)
    assert list(library.bound_array(ops.FWD, (*scalars, 1.0)))[:-1] == list(scalars)


# Memory -----------------------------------------------------------------------------------------


def test_compilers_at_once_are_bounded_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 20971520 kB\n")
    assert memory.available_bytes(tmp_path / "meminfo", tmp_path) == 20 << 30
    (tmp_path / "memory.max").write_text(f"{12 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{4 << 30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 30}\n")
    assert memory.available_bytes(tmp_path / "meminfo", tmp_path) == 9 << 30
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path / "meminfo", tmp_path) == 20 << 30
    assert memory.available_bytes(tmp_path / "no", tmp_path) is None
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * cuda.MEMORY_BYTES)
    assert build.jobs_within_memory(8, {"cuda", "python"}, SM90) == 3
    assert build.jobs_within_memory(2, {"cuda"}, SM90) == 2
    assert build.jobs_within_memory(8, {"python", "cpp"}, SM90) == 8
    assert build.jobs_within_memory(8, {"cuda", "cpp"}, for_arch("cpu")) == 8
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    assert build.jobs_within_memory(8, {"cuda"}, SM90) == 1


# Finding the toolchain --------------------------------------------------------------------------


def fake_nvcc(folder: Path, text: str = "Cuda compilation tools, release 13.0, V13.0.88") -> Path:
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho '{text}'\necho '#$ TOP={folder}/bin/..'\n")
    program.chmod(0o755)
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart_static.a").touch()
    (folder / "include" / "cccl").mkdir(parents=True)
    return program


def test_no_compiler_says_what_to_do(no_nvcc: None) -> None:
    with pytest.raises(ToolchainMissing) as caught:
        build.compile_source(source(), SM90)
    said = str(caught.value)
    assert "cuda/of-a-test for sm90" in said
    for word in ("PATH", "CUDA_HOME", "AUTOFLASH_NVCC", "autoflash[nvcc]"):
        assert word in said


def test_a_compiler_named_and_not_there(no_nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFLASH_NVCC", "/nowhere/nvcc")
    settings.get.cache_clear()
    with pytest.raises(ToolchainMissing, match="AUTOFLASH_NVCC='/nowhere/nvcc' does not exist"):
        nvcc.compiler()


def test_a_compiler_that_does_not_run(
    no_nvcc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = fake_nvcc(tmp_path / "toolkit")
    program.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("AUTOFLASH_NVCC", str(program))
    settings.get.cache_clear()
    with pytest.raises(ToolchainMissing, match="does not run"):
        nvcc.compiler()


def test_a_toolkit_of_wheels_or_in_cuda_home(
    no_nvcc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty" / "gcc").touch(mode=0o755)
    site = tmp_path / "site" / "nvidia"
    packaged = fake_nvcc(site / "cu13")
    spec = ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(site)]
    monkeypatch.setattr(nvcc, "find_spec", {"nvidia": spec}.get)
    monkeypatch.setenv("PATH", f"{tmp_path}/empty:/usr/bin:/bin")
    if shutil.which("nvcc") is None:
        found = nvcc.compiler()
        assert found.command == str(packaged)
        assert found.version == "13.0.88"
        assert found.includes == (site / "cu13" / "include" / "cccl",)
        assert found.libraries == (site / "cu13" / "lib",)
    at_home = fake_nvcc(tmp_path / "home")
    monkeypatch.setattr(nvcc, "_cuda_homes", lambda: (str(tmp_path / "home"),))
    assert nvcc._search("", nvcc._cuda_homes()) == str(at_home)
    on_path = fake_nvcc(tmp_path / "on-path")
    assert nvcc._search(str(on_path.parent), nvcc._cuda_homes()) == str(on_path)


def test_no_host_compiler(no_nvcc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOFLASH_NVCC", str(fake_nvcc(tmp_path / "toolkit")))
    settings.get.cache_clear()
    with pytest.raises(ToolchainMissing, match="needs gcc on PATH"):
        nvcc.compiler()


def test_where_the_headers_are(
    no_nvcc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ToolchainMissing, match=r"pip install 'autoflash\[cuda\]'"):
        nvcc.headers()
    checkout = tmp_path / "cutlass"
    (checkout / "include" / "cute").mkdir(parents=True)
    (checkout / "include" / "cutlass").mkdir()
    (checkout / "include" / "cutlass" / "version.h").write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 9\n#define CUTLASS_PATCH 1\n"
    )
    expected = nvcc.Headers(checkout / "include", "4.9.1")
    monkeypatch.setenv("CUTLASS_PATH", str(checkout))
    assert nvcc.headers() == expected
    monkeypatch.setenv("AUTOFLASH_CUTLASS", str(tmp_path / "elsewhere"))
    settings.get.cache_clear()
    with pytest.raises(ToolchainMissing, match=r"AUTOFLASH_CUTLASS=.*elsewhere.* has no include"):
        nvcc.headers()
    monkeypatch.setenv("AUTOFLASH_CUTLASS", str(checkout / "include"))
    settings.get.cache_clear()
    assert nvcc.headers() == expected


# Without a toolchain ----------------------------------------------------------------------------


def row(problem: Problem = PROBLEM) -> Source:
    template = Catalog.load(DATA).get("cuda/row")
    return template.render(template.default_config(problem, SM90), problem, SM90)


def test_tuning_refuses_what_cannot_be_compiled(no_nvcc: None) -> None:
    [planned] = plan([PROBLEM], SM90, catalog=Catalog.load(DATA), present=True)
    assert planned.templates == ()
    assert planned.trials == 0
    assert planned.refused["cuda/row"].startswith("nvcc and the CUTLASS headers (")


def test_a_run_leaves_out_what_cannot_be_compiled(no_nvcc: None, tmp_path: Path) -> None:
    templates = both_families(tmp_path).templates
    with Database.open("sqlite://") as database:
        run = Run(
            device=SM90, templates=templates, effort=efforts.of("quick"), policy="test", seed=0,
            jobs=1, database=database, workers=cast("Any", None),
        )  # fmt: skip
    assert [template.name for template in run.accepting(PROBLEM)] == ["triton/fwd"]
    assert run.refusals(PROBLEM)["cuda/row"].startswith("nvcc and the CUTLASS headers (")


def both_families(root: Path) -> Catalog:
    """cuda/row, and a Triton template that takes the same problems."""
    declaration = (
        '{#---\nsummary = "."\nsource = "."\nop = "fwd"\n[accepts]\n"any" = "true"\n'
        "[tunables]\nx = [1]\n[default]\nx = 1\n---#}\nx = {{ x }}\n"
    )
    shutil.copytree(DATA, root / "templates")
    (root / "templates" / "triton").mkdir()
    (root / "templates" / "triton" / "fwd.py.jinja").write_text(declaration)
    return Catalog.load(root / "templates")


class _Anything(build.Kernel):
    def __init__(self, source: Source) -> None:
        resources = build.Resources(compile_s=0.0, binary_bytes=0)
        super().__init__(build.Artifact(source, "sm90", "", Path(), resources))

    def prepare(self, scalars: tuple[int | float, ...]) -> build.Launch:
        raise NotImplementedError


def test_serving_goes_on_to_the_next_family(no_nvcc: None, tmp_path: Path) -> None:
    catalog = both_families(tmp_path)
    # A warning would be an error here: a machine without nvcc lacks nothing it ever had.
    dispatcher = Dispatcher(SM90, [], catalog, lambda source, device: _Anything(source))
    served = dispatcher.serve(PROBLEM)
    assert served.config is not None
    assert served.config.template == "triton/fwd"
    explanation = explain(PROBLEM, dispatcher=dispatcher)
    assert explanation.refused["cuda/row"].startswith("nvcc and the CUTLASS headers (nvcc is nei")
    assert explanation.config == served.config
    alone = Dispatcher(SM90, [], Catalog.load(DATA)).serve(PROBLEM)
    assert alone.rule == "torch"
    assert "cuda/row needs: nvcc and the CUTLASS headers" in alone.reason


@needs_nvcc
def test_serving_takes_what_was_built_elsewhere(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = build.compile_source(row(), SM90)
    elsewhere = tmp_path / "shipped"
    cache_dir.rename(elsewhere)
    monkeypatch.setenv("AUTOFLASH_CACHE_DIR", str(elsewhere))
    hide_nvcc(monkeypatch, tmp_path)
    with pytest.raises(ToolchainMissing):
        nvcc.compiler()
    found = build.compile_source(row(), SM90)
    assert found.digest == built.digest
    assert found.resources == built.resources
    assert elsewhere in found.directory.parents
    with pytest.raises(ToolchainMissing, match="not built yet"):
        build.compile_source(row(), SM80)
    catalog = both_families(tmp_path)
    dispatcher = Dispatcher(SM90, [], catalog, lambda source, device: _Anything(source))
    served = dispatcher.serve(PROBLEM)
    assert served.config is not None
    assert served.config.template == "cuda/row"
    another = dispatcher.serve(dataclasses.replace(PROBLEM, dtype="bfloat16"))
    assert another.config is not None
    assert another.config.template == "triton/fwd"


# Compiling --------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("device", [SM80, SM90], ids=["sm80", "sm90"])
def test_a_template_becomes_a_library(device: Any) -> None:
    template = Catalog.load(DATA).get("cuda/row")
    config = template.default_config(PROBLEM, device)
    artifact = build.compile_source(template.render(config, PROBLEM, device), device)
    used = artifact.resources
    assert used.smem_bytes == template.derive(config, PROBLEM, device)["smem_bytes"]
    assert used.num_threads == 128
    assert used.registers is not None
    assert 16 < used.registers <= 255
    assert (used.spill_bytes, used.spill_load_bytes, used.stack_bytes) == (0, 0, 0)
    facts = json.loads((artifact.directory / "meta.json").read_text())
    assert facts["warnings"] == []
    assert facts["compiler"].startswith("nvcc ")
    assert facts["arch"] == device.arch
    assert "Compiling entry function" in (artifact.directory / "nvcc.log").read_text()
    assert not (artifact.directory / "kernel.o").exists()


@needs_nvcc
def test_a_library_needs_no_cuda_runtime_and_shows_two_names() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("binutils are not installed")
    path = str(build.compile_source(row(), SM90).directory / "kernel.so")

    def read(*arguments: str) -> str:
        return subprocess.run(
            [readelf, "-W", *arguments, path], capture_output=True, text=True, check=True
        ).stdout

    needed = re.findall(r"NEEDED.*\[(.+)\]", read("-d"))
    assert needed
    assert not [name for name in needed if "cuda" in name or "torch" in name or "nv" in name]
    assert "RUNPATH" not in read("-d")
    symbols = [line.split() for line in read("--dyn-syms").splitlines() if " GLOBAL " in line]
    defined = {words[7] for words in symbols if words[6] != "UND"}
    assert defined == {"launch_bound", "launch_error"}
    assert not [words[7] for words in symbols if words[6] == "UND" and words[7].startswith("cu")]


@needs_nvcc
def test_how_much_workspace_a_source_asks_for_can_be_asked_without_a_gpu() -> None:
    scalars = ", ".join(f"{ops.C_TYPES[arg.kind]} {arg.name}" for arg in ops.FWD.scalars)
    asks = source(
        f'extern "C" int64_t workspace_bytes({scalars}) {{\n'
        "  return (int64_t)seqlen_q * (int64_t)softcap * out_stride_head;\n}"
    )
    opened = library.open_library(cuda.compile_source(asks, SM90).directory)
    opened.workspace_bound.restype = ctypes.c_int64
    bound = library.bound_array(ops.FWD, (1, 1 << 30, *[3] * 16, 1 << 10, 4.0))
    assert opened.workspace_bound(bound) == 1 << 42
    plain = library.open_library(cuda.compile_source(source(), SM90).directory)
    assert not hasattr(plain, "workspace_bound")


@needs_nvcc
def test_a_second_build_compiles_nothing(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = counting_nvcc(monkeypatch, tmp_path)
    first = build.compile_source(source(), SM90)
    assert calls.read_text().count("\n") == 2  # one to compile, one to link
    assert build.compile_source(source(), SM90) == first
    assert calls.read_text().count("\n") == 2
    digests = {first.digest, build.compile_source(source(), SM80).digest}
    digests.add(build.compile_source(source(body="return 3;"), SM90).digest)
    assert len(digests) == 3


@needs_nvcc
def test_another_compiler_builds_again(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.compile_source(source(), SM90)
    found = nvcc.compiler()
    newer = dataclasses.replace(found, version="99.1")
    monkeypatch.setattr(nvcc, "compiler", lambda: newer)
    second = build.compile_source(source(), SM90)
    assert second.digest != first.digest
    monkeypatch.setattr(
        nvcc, "headers", lambda: (_ for _ in ()).throw(ToolchainMissing("no headers"))
    )
    assert build.compile_source(source(), SM90).digest == second.digest  # what was made last


@needs_nvcc
def test_a_compile_error_gives_its_line_and_keeps_the_rest(cache_dir: Path) -> None:
    kernel = '#include <cutlass/array.h>\nstatic_assert(sizeof(int) == 5, "five bytes"); int x = y;'
    with pytest.raises(CompileError) as caught:
        build.compile_source(source(kernel), SM90)
    said = str(caught.value)
    assert said.startswith("cuda/of-a-test: nvcc rejected it for sm90: kernel.cu(4): error: ")
    assert "five bytes" in said
    assert "\n" not in said
    assert '"y" is undefined' in caught.value.log
    assert not list(cache_dir.glob("kernels/*/*/kernel.cu")), "a failed build was published"


SPILLS = """
__global__ void __launch_bounds__(1024, 2) fwd_kernel(float* out) {
  float x[144];
#pragma unroll
  for (int i = 0; i < 144; ++i) x[i] = out[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 144; ++i) out[i * 1024 + threadIdx.x] = x[i] * x[(i * 7 + 3) % 144];
}
"""


@needs_nvcc
def test_spills_and_static_shared_memory_are_seen_before_a_launch(cache_dir: Path) -> None:
    kernel = SPILLS.replace("float x", "__shared__ float s[256]; s[threadIdx.x & 255] = 1; float x")
    kernel = kernel.replace("] * x[", "] * s[i] * x[")
    artifact = build.compile_source(source(kernel, smem_bytes=1 << 16, num_threads=1024), SM90)
    used = artifact.resources
    assert used.smem_bytes == (1 << 16) + 1024
    assert (used.registers, used.num_threads) == (32, 1024)
    assert used.spill_bytes
    assert used.spill_load_bytes
    assert used.stack_bytes
    assert spills_heavily(used.to_dict(), SM90)
    [warning] = json.loads((artifact.directory / "meta.json").read_text())["warnings"]
    assert "spilled" in warning


SERIALIZED = """
__global__ void fwd_kernel(float* out, uint64_t a, uint64_t b) {
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < 8; ++i) {
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1,"
                 " 0, 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] *= 2.0f;
    asm volatile("wgmma.commit_group.sync.aligned;");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


@needs_nvcc
def test_products_that_ptxas_serializes_are_an_outcome(cache_dir: Path) -> None:
    with pytest.raises(CompileError) as caught:
        build.compile_source(source(SERIALIZED), SM90)
    assert "cuda/of-a-test: ptxas for sm90: wgmma.mma_async instructions are serialized" in str(
        caught.value
    )
    assert "C75" in caught.value.log


@needs_nvcc
def test_a_compilation_that_takes_too_long_is_ended(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "COMPILE_TIMEOUT_S", 3.0)
    counting_nvcc(monkeypatch, tmp_path, f'echo $$ > "{tmp_path}/pid"\nexec sleep 60')
    with pytest.raises(CompileError, match="has not finished after 3 s"):
        build.compile_source(source(), SM90)
    pid = int((tmp_path / "pid").read_text())
    limit = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists(), "the compiler outlived ninja"


# Loading ----------------------------------------------------------------------------------------

SCALARS = (1, 2, 3, 1, 1, 3, 2, *range(12), 30.5)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries whose launchers start nothing can be loaded without a GPU."""
    monkeypatch.setattr(cuda, "_require_device", lambda artifact: None)


@needs_nvcc
def test_arguments_arrive(any_device: None) -> None:
    names = [argument.name for argument in ops.FWD.scalars]
    body = "if (batch == 0) return 0; "
    body += " ".join(f"lse[{i}] = float({name});" for i, name in enumerate(names))
    body += " lse[20] = softmax_scale; lse[21] = float((uintptr_t)stream); return 0;"
    kernel = build.build(source(body=body), SM90)
    seen = (ctypes.c_float * 22)()
    kernel.prepare(SCALARS)(0, 0, 0, 0, ctypes.addressof(seen), 0.25, 7)
    assert list(seen) == [*SCALARS, 0.25, 7]


@needs_nvcc
def test_a_return_code_is_explained_by_the_cuda_runtime(any_device: None) -> None:
    kernel = build.build(source(body="return batch ? 2 : 0;"), SM90)
    with pytest.raises(BuildError, match="cuda/of-a-test: launch returned 2: out of memory"):
        kernel.prepare(SCALARS)(0, 0, 0, 0, 0, 1.0, 0)


@needs_nvcc
def test_a_launcher_that_fails_over_no_rows_fails_when_it_is_loaded(any_device: None) -> None:
    artifact = build.compile_source(source(body="return 98;"), SM90)
    with pytest.raises(BuildError, match="launch returned 98: invalid device function"):
        build.load(artifact)


@needs_nvcc
def test_two_libraries_share_no_symbol(any_device: None) -> None:
    # An inline function's static variable is one for the whole process, unless it is hidden.
    shared = "inline int& count() {{ static int n = {start}; return n; }}"
    body = "if (batch) { lse[0] = float(++count()); } return 0;"
    one = build.build(source(shared.format(start=10), body), SM90)
    other = build.build(source(shared.format(start=20), body), SM90)
    seen = (ctypes.c_float * 1)()
    counts = []
    for kernel in (one, other, one):
        kernel.prepare(SCALARS)(0, 0, 0, 0, ctypes.addressof(seen), 1.0, 0)
        counts.append(seen[0])
    assert counts == [11, 21, 12]


def artifact_for(arch: str) -> build.Artifact:
    resources = build.Resources(compile_s=0.0, binary_bytes=0)
    return build.Artifact(source(), arch, "", Path("/nowhere"), resources)


def test_without_a_gpu_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BuildError, match="compiled for sm90, and PyTorch finds no CUDA device"):
        build.load(artifact_for("sm90"))


def test_nor_is_it_on_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    with pytest.raises(BuildError, match=r"sm90; the current device, NVIDIA L4, is sm89"):
        build.load(artifact_for("sm90"))
    # sm86 code runs there; what is missing then is the file.
    with pytest.raises(BuildError, match=r"/nowhere/kernel.so cannot be loaded"):
        build.load(artifact_for("sm86"))


@needs_nvcc
def test_importing_and_finding_write_nothing(tmp_path: Path) -> None:
    import sys

    script = "from autoflash.build import nvcc; nvcc.compiler(); print(nvcc.headers().version)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path.cwd(), *sys.path]))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)
    assert list(tmp_path.iterdir()) == []
