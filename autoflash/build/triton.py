"""How does a rendered Triton module become a kernel? The only user of triton.

Compiling runs in a child process: LLVM and ptxas may print, abort or hang, and none of that may
reach the process that wants the kernel. What the child leaves is a cubin and Triton's description
of it; a later load reads both and compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from autoflash.build import cache as store
from autoflash.build.kernel import (
    Artifact,
    Kernel,
    Launch,
    Resources,
    memory_for,
    read_resources,
    write_meta,
)
from autoflash.codegen import ops
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import BuildError, CompileError, ToolchainMissing
from autoflash.problem import ELEMENT_SIZES

SOURCE, CUBIN, METADATA = "kernel.py", "kernel.cubin", "kernel.json"
"""Files of an artifact: the rendered module, the binary, and what Triton knows of the binary. Those
of a second function of the module are called by its name: "combine.cubin", "combine.json"."""

KERNEL, COMBINE = "kernel", "combine"
"""Functions of a module: what computes, and what a module may have beside it to make one result of
the parts that the first leaves in the workspace. Both take the op's arguments. The second has
Triton's own options, and follows the first where the module's `workspace` asks for memory."""

COMPILE_TIMEOUT_S = 300.0
"""Longest compilation; ptxas takes minutes over a kernel that spills thousands of registers."""

_FORMAT = "2"
"""Part of every digest: raise it when the files of an artifact change."""

_LOG_CHARACTERS = 100_000
"""Most of a compiler's output that an error keeps: Triton prints the whole PTX when ptxas fails."""


@cache
def version() -> str | None:
    """The installed Triton's version, such as "3.6.0"; None where there is none."""
    if find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def compile_source(source: Source, device: Device) -> Artifact:
    """Compile a rendered module for `device.arch`, or find it compiled; no GPU is needed.

    Under TRITON_INTERPRET=1 nothing is compiled: the module itself is the kernel.

    Raises:
        CompileError: Triton or ptxas rejected the source, crashed over it or took too long.
        ToolchainMissing: Triton is not installed.
        CacheError: the result cannot be stored.
    """
    compiler = _require()
    facts = {"compiler": f"triton {compiler}", "arch": device.arch, **_triton_variables()}
    parts = (source.digest, _FORMAT, json.dumps(facts, sort_keys=True))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def fill(directory: Path) -> None:
        (directory / SOURCE).write_text(source.text, encoding="utf-8")
        resources = Resources(compile_s=0.0, binary_bytes=0)
        warnings: list[str] = []
        if not _interpreting():
            resources, warnings = _compile(source, device, directory)
        write_meta(directory, resources, **facts, template=source.template, warnings=warnings)

    directory = store.find_or_make(digest, fill)
    return Artifact(source, device.arch, digest, directory, read_resources(directory))


def load(artifact: Artifact) -> Kernel:
    """Load a compiled kernel onto the current CUDA device, or the module into the interpreter.

    Raises:
        BuildError: the device is absent or too small, or the installed Triton cannot load it.
    """
    _require()
    return _Interpreted(artifact) if _interpreting() else _Compiled(artifact)


def _require() -> str:
    found = version()
    if found is None:
        raise ToolchainMissing(
            "triton is not installed, and this kernel is written in it. It exists for Linux on "
            "x86-64: pip install 'triton>=3.6,<3.10'."
        )
    return found


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _triton_variables() -> dict[str, str]:
    """Settings of Triton that change what is compiled; where it caches does not."""
    where = {"TRITON_HOME", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR"}
    return {k: v for k, v in os.environ.items() if k.startswith("TRITON_") and k not in where}


# Compiling --------------------------------------------------------------------------------------


def _compile(source: Source, device: Device, directory: Path) -> tuple[Resources, list[str]]:
    """Run `_compile_here` in a child process; what it made, and what ptxas warns of.

    "wgmma.mma_async instructions are serialized" is the warning that costs most.
    """
    job = {
        "capability": device.capability,
        "signature": ops.get(source.op).triton_signature(source.dtype),
        "divisible": divisible(source),
        "options": dict(source.options),
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="autoflash-triton-") as scratch:
        command = [sys.executable, "-c", f"from {__name__} import _compile_here; _compile_here()"]
        try:
            child = subprocess.run(
                command,
                cwd=directory,
                env=_child_environment(scratch),
                input=json.dumps(job),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=COMPILE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CompileError(
                f"{source.template}: compiling for {device.arch} took more than "
                f"{COMPILE_TIMEOUT_S:.0f} s"
            ) from None
    if child.returncode != 0:
        reason = _first_error(child.stdout, child.returncode)
        raise CompileError(
            f"{source.template}: triton rejected it for {device.arch}: {reason}",
            child.stdout[-_LOG_CHARACTERS:],
        )
    metadata = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    said = child.stdout.split(_NEXT)[1]  # of `kernel`, which comes first
    resources = Resources(
        compile_s=round(time.perf_counter() - began, 3),
        binary_bytes=(directory / CUBIN).stat().st_size,
        registers=_largest(r"Used (\d+) registers", said),
        spill_bytes=_largest(r"(\d+) bytes spill stores", said),
        smem_bytes=metadata["shared"],
        num_threads=metadata["num_warps"] * 32,
    )
    return resources, re.findall(r"Potential Performance Loss: (.+)", child.stdout)


def _child_environment(scratch: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "TRITON_CACHE_DIR": scratch,
        "TRITON_DUMP_PTXAS_LOG": "1",  # prints registers and spills, which nothing else reports
        "TRITON_DISABLE_LINE_INFO": "1",  # it holds the path of the source: equal builds differ
    }


_TENSORS = ("input", "output")
_NEXT = "autoflash: the next function\n"
"""What the child prints between two functions, so that what ptxas says of each is known."""


def divisible(source: Source) -> list[tuple[int, int]]:
    """(argument, divisor) of what is a multiple of 16 bytes: addresses, and strides in elements."""
    elements = 16 // ELEMENT_SIZES[source.dtype]
    found = []
    for index, argument in enumerate(ops.get(source.op).arguments):
        if argument.kind == "workspace" or (source.aligned and argument.kind in _TENSORS):
            found.append((index, 16))
        elif source.aligned and "_stride_" in argument.name:
            found.append((index, elements))
    return found


def _compile_here() -> None:
    """In the child: compile kernel.py of the working directory as the job on stdin says."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    job = json.load(sys.stdin)
    module = _import(Path(SOURCE).absolute(), "kernel")
    attributes = {(index,): [["tt.divisibility", by]] for index, by in job["divisible"]}
    for name, options in ((KERNEL, job["options"]), (COMBINE, {})):
        if not hasattr(module, name):
            continue
        print(_NEXT, end="", flush=True)  # before what Python says of an error, unbuffered
        function = getattr(module, name)
        compiled = triton_compile(
            _source_class(function)(function, job["signature"], attrs=attributes),
            target=GPUTarget("cuda", job["capability"], 32),
            options=options,
        )
        metadata = dict(compiled.metadata._asdict())
        metadata["target"] = vars(metadata["target"])
        text = json.dumps(metadata, default=vars, sort_keys=True)
        Path(f"{name}.json").write_text(text, encoding="utf-8")
        Path(f"{name}.cubin").write_bytes(compiled.asm["cubin"])


def _source_class(kernel: Any) -> Any:
    """What hands a kernel to Triton's compiler: Gluon enters below the layouts, Triton above."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _import(path: Path, name: str) -> types.ModuleType:
    """Run a rendered module; no bytecode is written beside it, and it enters no table."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # Triton reads the source of its functions again, from the file that the code names.
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


_ERROR_LINES = (
    r"ptxas .*?; error\s*:\s*(?P<what>.+)",
    r"ptxas (?:fatal|error)\s*:\s*(?P<what>.+)",
    r"(?P<what>triton\.runtime\.errors\.\w+: .+)",
    r"(?<!\w)error: (?P<what>.+)",
    r"(?P<what>LLVM ERROR: .+)",
    r"(?P<what>.*Assertion .+ failed.*)",
)
"""Where compilers say what was wrong, the most telling first."""


def _first_error(output: str, returncode: int) -> str:
    """The line of a failed child's output that says why."""
    for pattern in _ERROR_LINES:
        if found := re.search(pattern, output):
            return found["what"].strip()
    if returncode < 0:
        return f"the compiler was killed by {signal.Signals(-returncode).name}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"the compiler ended with exit code {returncode}"


def _largest(pattern: str, text: str) -> int | None:
    return max(map(int, re.findall(pattern, text)), default=None)


# Loading ----------------------------------------------------------------------------------------


def _nothing(*_: Any) -> None:
    """Launch of an empty grid."""


class _TritonKernel(Kernel):
    """The functions of a module, and what it says of the sizes that it is launched for.

    `grid`, `workspace` and `combine_grid` take as many of the op's scalars as they name.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._module = _import(artifact.directory / SOURCE, f"autoflash_{artifact.digest[:16]}")
        names = (name for name in (KERNEL, COMBINE) if hasattr(self._module, name))
        self._functions = {name: self._load(name) for name in names}

    @abstractmethod
    def _load(self, name: str) -> _Function:
        """A function of the module, ready to be launched."""

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        """Bind sizes, strides and the cap; the stream given must be torch's current one."""

        def asked(name: str) -> Any:
            function = getattr(self._module, name)
            return function(*scalars[: function.__code__.co_argcount])

        grid = asked("grid")
        if not all(grid):
            return _nothing
        num_bytes = asked("workspace") if hasattr(self._module, "workspace") else 0
        if not num_bytes:
            return self._functions[KERNEL].bind(grid, (0, *scalars))
        memory = memory_for(num_bytes, on_cpu=_interpreting())
        launches = [self._functions[KERNEL].bind(grid, scalars)]
        if COMBINE in self._functions:
            launches.append(self._functions[COMBINE].bind(asked("combine_grid"), scalars))

        def launch(*args: Any) -> None:
            held = memory()
            args = (*args[:-2], held.data_ptr(), *args[-2:])
            for each in launches:
                each(*args)

        return launch


class _Compiled(_TritonKernel):
    """Cubins on the device that was current when they were loaded."""

    def _load(self, name: str) -> _CompiledFunction:
        from triton.compiler.compiler import CompiledKernel

        artifact, function = self.artifact, getattr(self._module, name)
        signature = ops.get(artifact.source.op).triton_signature(artifact.source.dtype)
        files = {file: str(artifact.directory / file) for file in (f"{name}.cubin", f"{name}.json")}
        source = _source_class(function)(function, signature)
        compiled = CompiledKernel(source, files, f"{artifact.digest}-{name}")
        try:
            return _CompiledFunction(self, compiled, compiled.run)
        except Exception as error:  # of the driver, the C compiler or the device, as they please
            raise BuildError(
                f"{artifact.source.template} for {artifact.arch} cannot be loaded here: {error}"
            ) from error


class _Function(Protocol):
    """What launches one function of a module."""

    def bind(self, grid: tuple[int, ...], bound: tuple[int | float, ...]) -> Launch:
        """Its launch over a grid, with what follows the pointers that are given with a call."""


@dataclass(frozen=True, slots=True)
class _CompiledFunction:
    """A cubin with Triton's launcher for its signature; `owner` keeps both loaded."""

    owner: Kernel
    compiled: Any
    launcher: Any

    def bind(self, grid: tuple[int, ...], bound: tuple[int | float, ...]) -> Launch:
        x, y, z = (*grid, 1, 1)[:3]
        compiled, launcher = self.compiled, self.launcher
        function, packed = compiled.function, compiled.packed_metadata
        cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
        # Past the launcher's own Python: it hands `launch` the same things, checks hooks and
        # allocates scratch. What it is handed changed with Triton 3.7.
        run = launcher.launch
        scratch_bytes = x * y * z * launcher.num_ctas * launcher.global_scratch_size
        scratch: Callable[[], Any] | None = None
        if scratch_bytes:
            # Tensor memory descriptors live in global memory. From torch's allocator directly,
            # so that triton.set_allocator stays the user's.
            scratch = memory_for(scratch_bytes)
        # `_alive`: newer Tritons unload the binary with the object that loaded it.
        if hasattr(launcher, "kernel_signature"):
            annotations, signature = launcher.arg_annotations, launcher.kernel_signature

            def launch(*args: Any, _alive: Kernel = self.owner) -> None:
                run(x, y, z, args[-1], function, cooperative, dependent, packed, None, None, None,
                    scratch() if scratch else None, None, annotations, signature,
                    (*args[:-2], *bound, args[-2]))  # fmt: skip
        else:

            def launch(*args: Any, _alive: Kernel = self.owner) -> None:
                run(x, y, z, args[-1], function, cooperative, dependent,
                    scratch() if scratch else None, None, packed, None, None, None,
                    *args[:-2], *bound, args[-2])  # fmt: skip

        return launch


class _Interpreted(_TritonKernel):
    """A module that Triton's interpreter runs in numpy, on addresses in host memory."""

    def _load(self, name: str) -> _InterpretedFunction:
        _mend_interpreter()
        function = getattr(self._module, name)
        if getattr(function, "is_gluon", bool)():
            raise BuildError(
                f"{self.artifact.source.template}: Triton's interpreter (TRITON_INTERPRET=1) does "
                "not run kernels in Gluon. Use templates/triton there, or unset the variable."
            )
        return _InterpretedFunction(self.artifact.source, function)


@dataclass(frozen=True, slots=True)
class _InterpretedFunction:
    source: Source
    function: Any

    def bind(self, grid: tuple[int, ...], bound: tuple[int | float, ...]) -> Launch:
        import torch

        types = ops.get(self.source.op).triton_signature(self.source.dtype).values()
        element = getattr(torch, self.source.dtype)

        def launch(*args: Any) -> None:
            passed = (*args[:-2], *bound, args[-2])
            self.function[grid](
                *(
                    _Address(value, torch.float32 if kind == "*fp32" else element)
                    if kind.startswith("*")
                    else value
                    for value, kind in zip(passed, types, strict=True)
                )
            )

        return launch


@cache
def _mend_interpreter() -> None:
    """Let scalars be loop bounds under NumPy 2.4, as Triton does itself from 3.8 on.

    They are arrays of one element there, which NumPy no longer converts to int.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    interpreter._patch_lang_tensor = mended


class _Address:
    """An address that the interpreter takes for a tensor in host memory, and leaves there."""

    def __init__(self, address: int, dtype: Any) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> _Address:
        return self

    cpu = untyped_storage

    def new_empty(self, *_: Any, **__: Any) -> _Address:
        return _Address(self.address, self.dtype)

    def set_(self, *_: Any) -> None:
        """It already points there."""

    def copy_(self, *_: Any) -> None:
        """The kernel wrote in place."""

    size = stride = storage_offset = set_


def do_bench_us(call: Callable[[], object]) -> float:
    """The median time of a call as `triton.autotune` takes it, to compare its sweeps with ours."""
    from triton.testing import do_bench

    return 1000.0 * float(do_bench(call, quantiles=(0.5, 0.2, 0.8))[0])
