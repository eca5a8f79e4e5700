"""From a module in Triton or Gluon to what launches it."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton

from ._load import Bind, Launch, Tensors, address, content, interpreting, memory, stream
from ._table import HERE, table

Run = Callable[[Tensors, "torch.Tensor | None", float], None]
"""run(tensors, workspace, softmax_scale) of one function of a module."""


def load(name: str, index: int) -> Bind:
    """The module of a kernel, compiled and on a device (or for the interpreter)."""
    module = module_of(name)
    _compare_versions()
    start = _function(module, name, "kernel", index)
    finish = _function(module, name, "combine", index) if hasattr(module, "combine") else None

    def asked(what: str, scalars: Sequence[float]) -> Any:
        function = getattr(module, what)  # takes as many of the scalars as it names
        return function(*scalars[: function.__code__.co_argcount])

    def bind(scalars: Sequence[float]) -> Launch:
        grid = asked("grid", scalars)
        num_bytes = asked("workspace", scalars) if hasattr(module, "workspace") else 0
        if not all(grid):
            return lambda tensors, scale: None
        run = start(grid, scalars)
        if not num_bytes:
            return lambda tensors, scale: run(tensors, None, scale)
        then = finish(asked("combine_grid", scalars), scalars) if finish else None

        def launch(tensors: Tensors, scale: float) -> None:
            parts = memory(num_bytes, index)
            run(tensors, parts, scale)
            if then is not None:
                then(tensors, parts, scale)

        return launch

    return bind


def module_of(name: str) -> types.ModuleType:
    """The module of a kernel: what was checked is what is run, whatever bytecode lies there."""
    facts = table()["kernels"][name]
    text = content(facts["file"], facts["sha256"])
    module = types.ModuleType(f"{__package__}.kernels.{name}")
    module.__file__ = str(HERE / "kernels" / facts["file"])  # where Triton reads the source
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


def compiled(module: types.ModuleType, name: str, function: str = "kernel") -> Any:
    """A function of a kernel's module, compiled for the arch of this package; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    facts, jit = table()["kernels"][name], getattr(module, function)
    types = facts["signature"]
    source = (GluonASTSource if jit.is_gluon() else ASTSource)(
        jit,
        {each: types[each] for each in jit.arg_names},  # its launcher takes them in this order
        attrs={(place,): [["tt.divisibility", by]] for place, by in facts["divisible"]},
    )
    arch = int(table()["header"]["device"]["arch"][2:])
    options: Mapping[str, Any] = facts["options"] if function == "kernel" else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@cache
def _compare_versions() -> None:
    made_with = table()["header"]["versions"].get("triton", triton.__version__)
    if triton.__version__ not in made_with:
        warnings.warn(
            f"{__package__} was tuned with Triton {made_with}. This is {triton.__version__}, which "
            "may make slower kernels of the same source.",
            stacklevel=2,
        )


def _function(
    module: types.ModuleType, name: str, function: str, index: int
) -> Callable[[tuple[int, ...], Sequence[float]], Run]:
    """bind(grid, scalars) -> what runs one function of a module."""
    if interpreting():
        jit = getattr(module, function)

        def interpret(grid: tuple[int, ...], bound: Sequence[float]) -> Run:
            def run(tensors: Tensors, parts: torch.Tensor | None, scale: float) -> None:
                parts = parts if parts is None else parts.view(torch.float32)
                null = torch.empty(0)  # lies at address 0
                given = (null if each is None else each for each in (*tensors, parts))
                jit[grid](*given, *bound, scale)

            return run

        return interpret
    kernel = compiled(module, name, function)
    with torch.cuda.device(index):
        launcher = kernel.run  # which loads it onto the current device
    code, packed = kernel.function, kernel.packed_metadata
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    # Past the launcher's own Python, which asks hooks and Triton's allocator in every call. What
    # its C part is handed changed with Triton 3.7.
    newer = hasattr(launcher, "kernel_signature")
    described = (launcher.arg_annotations, launcher.kernel_signature) if newer else ()

    def bind(grid: tuple[int, ...], bound: Sequence[float]) -> Run:
        x, y, z = (*grid, 1, 1)[:3]
        scratch_bytes = x * y * z * launcher.num_ctas * launcher.global_scratch_size

        # `alive`: newer Tritons unload a kernel with the object that loaded it.
        def run(
            tensors: Tensors, parts: torch.Tensor | None, scale: float, alive: Any = kernel
        ) -> None:
            scratch = memory(scratch_bytes, index) if scratch_bytes else None
            given = (*map(address, tensors), address(parts), *bound, scale)
            first = (x, y, z, stream(index), code, cooperative, dependent)
            if newer:
                launcher.launch(*first, packed, None, None, None, scratch, None, *described, given)
            else:
                launcher.launch(*first, scratch, None, packed, None, None, None, *given)

        return run

    return bind
