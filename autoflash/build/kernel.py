"""Kernel: a rendered and built template, callable with its op's argument list."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoflash.codegen import ops
from autoflash.codegen.template import Source
from autoflash.problem import Problem

if TYPE_CHECKING:
    import torch

Launch = Callable[..., None]
"""Launches a kernel whose sizes and strides are bound.

Called as launch(*pointers, softmax_scale, last): the addresses of the op's tensors in order (0
for one that may be null, such as an `lse` that is not wanted), the scale, then the CUDA stream
handle, or the number of threads on a CPU. It does not check anything. The stream must be torch's
current one where the kernel has a workspace, which is allocated for each call.
"""


def memory_for(num_bytes: int, *, on_cpu: bool = False) -> Callable[[], torch.Tensor]:
    """What allocates a workspace on the current CUDA device, or in host memory.

    From torch, whose allocator knows streams and CUDA graphs: dropped after a launch, the memory
    goes to later work of the same stream.
    """
    import torch

    device = "cpu" if on_cpu else torch.cuda.current_device()
    return partial(torch.empty, num_bytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the compiler says a kernel uses; None where it does not say.

    Attributes:
        compile_s: wall time of the compilation that made it.
        binary_bytes: size of the binary.
        registers: 32-bit registers per thread.
        spill_bytes: bytes per thread that did not fit in registers.
        smem_bytes: shared memory per thread block, static and dynamic.
        num_threads: threads per thread block.
        spill_load_bytes: bytes per thread that instructions read back of what was spilled.
        stack_bytes: local memory per thread: spills, and arrays that are indexed by variables.
    """

    compile_s: float
    binary_bytes: int
    registers: int | None = None
    spill_bytes: int | None = None
    smem_bytes: int | None = None
    num_threads: int | None = None
    spill_load_bytes: int | None = None
    stack_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled kernel on disk: can be made without the device, loaded only with it.

    Attributes:
        source: what was compiled.
        arch: what for ("sm80", "cpu").
        digest: of source, compiler, flags and arch: the cache directory's name.
        directory: holds the source, the binary and meta.json.
        resources: read back from meta.json.
    """

    source: Source
    arch: str
    digest: str
    directory: Path
    resources: Resources


META = "meta.json"


def write_meta(directory: Path, resources: Resources, **facts: Any) -> None:
    """Write meta.json: the resources, and whatever else a person may want to know."""
    text = json.dumps({"resources": resources.to_dict(), **facts}, indent=1, sort_keys=True)
    (directory / META).write_text(text + "\n", encoding="utf-8")


def read_resources(directory: Path) -> Resources:
    """The resources that `write_meta` stored."""
    meta = json.loads((directory / META).read_text(encoding="utf-8"))
    return Resources(**meta["resources"])


Call = Callable[[], "torch.Tensor | None"]
"""Runs a kernel on tensors that it is bound to, on the current stream, and checks nothing.

Returns None where the kernel writes into the `out` that it was given, else the output that it made,
of the same shape."""


class Kernel(ABC):
    """A loaded kernel.

    Attributes:
        artifact: where it came from.
        gives_lse: whether it is the same kernel that also writes lse where it is asked to.
    """

    gives_lse = True

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    def resources(self) -> Resources:
        """What the compiler says it uses."""
        return self.artifact.resources

    @abstractmethod
    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        """Bind sizes, strides and whatever else the op binds.

        Args:
            scalars: the op's scalars in order (ops.fwd_scalars).

        Returns:
            What to call with addresses, softmax_scale and stream (or number of threads). All
            that depends on the shape, such as the grid, is computed here and not per call.
        """

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
        """Prepare calls on these tensors: for tests and tuning, not the hot path.

        The caller keeps them alive: kernels know addresses.

        Args:
            q: query, (batch, seqlen_q, num_heads, head_dim) for layout "bshd".
            k: key, (batch, seqlen_k, num_kv_heads, head_dim).
            v: value, (batch, seqlen_k, num_kv_heads, head_dim_v).
            out: output, (batch, seqlen_q, num_heads, head_dim_v); overwritten.
            lse: (batch, num_heads, seqlen_q) float32 contiguous, overwritten; or None.
            softmax_scale: factor of the scores before the softmax.
            layout: "bshd" or "bhsd", of all four.
            problem: whose sliding window and softcap hold; None: neither.
            descales: of q, k and v, (batch, num_kv_heads) float32 contiguous each, for an op that
                takes them; None among them, or none given: 1.
        """
        import torch

        launch = self.prepare(ops.fwd_scalars((q, k, v, out), layout, problem))
        tensors = [q, k, v, out, lse, *descales]
        tensors += [None] * (len(ops.get(self.artifact.source.op).pointers) - len(tensors))
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        if q.device.type == "cuda":
            last = torch.cuda.current_stream(q.device).cuda_stream
        else:
            last = torch.get_num_threads()
        return partial(launch, *pointers, softmax_scale, last)

    def __call__(
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
    ) -> None:
        """Run once on the current stream; arguments as for `bind`."""
        call = self.bind(
            q, k, v, out, lse, softmax_scale, layout, problem=problem, descales=descales
        )
        made = call()
        if made is not None:
            out.copy_(made)
