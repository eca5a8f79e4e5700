"""From source text to a callable: compile (cached, needs no device), then load."""

from __future__ import annotations

from autoflash.build.kernel import Artifact, Kernel, Launch, Resources
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import BuildError

__all__ = ["Artifact", "Kernel", "Launch", "Resources", "build", "compile_source", "load"]


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
    raise BuildError(f"{source.template}: there is no builder for language {source.language!r}")


def load(artifact: Artifact) -> Kernel:
    """Load a compiled kernel onto the device present."""
    if artifact.source.language == "python":
        from autoflash.build import triton

        return triton.load(artifact)
    from autoflash.build import cpp

    return cpp.load(artifact)


def build(source: Source, device: Device) -> Kernel:
    """compile_source, then load."""
    return load(compile_source(source, device))
