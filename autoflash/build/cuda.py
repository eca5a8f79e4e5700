"""How CUDA C++ becomes a kernel: nvcc through ninja, judged by ptxas, a library without PyTorch.

A library holds machine code for one architecture and its own copy of the CUDA runtime. It exports
`launch_bound`, `launch_error` and, where it has a workspace, `workspace_bound` alone, so that no
two kernels meet in a symbol, and it runs where there is a driver: neither nvcc nor the headers need
be there, nor the path where it was built.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shlex
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from autoflash import settings
from autoflash.build import cache as build_cache
from autoflash.build import library, nvcc
from autoflash.build.kernel import META, Artifact, Kernel, Resources, read_resources, write_meta
from autoflash.codegen import ops
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import BuildError, CompileError, ToolchainMissing

SOURCE, LOG = "kernel.cu", "nvcc.log"
"""Files of an artifact beside the library: what was compiled, and all that nvcc said."""

_OBJECT = "kernel.o"
_LAST = "void* stream"
_FORMAT = "1"
"""Part of every digest: raise it when what is made of a source changes."""

_BASE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",  # CuTe's assertions cost registers on the device
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-Xptxas=-v,-warn-spills",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
_LINK_FLAGS = (
    "-shared",
    "-cudart=static",
    # Or the calls of this library would go to the CUDA runtime that PyTorch made global.
    "-Xlinker=--exclude-libs,ALL",
)
_OPTIONS = ("num_threads", "smem_bytes")

COMPILE_TIMEOUT_S = 600.0
"""Longest compilation. CuTe takes 10 to 19 s of an idle core."""

MEMORY_BYTES = 3 << 30
"""What one compilation may take at its peak: cicc over a warp-specialised kernel of CuTe."""


def compile_source(source: Source, device: Device) -> Artifact:
    """Compile for `device.arch`, or find it compiled; the device need not be present.

    Without nvcc or the headers, what another machine built of this very source is found.

    Raises:
        CompileError: nvcc rejected the source, took too long, or ptxas serialized its products.
        ToolchainMissing: there is no nvcc or there are no CUTLASS headers, and it is not built.
        CacheError: the result cannot be stored.
    """
    options = _launch_options(source)
    flags = _flags(device)
    request = _request(source, device)
    try:
        compiler, headers = nvcc.compiler(), nvcc.headers()
    except ToolchainMissing as error:
        built = build_cache.find_built(request)
        if built is None:
            raise ToolchainMissing(
                f"{source.template} for {device.arch} is not built yet, and cannot be here: {error}"
            ) from None
        return Artifact(source, device.arch, built.name, built, read_resources(built))

    def fill(directory: Path) -> None:
        began = time.perf_counter()
        (directory / SOURCE).write_text(compiled_text(source), encoding="utf-8")
        text = ninja_text(compiler, headers, flags)
        (directory / "build.ninja").write_text(text, encoding="utf-8")
        try:
            output = library.run_ninja(directory, nvcc.ERROR_LINE, COMPILE_TIMEOUT_S)
        except CompileError as error:
            reason = str(error).replace(f"{headers.include}/", "")
            raise CompileError(
                f"{source.template}: nvcc rejected it for {device.arch}: {reason}", error.log
            ) from None
        if (lost := nvcc.loss(output)) is not None:
            raise CompileError(f"{source.template}: ptxas for {device.arch}: {lost}", output)
        (directory / LOG).write_text(output, encoding="utf-8")
        used = nvcc.usage(output)
        resources = Resources(
            compile_s=round(time.perf_counter() - began, 3),
            binary_bytes=(directory / library.LIBRARY).stat().st_size,
            registers=used.registers,
            spill_bytes=used.spill_bytes,
            smem_bytes=used.static_smem_bytes + options["smem_bytes"],
            num_threads=options["num_threads"],
            spill_load_bytes=used.spill_load_bytes,
            stack_bytes=used.stack_bytes,
        )
        write_meta(
            directory, resources, language="cuda", template=source.template, arch=device.arch,
            compiler=f"nvcc {compiler.version}", cutlass=headers.version, flags=list(flags),
            warnings=nvcc.warnings(output),
        )  # fmt: skip
        (directory / _OBJECT).unlink()

    digest = _digest(request, compiler.version, headers.version)
    directory = build_cache.find_or_make(digest, fill, request=request)
    return Artifact(source, device.arch, digest, directory, read_resources(directory))


def compiled_text(source: Source) -> str:
    """What nvcc is given of a source: its text, and the entry point that calls from Python take."""
    return source.text + _entry(source)


def command(device: Device, source: str, library: str) -> str:
    """How a shell makes `library` of the file `source`; $CUTLASS is a checkout of CUTLASS."""
    link = (*_LINK_FLAGS, "-I$CUTLASS/include", "-o")
    return " ".join(("nvcc", *_flags(device), *link, library, source))


def is_built(source: Source, device: Device) -> bool:
    """Whether `compile_source` would find it, though there were no compiler."""
    return build_cache.find_built(_request(source, device)) is not None


def built_kernels() -> Counter[str]:
    """Arch -> how many libraries the cache directory holds for it."""
    found: Counter[str] = Counter()
    for source in settings.get().cache_dir.glob(f"kernels/??/*/{SOURCE}"):
        with suppress(OSError, ValueError, KeyError):  # being deleted, or damaged
            found[json.loads((source.parent / META).read_text(encoding="utf-8"))["arch"]] += 1
    return found


def _request(source: Source, device: Device) -> str:
    """Digest of all that decides what is built, the versions of nvcc and CUTLASS apart."""
    flags = (*_flags(device), *_LINK_FLAGS)
    return _digest(source.digest, _entry(source), _FORMAT, *flags)


def _flags(device: Device) -> tuple[str, ...]:
    code = nvcc.target(device.capability)
    return (*_BASE_FLAGS, f"-gencode=arch=compute_{code},code=sm_{code}")


def _entry(source: Source) -> str:
    return library.entry_text(ops.get(source.op), _LAST, source.text) + _ERROR_TEXT


def _launch_options(source: Source) -> dict[str, int]:
    """Threads and dynamic shared memory of a block, which the declaration passes as options."""
    if set(source.options) != set(_OPTIONS):
        raise BuildError(
            f"{source.template}: its declaration's [options] are "
            f"{', '.join(sorted(source.options)) or 'empty'}; a CUDA template gives "
            f"{' and '.join(_OPTIONS)} of a thread block there, and nothing else."
        )
    return {name: int(source.options[name]) for name in _OPTIONS}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def ninja_text(compiler: nvcc.Compiler, headers: nvcc.Headers, flags: tuple[str, ...]) -> str:
    """The build.ninja of one kernel.

    The pool keeps a file with several sources from starting several compilers: how many run at
    once is decided where memory is known (build.jobs_within_memory).
    """
    # As system headers, so that warnings are about our own source.
    includes = [f"-isystem={path}" for path in (headers.include, *compiler.includes)]
    link = (*_LINK_FLAGS, *(flag for flag in flags if flag.startswith("-gencode")))
    libraries = [f"-L{path}" for path in compiler.libraries]
    return "\n".join(
        (
            f"# nvcc {compiler.version}, CUTLASS {headers.version}",
            f"nvcc = {compiler.command.replace('$', '$$')}",
            f"flags = {_words(flags)}",
            f"includes = {_words(includes)}",
            f"link_flags = {_words([*link, *libraries])}",
            "",
            "pool memory",
            "  depth = 1",
            "rule compile",
            "  command = $nvcc $flags $includes -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  pool = memory",
            "rule link",
            "  command = $nvcc $link_flags $in -o $out",
            "",
            f"build {_OBJECT}: compile {SOURCE}",
            f"build {library.LIBRARY}: link {_OBJECT}",
            f"default {library.LIBRARY}",
            "",
        )
    )


def _words(words: list[str] | tuple[str, ...]) -> str:
    return shlex.join(words).replace("$", "$$")


_ERROR_TEXT = """
extern "C" __attribute__((visibility("default"))) const char* launch_error(int code) {
  return cudaGetErrorString((cudaError_t)code);
}
"""


# Loading ----------------------------------------------------------------------------------------


def load(artifact: Artifact) -> Kernel:
    """Load a library for the current CUDA device, and its code onto that device.

    Raises:
        BuildError: the device is absent or of another architecture, or the library is damaged.
    """
    _require_device(artifact)
    opened = library.open_library(artifact.directory)
    opened.launch_error.argtypes = [ctypes.c_int]
    opened.launch_error.restype = ctypes.c_char_p

    def meaning(code: int) -> str:
        said: bytes | None = opened.launch_error(code)
        return said.decode(errors="replace") if said else "the CUDA runtime does not know it"

    kernel = library.LibraryKernel(artifact, opened, _LAST, meaning)
    # A launch over no rows starts nothing, but the launcher sets its kernel's attributes first:
    # that loads the code now, which is not allowed while a CUDA graph is captured.
    op = ops.get(artifact.source.op)
    nothing = kernel.prepare(tuple(0 if arg.name == "batch" else 1 for arg in op.scalars))
    nothing(*(0 for _ in op.pointers), 1.0, 0)
    return kernel


def _require_device(artifact: Artifact) -> None:
    import torch

    what = f"{artifact.source.template} was compiled for {artifact.arch}"
    if not torch.cuda.is_available():
        raise BuildError(
            f"{what}, and PyTorch finds no CUDA device here. Compiling needs none; to run it, use "
            "a machine with such a GPU (`autoflash doctor` says what this one has)."
        )
    major, minor = torch.cuda.get_device_capability()
    compiled_for = int(artifact.arch.removeprefix("sm"))
    if not nvcc.runs_on(compiled_for, major * 10 + minor):
        raise BuildError(
            f"{what}; the current device, {torch.cuda.get_device_name()}, is sm{major}{minor} and "
            f"cannot run it. Compile it for sm{major}{minor}."
        )
