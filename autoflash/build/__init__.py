"""From source text to a callable: compile (cached, needs no device), then load."""

from __future__ import annotations

from collections.abc import Callable

from autoflash.build.kernel import Artifact, Kernel, Launch, Resources
from autoflash.build.library import LIBRARY
from autoflash.build.memory import jobs_within_memory
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import BuildError

__all__ = [
    "LIBRARY", "Artifact", "Kernel", "Launch", "Resources", "build", "compile_source",
    "jobs_within_memory", "load", "missing", "unavailable",
]  # fmt: skip


def compile_source(source: Source, device: Device) -> Artifact:
    """Compile for `device.arch`, or find it compiled; the device need not be present.

    Raises:
        CompileError: the compiler rejected the source.
        ToolchainMissing: there is no compiler.
        CacheError: the result cannot be stored.
    """
    if source.language == "python":
        from autoflash.build import triton

        return triton.compile_source(source, device)
    if source.language == "cpp":
        from autoflash.build import cpp

        return cpp.compile_source(source, device)
    if source.language == "cuda":
        from autoflash.build import cuda

        return cuda.compile_source(source, device)
    raise BuildError(f"{source.template}: there is no builder for language {source.language!r}")


def load(artifact: Artifact) -> Kernel:
    """Load a compiled kernel onto the device present."""
    if artifact.source.language == "python":
        from autoflash.build import triton

        return triton.load(artifact)
    if artifact.source.language == "cuda":
        from autoflash.build import cuda

        return cuda.load(artifact)
    from autoflash.build import cpp

    return cpp.load(artifact)


def build(source: Source, device: Device) -> Kernel:
    """compile_source, then load."""
    return load(compile_source(source, device))


def unavailable(language: str) -> str | None:
    """Why nothing of a language can be compiled here, or None; what is built already still runs.

    Only nvcc and its headers are so often absent that this is asked before anything is tried.
    """
    if language != "cuda":
        return None
    from autoflash.build import nvcc

    return nvcc.unavailable()


def missing(language: str, render: Callable[[], Source], device: Device) -> str | None:
    """Why a kernel is neither built nor can be built here for want of a compiler, or None.

    Args:
        language: of its template.
        render: makes its source; called only where it must be known.
        device: what for.
    """
    reason = unavailable(language)
    if reason is None:
        return None
    from autoflash.build import cuda

    return None if cuda.is_built(render(), device) else reason
