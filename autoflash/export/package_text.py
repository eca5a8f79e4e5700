"""What an exported package says of itself: pyproject.toml, README.md and LICENSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoflash.export.header import comment
from autoflash.export.selection import Entry, Selection

if TYPE_CHECKING:
    from autoflash.export.package import Kernel

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
    year, month, day = selection.created[:10].split("-")
    triton = any(entry.source.language == "python" for entry in selection.entries)
    needs = ', "triton>=3.6"' if triton else ""
    return f"""\
{comment(selection, "#")}
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{name.replace("_", "-")}"
version = "{int(year)}.{int(month)}.{int(day)}"
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


def readme(name: str, selection: Selection, kernels: Sequence[Kernel]) -> str:
    """README.md: what is in it, how it is used, what was measured, how libraries are rebuilt."""
    device = selection.device
    parts = [
        f"""\
# {name}

Attention kernels that autoflash tuned for {device.name} ({device.arch}). It needs PyTorch, and
Triton where kernels are in it; not autoflash.

    pip install .

```python
import {name}

# (batch, seqlen, heads, head_dim), float16 or bfloat16 as the kernels below
out = {name}.flash_attn_func(q, k, v, causal=True)
out, lse = {name}.attention(q, k, v, causal=True, window_size=(1023, 0), return_lse=True)
```

A call of a shape below is served by its kernel; others by what was measured to be best for such
shapes, else by the kernel of the nearest shape, if it was compiled for such a call: dtype,
head_dim, mask, softcap, alignment. PyTorch serves the rest, with one warning. So it does on a
device of another architecture than {device.arch}; on another device of that architecture kernels
run, with a warning. Files of kernels are checked against `table.json` before they are loaded.

Forward only: calls that need gradients are PyTorch's, and so are those under `torch.compile`. Call
a shape once before a CUDA graph captures it.

## Kernels
""",
        _winners(selection.entries),
        f"\n## How it was measured\n\n{comment(selection, '   ')}",
    ]
    commands = "".join(f"    {kernel.command}\n" for kernel in kernels if kernel.command)
    if commands:
        parts.append(
            f"""
## Libraries

What is not in Triton is loaded from `{name}/kernels/*.so`. To build them, or build them anew (then
delete their line in `kernels/libraries.json`), run in `{name}/kernels`
{"with nvcc, and CUTLASS naming a checkout of CUTLASS 4.2 or newer:" if device.is_cuda else ":"}

{commands}"""
        )
    return "".join(parts)


def _winners(entries: Sequence[Entry]) -> str:
    lines = ["| shape | kernel | us | default us | PyTorch us |", "|---|---|---:|---:|---:|"]
    for entry in entries:
        record = entry.record
        times = (record.latency_us, record.default_us, record.torch_us)
        cells = " | ".join("" if time is None else f"{time:.4g}" for time in times)
        lines.append(f"| {record.problem.name} | `{record.config.template}` | {cells} |")
    return "\n".join(lines) + "\n"
