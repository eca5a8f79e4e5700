"""How a module that calls FlexAttention becomes a kernel: PyTorch compiles it where it first runs.

The compiler needs the device and the sizes of the tensors, so that what is put into the cache ahead
is the module alone. What PyTorch makes of it goes into the same cache directory.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoflash.build import cache as build_cache
from autoflash.build.kernel import (
    Artifact,
    Call,
    Kernel,
    Launch,
    Resources,
    read_resources,
    write_meta,
)
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import BuildError, CompileError
from autoflash.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_SOURCE = "kernel.py"
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def compile_source(source: Source, device: Device) -> Artifact:
    """Put a module into the cache, its syntax checked; compiling it is left to its first call.

    Raises:
        CompileError: it is not Python.
        CacheError: it cannot be stored.
    """
    try:
        compile(source.text, _SOURCE, "exec")
    except SyntaxError as error:
        raise CompileError(f"{source.template}: {error}", source.text) from error
    digest = hashlib.sha256(f"{source.digest}\0{device.arch}".encode()).hexdigest()

    def fill(directory: Path) -> None:
        (directory / _SOURCE).write_text(source.text, encoding="utf-8")
        # No time of a compilation that has not happened: plans then go by their own guess.
        write_meta(directory, Resources(compile_s=0.0, binary_bytes=0), arch=device.arch)

    directory = build_cache.find_or_make(digest, fill)
    return Artifact(source, device.arch, digest, directory, read_resources(directory))


def load(artifact: Artifact) -> Kernel:
    """Run the module, which defines a function and compiles nothing yet.

    Raises:
        BuildError: the installed FlexAttention does not know one of its options.
    """
    path = artifact.directory / _SOURCE
    # Not imported: each kernel gets code of its own. What shares code shares PyTorch's list of
    # compiled forms, which is searched on every call and ends at eight.
    module: dict[str, Any] = {"__name__": f"autoflash_flex_{artifact.digest[:16]}"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module)
    require_known(module["KERNEL_OPTIONS"], artifact.source.template)
    return FlexKernel(artifact, module)


def require_known(options: Iterable[str], what: str) -> None:
    """See that the installed FlexAttention knows all options: it ignores others without a word.

    Args:
        options: their names, "fwd_" and "bwd_" before them included.
        what: whose they are, for the message.

    Raises:
        BuildError: it does not.
    """
    import torch
    from torch.nn.attention.flex_attention import FlexKernelOptions

    known = FlexKernelOptions.__annotations__
    unknown = [o for o in options if o.removeprefix("fwd_").removeprefix("bwd_") not in known]
    if unknown:
        raise BuildError(
            f"{what}: FlexAttention of PyTorch {torch.__version__} has no kernel option "
            f"{', '.join(unknown)}, and would ignore it. It has: {', '.join(sorted(known))}. "
            "Tune with the PyTorch that the options are for."
        )


def constants(text: str) -> dict[str, Any]:
    """KERNEL_OPTIONS and MASK_BLOCK of a rendered module, which is not run for that."""
    found = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    return {name: found[name] for name in ("KERNEL_OPTIONS", "MASK_BLOCK")}


class FlexKernel(Kernel):
    """FlexAttention with the mask, the options and the sizes of one module.

    Args:
        artifact: where it came from.
        module: its names: `attention(scale)` makes a function of (q, k, v, block_mask) that gives
            out, `attention_with_lse(scale)` one that gives lse too; `block_mask(device)`.
    """

    gives_lse = False  # it is compiled once more for that

    def __init__(self, artifact: Artifact, module: Mapping[str, Any]) -> None:
        super().__init__(artifact)
        self._module = module
        self._compiled: dict[tuple[str, float], Callable[..., Any]] = {}
        self._block_mask: Any = None

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        """Refused: FlexAttention takes tensors, and not their addresses."""
        raise BuildError(
            f"{self.artifact.source.template} takes tensors and cannot be launched on addresses; "
            "attention() serves no problem of its op."
        )

    def bind(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        softmax_scale: float,
        layout: str = "bshd",
        *,
        problem: Problem | None = None,
        descales: Sequence[torch.Tensor | None] = (),
    ) -> Call:
        """Prepare calls on these tensors, and compile for them: see Kernel.bind.

        A call returns the output, which PyTorch allocates, and leaves `out` as it is; it writes
        `lse` where that is asked for. Their sizes are those of the module, as is the mask.
        """
        import torch

        heads_first = [t.transpose(1, 2) if layout == "bshd" else t for t in (q, k, v)]
        if self._block_mask is None:
            self._block_mask = self._module["block_mask"](q.device)
        arguments = (*heads_first, self._block_mask)
        key = ("attention" if lse is None else "attention_with_lse", softmax_scale)
        known = self._compiled.get(key)
        compiled = known or torch.compile(
            self._module[key[0]](softmax_scale), dynamic=False, fullgraph=True
        )

        def call() -> torch.Tensor:
            with torch.no_grad():  # with gradients it would always write lse
                made: Any = compiled(*arguments)
                if lse is not None:
                    made, found = made
                    lse.copy_(found)
            out: torch.Tensor = made.transpose(1, 2) if layout == "bshd" else made
            return out

        if known is None:
            with _compiling():
                call()
            self._compiled[key] = compiled
        return call


@contextmanager
def _compiling() -> Iterator[None]:
    """Let PyTorch compile in this process, and keep what it makes in our cache directory.

    There is one kernel to compile, and its pool of processes would import PyTorch in each first.
    """
    before = os.environ.get(_INDUCTOR)
    os.environ[_INDUCTOR] = str(build_cache.root() / "inductor")
    config: Any = importlib.import_module("torch._inductor.config")
    try:
        with config.patch(compile_threads=1):
            yield
    finally:
        if before is None:
            del os.environ[_INDUCTOR]
        else:
            os.environ[_INDUCTOR] = before
