"""What do languages share whose kernels are shared libraries? Entry point, ninja, ctypes."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from autoflash.build.kernel import Artifact, Kernel, Launch, memory_for
from autoflash.codegen import ops
from autoflash.errors import BuildError, CompileError, ToolchainMissing

LIBRARY = "kernel.so"
"""The file of an artifact that is loaded."""

_SCALARS = {
    "int32": "(int32_t)scalars[{}]",
    "int64": "scalars[{}]",
    "float32": "float_of_bits(scalars[{}])",
}
_LAST_WORDS: dict[str, Any] = {"int num_threads": ctypes.c_int, "void* stream": ctypes.c_void_p}
"""Declaration of a launcher's last argument -> its type for ctypes."""


_ENTRY = "// Sizes, strides and the cap as one array, for a cheaper call from Python."
_WORKSPACE = re.compile(r'^extern "C" int64_t workspace_bytes\(', re.MULTILINE)
"""How a source declares that it needs a workspace; its parameters are the op's scalars."""


def entry_text(op: ops.Op, last: str, source: str) -> str:
    """C++ source of `launch_bound`, which takes what is bound of a call as one array.

    ctypes converts argument by argument: a call of the forward costs 8.4 us of Python with its
    whole list and 1.0 us so (batch 0, one core of a Zen 4 at 3.6 GHz). A library compiled with
    hidden visibility exports it alone, or with `workspace_bound`, which says how many bytes of
    workspace a call takes, where the source defines `workspace_bytes`. Only then does
    `launch_bound` take their address, after those of the tensors.

    Args:
        op: whose arguments `launch` takes.
        last: declares the last of them, a key of _LAST_WORDS.
        source: defines `launch`.
    """
    needs_workspace = _WORKSPACE.search(source) is not None
    pointers = "".join(f", {ops.C_TYPES[arg.kind]} {arg.name}" for arg in op.pointers)
    pointers += ", void* workspace" if needs_workspace else ""
    scalars = [_SCALARS[arg.kind].format(index) for index, arg in enumerate(op.scalars)]
    passed = [arg.name for arg in op.pointers]
    passed += ["workspace" if needs_workspace else "nullptr", *scalars]
    passed += ["softmax_scale", last.split()[-1]]
    lines = ["", _ENTRY]
    if any(arg.kind == "float32" for arg in op.scalars):
        lines += [
            "static inline float float_of_bits(int64_t bits) {",
            "  const int32_t low = (int32_t)bits;",
            "  float value;",
            "  __builtin_memcpy(&value, &low, sizeof value);",
            "  return value;",
            "}",
        ]
    exported = 'extern "C" __attribute__((visibility("default")))'
    lines += [
        exported,
        f"int launch_bound(const int64_t* scalars{pointers}, float softmax_scale, {last}) {{",
        f"  return launch({', '.join(passed)});",
        "}",
        "",
    ]
    if needs_workspace:
        lines += [
            exported,
            "int64_t workspace_bound(const int64_t* scalars) {",
            f"  return workspace_bytes({', '.join(scalars)});",
            "}",
            "",
        ]
    return "\n".join(lines)


def without_entry(text: str) -> str:
    """A kernel's source without the entry point that was appended to it."""
    return text.rpartition(f"\n{_ENTRY}\n")[0] or text


def bound_array(op: ops.Op, scalars: Sequence[int | float]) -> ctypes.Array[ctypes.c_int64]:
    """The array that `launch_bound` reads: whole numbers as they are, floats by their bits."""
    assert len(scalars) == len(op.scalars)
    words = (
        _bits(value) if argument.kind == "float32" else int(value)
        for argument, value in zip(op.scalars, scalars, strict=True)
    )
    return (ctypes.c_int64 * len(scalars))(*words)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


def open_library(directory: Path) -> ctypes.CDLL:
    """The library of an artifact, its names kept from every other library."""
    path = directory / LIBRARY
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"{path} cannot be loaded: {error}. It is safe to delete {directory}."
        ) from error


class LibraryKernel(Kernel):
    """A kernel in a shared library that exports `launch_bound`, and maybe `workspace_bound`.

    Args:
        artifact: where the library came from.
        library: loaded.
        last: declares the launcher's last argument, a key of _LAST_WORDS.
        meaning: what a return code other than 0 means.
    """

    def __init__(
        self, artifact: Artifact, library: ctypes.CDLL, last: str, meaning: Callable[[int], str]
    ) -> None:
        super().__init__(artifact)
        self._op = ops.get(artifact.source.op)
        self._meaning = meaning
        self._on_cpu = last == "int num_threads"
        self._launch = library.launch_bound
        self._launch.restype = ctypes.c_int
        pointers = len(self._op.pointers)
        self._workspace_bytes = getattr(library, "workspace_bound", None)
        if self._workspace_bytes is not None:
            self._workspace_bytes.restype = ctypes.c_int64
            self._workspace_bytes.argtypes = [ctypes.c_void_p]
            pointers += 1
        self._launch.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_void_p] * pointers,
            ctypes.c_float,
            _LAST_WORDS[last],
        ]

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        """Bind sizes, strides and the cap: see Kernel.prepare."""
        launch, failed = self._launch, self._failed
        array = bound_array(self._op, scalars)
        address = ctypes.c_void_p(ctypes.addressof(array))

        def call(*pointers_scale_and_last: Any) -> None:
            code = launch(address, *pointers_scale_and_last)
            if code:
                failed(code)

        bound: Any = call
        if self._workspace_bytes is not None:
            bound = self._with_workspace(call, self._workspace_bytes(address))
        bound.scalars = array  # what `address` points to must live on
        return cast("Launch", bound)

    def _with_workspace(self, call: Launch, num_bytes: int) -> Launch:
        """`call`, with the address of a workspace of its own behind those of the tensors."""
        if not num_bytes:
            return lambda *args: call(*args[:-2], 0, *args[-2:])
        memory = memory_for(num_bytes, on_cpu=self._on_cpu)

        def call_with_memory(*args: Any) -> None:
            held = memory()
            call(*args[:-2], held.data_ptr(), *args[-2:])

        return call_with_memory

    def _failed(self, code: int) -> None:
        template = self.artifact.source.template
        raise BuildError(f"{template}: launch returned {code}: {self._meaning(code)}.")


# Ninja ------------------------------------------------------------------------------------------

_STOPPING_S = 10.0


@cache
def ninja() -> str:
    """The ninja to run: that of the Python package, else the one on PATH."""
    try:
        import ninja as package

        packaged = Path(package.BIN_DIR) / "ninja"
        if packaged.is_file():
            return str(packaged)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise ToolchainMissing("ninja is not installed: pip install ninja.")
    return found


def run_ninja(directory: Path, error_line: re.Pattern[str], timeout_s: float) -> str:
    """Build what build.ninja in `directory` says; what the compilers printed.

    Args:
        directory: holds build.ninja and the source.
        error_line: finds the first line in the output that says what is wrong.
        timeout_s: after which the compilers are stopped.

    Raises:
        CompileError: a compiler failed or took too long.
        OSError: there is no space left.
    """
    process = subprocess.Popen(
        [ninja(), "-C", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        output = _stop(process)
        raise CompileError(
            f"the compiler has not finished after {timeout_s:.0f} s", output
        ) from None
    except BaseException:
        _stop(process)
        raise
    if process.returncode:
        if (full := os.strerror(errno.ENOSPC)) in output:
            raise OSError(errno.ENOSPC, full, str(directory))  # the cache says what to do about it
        first = error_line.search(output)
        lines = output.strip().splitlines() or [f"ninja exited with {process.returncode}"]
        raise CompileError(first.group().strip() if first else lines[-1], output)
    return output


def _stop(process: subprocess.Popen[str]) -> str:
    """End ninja and, as it passes on a SIGTERM, its compilers; a SIGKILL would leave them."""
    process.terminate()
    try:
        return process.communicate(timeout=_STOPPING_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]
