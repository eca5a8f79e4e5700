"""How C++ source becomes a kernel: a written build.ninja, ninja, and a library loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shlex
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from autoflash import settings
from autoflash.build import cache as build_cache
from autoflash.build import library
from autoflash.build.kernel import Artifact, Kernel, Resources, read_resources, write_meta
from autoflash.codegen import ops
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import ToolchainMissing

_SOURCE, _OBJECT = "kernel.cpp", "kernel.o"
_LAST = "int num_threads"
_BASE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
               "-fno-trapping-math", "-w")  # fmt: skip
"""`-fno-trapping-math` lets a comparison and a choice between floats become one instruction."""

_ISA_FLAGS = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "f16c": "-mf16c",
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512_bf16": "-mavx512bf16",
}
"""From the device and never -march=native, so that a build is for the device that was asked for."""

_FAILURES = {1: "there is no memory for its packed keys and values"}
"""What a launcher's return code means."""

_ERROR_LINE = re.compile(r"^.*?(?:fatal )?error: .*$", re.MULTILINE)
COMPILE_TIMEOUT_S = 300.0


def compile_source(source: Source, device: Device) -> Artifact:
    """Compile for `device`, or find it compiled; the device need not be the one present.

    Raises:
        CompileError: the compiler rejected the source.
        ToolchainMissing: there is no compiler, or no ninja.
        CacheError: the result cannot be stored.
    """
    flags = _flags(device)
    request = _digest(source.digest, _entry(source), *flags)
    try:
        compiler, version = _compiler(settings.get().cxx)
    except ToolchainMissing:
        built = build_cache.find_built(request)
        if built is None:
            raise
        return Artifact(source, device.arch, built.name, built, read_resources(built))

    def fill(directory: Path) -> None:
        started = time.perf_counter()
        (directory / _SOURCE).write_text(compiled_text(source), encoding="utf-8")
        (directory / "build.ninja").write_text(ninja_text(compiler, version, flags))
        library.run_ninja(directory, _ERROR_LINE, COMPILE_TIMEOUT_S)
        resources = Resources(
            compile_s=time.perf_counter() - started,
            binary_bytes=(directory / library.LIBRARY).stat().st_size,
        )
        write_meta(directory, resources, compiler=version, flags=list(flags), arch=device.arch)

    digest = _digest(request, version)
    directory = build_cache.find_or_make(digest, fill, request=request)
    return Artifact(source, device.arch, digest, directory, read_resources(directory))


def compiled_text(source: Source) -> str:
    """What the compiler is given of a source: its text, and the entry point for Python's calls."""
    return source.text + _entry(source)


def command(device: Device, source: str, library: str) -> str:
    """How a shell makes `library` of the file `source`.

    Linked in a step of its own, and to no OpenMP runtime: see `_openmp_runtime`.
    """
    compile_it = " ".join(("g++", *_flags(device), "-c", "-o", f"{library}.o", source))
    return f"{compile_it} && g++ -shared -o {library} {library}.o"


def _entry(source: Source) -> str:
    return library.entry_text(ops.get(source.op), _LAST, source.text)


def _flags(device: Device) -> tuple[str, ...]:
    return (*_BASE_FLAGS, *(_ISA_FLAGS[flag] for flag in device.isa if flag in _ISA_FLAGS))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(artifact: Artifact) -> Kernel:
    """Load a compiled library; the processor must have what it was compiled for."""
    _openmp_runtime()
    return library.LibraryKernel(
        artifact, library.open_library(artifact.directory), _LAST, _meaning
    )


def _meaning(code: int) -> str:
    return _FAILURES.get(code, "its template says what that means")


# The compiler ---------------------------------------------------------------------------------


@cache
def _compiler(command: str) -> tuple[str, str]:
    """The command to run and the first line of what it says its version is."""
    words = shlex.split(command)
    missing = ToolchainMissing(
        f"AUTOFLASH_CXX={command!r}: there is no such C++ compiler. Install g++ (Debian, Ubuntu: "
        "apt-get install g++; Fedora: dnf install gcc-c++), or set AUTOFLASH_CXX to one you have."
    )
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise missing
    try:
        done = subprocess.run(
            [found, *words[1:], "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise missing from error
    return shlex.join([found, *words[1:]]), done.stdout.partition("\n")[0].strip()


def ninja_text(compiler: str, version: str, flags: tuple[str, ...]) -> str:
    """The build.ninja of one kernel.

    OpenMP's runtime is left out of the link on purpose: see `_openmp_runtime`. Only clang's own
    must be linked, as its calls are not those of libgomp.
    """
    link_flags = " -fopenmp" if "clang" in version else ""
    return "\n".join(
        (
            f"# {version}",
            f"cxx = {compiler.replace('$', '$$')}",
            f"flags = {' '.join(flags)}",
            "",
            "rule compile",
            "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared{link_flags} $in -o $out",
            "",
            f"build {_OBJECT}: compile {_SOURCE}",
            f"build {library.LIBRARY}: link {_OBJECT}",
            f"default {library.LIBRARY}",
            "",
        )
    )


# OpenMP ---------------------------------------------------------------------------------------

_RUNTIME = re.compile(r"lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


@cache
def _openmp_runtime() -> str:
    """Make one OpenMP runtime's symbols visible to kernels; returns its file.

    Kernels are linked to none. PyTorch ships its own libgomp; a second runtime would keep a second
    pool of threads, which spin for a while after every parallel region and so take the cores from
    the other pool's. So kernels use the runtime that the process already has (PyTorch's first),
    and the system's where it has none.
    """
    loaded = sorted(_loaded_runtimes(), key=lambda path: "/torch/" not in path)
    for path in (*loaded, "libgomp.so.1", *_torch_runtimes()):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return path
    raise ToolchainMissing(
        "libgomp.so.1, the OpenMP runtime that kernels run on, is not installed. It comes with "
        "g++ and with PyTorch; alone it is: apt-get install libgomp1."
    )


def _loaded_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    return [path for path in paths if _RUNTIME.search(path)]


def _torch_runtimes() -> list[str]:
    """Runtimes that PyTorch ships, for a machine that has no other."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0])
    return [
        str(path)
        for path in sorted(
            [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
        )
    ]
