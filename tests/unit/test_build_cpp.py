"""Does C++ source become a kernel, and does what goes wrong say what to do."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoflash import build, settings
from autoflash.build import cpp, library
from autoflash.codegen import ops
from autoflash.codegen.template import Source
from autoflash.device import Device, for_arch
from autoflash.errors import BuildError, CacheError, CompileError, ToolchainMissing

CPU = for_arch("cpu")
BODY = """
#include <cstdint>
extern "C" int launch({parameters}) {{ {body} }}
"""


def source(body: str = "return 0;") -> Source:
    parameters = ops.FWD.c_parameters("int num_threads")
    return Source(
        template="cpp/of-a-test",
        language="cpp",
        text=BODY.format(parameters=parameters, body=body),
        op="fwd",
        dtype="float32",
        aligned=True,
        options={},
    )


@pytest.fixture
def compiler(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """AUTOFLASH_CXX: a script around g++ that counts its calls in `calls` beside it."""
    script = tmp_path / "my cxx"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "my cxx ${{MY_VERSION:-1}}" && exit\n'
        f'echo >> "{tmp_path}/calls"\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("AUTOFLASH_CXX", f"'{script}'")
    settings.get.cache_clear()
    cpp._compiler.cache_clear()
    return script


def calls(script: Path) -> int:
    return (script.parent / "calls").read_text().count("\n")


# Sizes, window bounds, twelve strides and softcap, which is a float.
SCALARS = (1, 2, 3, 1, 1, 3, 2, *range(12), 30.5)


def test_arguments_arrive() -> None:
    # Writes what it was given into `lse`, and returns 0.
    names = [argument.name for argument in ops.FWD.scalars]
    body = " ".join(f"lse[{i}] = float({name});" for i, name in enumerate(names))
    body += " lse[20] = softmax_scale; lse[21] = float(num_threads); lse[22] = q == 0; return 0;"
    kernel = build.build(source(body), CPU)
    seen = (ctypes.c_float * 23)()
    kernel.prepare(SCALARS)(0, 0, 0, 0, ctypes.addressof(seen), 0.25, 7)
    assert list(seen) == [*SCALARS, 0.25, 7, 1]


WORKSPACE = """
extern "C" int64_t workspace_bytes({scalars}) {{ return 4 * (num_heads - 1); }}
"""


def test_a_workspace_is_allocated_where_a_source_asks_for_it() -> None:
    types = {"int32": "int32_t", "int64": "int64_t", "float32": "float"}
    scalars = ", ".join(f"{types[arg.kind]} {arg.name}" for arg in ops.FWD.scalars)
    body = (
        "*lse = workspace ? 1 : 0; if (workspace) ((float*)workspace)[num_heads - 2] = 1; return 0;"
    )
    text = source(body).text + WORKSPACE.format(scalars=scalars)
    seen = ctypes.c_float(-1)

    def ran(source: Source, num_heads: int) -> float:
        launch = build.build(source, CPU).prepare((*SCALARS[:3], num_heads, *SCALARS[4:]))
        launch(0, 0, 0, 0, ctypes.addressof(seen), 0.25, 7)
        return seen.value

    asks = dataclasses.replace(source(), text=text)
    assert ran(asks, 1000) == 1
    assert ran(asks, 1) == 0
    assert ran(source(body), 1000) == 0


def test_large_strides_arrive_whole() -> None:
    kernel = build.build(source("return q_stride_batch == (int64_t(1) << 40) ? 0 : 2;"), CPU)
    scalars = (*SCALARS[:7], 1 << 40, *SCALARS[8:])
    kernel.prepare(scalars)(0, 0, 0, 0, 0, 1.0, 1)
    with pytest.raises(BuildError, match="cpp/of-a-test: launch returned 2"):
        kernel.prepare(SCALARS)(0, 0, 0, 0, 0, 1.0, 1)


def test_return_code_1_is_named() -> None:
    kernel = build.build(source("return 1;"), CPU)
    with pytest.raises(BuildError, match="returned 1: there is no memory"):
        kernel.prepare(SCALARS)(0, 0, 0, 0, 0, 1.0, 1)


def test_a_second_build_compiles_nothing(compiler: Path) -> None:
    first = build.compile_source(source(), CPU)
    compilations = calls(compiler)
    assert compilations == 2  # one to compile, one to link
    second = build.compile_source(source(), CPU)
    assert second == first
    assert calls(compiler) == compilations


def test_what_decides_the_digest(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {build.compile_source(source(), CPU).digest}
    digests.add(build.compile_source(source("return 3;"), CPU).digest)
    digests.add(build.compile_source(source(), dataclasses.replace(CPU, isa=())).digest)
    monkeypatch.setenv("MY_VERSION", "2")
    cpp._compiler.cache_clear()
    digests.add(build.compile_source(source(), CPU).digest)
    assert len(digests) == 4


def test_resources_and_facts_are_stored(compiler: Path) -> None:
    artifact = build.compile_source(source(), CPU)
    library = artifact.directory / "kernel.so"
    assert artifact.resources.binary_bytes == library.stat().st_size
    assert artifact.resources.compile_s > 0
    assert artifact.arch == "cpu"
    facts = json.loads((artifact.directory / "meta.json").read_text())
    assert facts["compiler"] == "my cxx 1"
    assert "-O3" in facts["flags"]


@pytest.mark.parametrize(
    ("isa", "present", "absent"),
    [
        ((), [], ["-mavx2", "-mfma", "-mavx512f"]),
        (("avx2", "fma"), ["-mavx2", "-mfma"], ["-mavx512f"]),
        (("avx2", "fma", "avx512f", "avx512_bf16"), ["-mavx512f", "-mavx512bf16"], []),
        (("something-new",), [], ["-msomething-new"]),
    ],
)
def test_flags_come_from_the_device(
    isa: tuple[str, ...], present: list[str], absent: list[str], compiler: Path
) -> None:
    device: Device = dataclasses.replace(CPU, isa=isa)
    text = (build.compile_source(source(), device).directory / "build.ninja").read_text()
    flags = text.split()
    assert set(present) <= set(flags)
    assert not set(absent) & set(flags)
    assert "-march=native" not in flags


def test_openmp_is_compiled_in_but_not_linked() -> None:
    gcc = cpp.ninja_text("g++", "g++ 12.2.0", ("-O3", "-fopenmp"))
    assert "flags = -O3 -fopenmp" in gcc
    assert "-shared $in" in gcc
    assert "-shared -fopenmp $in" in cpp.ninja_text("clang++", "clang version 19", ("-O3",))


def test_a_dollar_sign_in_the_compilers_path_survives_ninja() -> None:
    assert "cxx = /opt/a$$b/g++" in cpp.ninja_text("/opt/a$b/g++", "g++ 12", ())


def test_a_compile_error_gives_its_first_line(cache_dir: Path) -> None:
    with pytest.raises(CompileError) as caught:
        build.compile_source(source("return no_such_name; and_another;"), CPU)
    assert "kernel.cpp:3" in str(caught.value)
    assert "no_such_name" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "and_another" in caught.value.log
    assert not list(cache_dir.glob("kernels/*/*/kernel.cpp")), "a failed build was published"


def test_a_full_disk_is_no_mistake_in_the_source(compiler: Path) -> None:
    text = compiler.read_text()
    message = "as: kernel.o: No space left on device"
    compiler.write_text(text.replace('exec g++ "$@"', f"echo {message}; exit 1"))
    with pytest.raises(CacheError, match="AUTOFLASH_CACHE_DIR"):
        build.compile_source(source(), CPU)


@pytest.mark.parametrize("command", ["/nowhere/g++", "no-such-compiler -O1", "false", "''"])
def test_no_compiler(command: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFLASH_CXX", command)
    settings.get.cache_clear()
    with pytest.raises(ToolchainMissing) as caught:
        build.compile_source(source(), CPU)
    assert command in str(caught.value)
    assert "AUTOFLASH_CXX" in str(caught.value)
    assert "apt-get install g++" in str(caught.value)


def test_what_was_built_is_found_without_a_compiler(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.compile_source(source(), CPU)
    monkeypatch.setenv("AUTOFLASH_CXX", "no-such-compiler")
    settings.get.cache_clear()
    assert build.compile_source(source(), CPU) == built
    build.load(built).prepare(SCALARS)(0, 0, 0, 0, 0, 1.0, 1)
    with pytest.raises(ToolchainMissing):
        build.compile_source(source("return 0; // another"), CPU)


def test_no_ninja(compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpp._compiler(settings.get().cxx)  # found before PATH is emptied
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    library.ninja.cache_clear()
    with pytest.raises(ToolchainMissing, match="pip install ninja"):
        build.compile_source(source(), CPU)
    library.ninja.cache_clear()


def test_a_library_that_cannot_be_loaded(cache_dir: Path) -> None:
    artifact = build.compile_source(source(), CPU)
    (artifact.directory / "kernel.so").write_bytes(b"no library")
    with pytest.raises(BuildError, match="safe to delete"):
        build.load(artifact)


# Which OpenMP runtime a process ends up with ----------------------------------------------------

TEAM = """
int n = 0;
#pragma omp parallel num_threads(num_threads)
#pragma omp atomic
n += 1;
return n == num_threads ? 0 : 2;
"""
SCRIPT = """
import sys
{before}
from pathlib import Path
from autoflash import build
from autoflash.build import cpp
from test_build_cpp import CPU, SCALARS, TEAM, source
{between}
build.build(source(TEAM), CPU).prepare(SCALARS)(0, 0, 0, 0, 0, 1.0, 2)
{after}
print(*cpp._loaded_runtimes(), sep="\\n")
"""


def runtimes(before: str = "", between: str = "", after: str = "") -> list[str]:
    """OpenMP runtimes in a fresh process that has run a parallel region of a kernel."""
    script = SCRIPT.format(before=before, between=between, after=after)
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


TORCH = "import torch; assert torch.ones(300, 300).mm(torch.ones(300, 300))[0, 0] == 300"


def test_with_pytorch_its_runtime_is_the_only_one() -> None:
    found = runtimes(before=TORCH)
    assert len(found) == 1
    assert "/torch/" in found[0] or "torch.libs" in found[0] or "libgomp.so" in found[0]


def test_pytorch_after_a_kernel_shares_its_runtime() -> None:
    before_torch = "assert 'torch' not in sys.modules, 'the test needs a process without PyTorch'"
    without = [*runtimes(between=before_torch)]
    assert len(without) == 1
    found = runtimes(between=before_torch, after=TORCH)
    # One file name, and so one library for the dynamic linker, wherever PyTorch's has that name.
    names = {Path(path).name for path in found}
    assert len(found) == len(names)


def test_no_runtime_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise OSError("not found")

    monkeypatch.setattr(cpp.ctypes, "CDLL", absent)
    cpp._openmp_runtime.cache_clear()
    with pytest.raises(ToolchainMissing, match="apt-get install libgomp1"):
        cpp._openmp_runtime()
    cpp._openmp_runtime.cache_clear()
