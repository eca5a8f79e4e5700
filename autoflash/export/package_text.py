"""What an exported package says of itself: pyproject.toml, README.md and LICENSE."""

from __future__ import annotations

from collections.abc import Sequence

from autoflash.export.header import comment
from autoflash.export.selection import Entry, Selection

LICENSE = """\
The kernels in this package were rendered from the templates of autoflash, and its Python files are
copies of files of autoflash. Both are licensed under the Apache License, Version 2.0. You may
obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the License
is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
implied. See the License for the specific language governing permissions and limitations under the
License.
"""


def pyproject(name: str, selection: Selection) -> str:
    """pyproject.toml; the version is the day on which the newest record was made."""
    day = [str(int(part)) for part in selection.created[:10].split("-") if part]
    triton = any(entry.source.language == "python" for entry in selection.entries)
    needs = ', "triton>=3.6"' if triton else ""
    return f"""\
{comment(selection, "#")}
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{name.replace("_", "-")}"
version = "{".".join(day) or "0"}"
description = "Attention kernels tuned for {selection.device.name}."
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.10"
dependencies = ["torch>=2.11"{needs}]

[tool.hatch.build]
ignore-vcs = true # built libraries belong to it, whatever a .gitignore says

[tool.hatch.build.targets.wheel]
packages = ["{name}"]
"""


def readme(name: str, selection: Selection, build_loop: str | None) -> str:
    """README.md: what is in it, how it is used, what was measured, how libraries are rebuilt.

    Args:
        name: of the package.
        selection: what is in it.
        build_loop: for a shell, makes all libraries; None where there are none.
    """
    device = selection.device
    elsewhere = f"a GPU, and on a CPU without all of {', '.join(device.isa) or 'nothing'}."
    if device.is_cuda:
        elsewhere = (
            f"GPUs of another architecture than {device.arch}; on other GPUs of that architecture\n"
            "kernels run, with a warning."
        )
    parts = [
        f"""\
# {name}

Attention kernels that autoflash tuned for {device.name} ({device.arch}). They need PyTorch,
those in Triton that too, and none autoflash.

    pip install .

```python
import {name}

# (batch, seqlen, heads, head_dim)
out = {name}.flash_attn_func(q, k, v, causal=True)
out, lse = {name}.attention(q, k, v, causal=True, return_lse=True)
```

A call of a shape below is served by its kernel; others by what was measured to be best for such
shapes, else by the kernel of the nearest shape, if it was compiled for such a call: dtype,
head_dim, mask, softcap, alignment. PyTorch serves the rest, with one warning. So it does on
{elsewhere}
Files of kernels are checked against `table.json` before they are loaded.

Forward only: calls that need gradients are PyTorch's. `torch.compile` sees one operator. Call a
shape once before a CUDA graph captures it.

## Kernels

""",
        winners(selection.entries),
        f"\n## How it was measured\n\n{comment(selection, '   ')}",
    ]
    if build_loop:
        compiler = "nvcc, and CUTLASS naming a checkout of CUTLASS 4.2 or newer"
        parts.append(
            f"""
## Libraries

What is not in Triton is loaded from libraries in `{name}/kernels`. To build them, where they were
not shipped, or anew (then delete `libraries.json`, which has their digests), run there, with
{compiler if device.is_cuda else "g++"}:

    {build_loop}
"""
        )
    return "".join(parts)


def winners(entries: Sequence[Entry]) -> str:
    """A table of what was tuned: shapes, kernels, times."""
    lines = ["| shape | kernel | us | default us | PyTorch us |", "|---|---|---:|---:|---:|"]
    for entry in entries:
        record = entry.record
        times = (record.latency_us, record.default_us, record.torch_us)
        cells = " | ".join(_us(time) for time in times)
        lines.append(f"| {record.problem.name} | `{record.config.template}` | {cells} |")
    return "\n".join(lines) + "\n"


def _us(time: float | None) -> str:
    """Four digits or all before the point, and never an exponent."""
    if time is None:
        return ""
    return f"{time:.0f}" if time >= 999.5 else f"{time:.4g}"
