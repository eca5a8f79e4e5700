"""hf-kernel: a repository that Hugging Face `kernels` loads, and transformers by it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import autoflash
from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.export import package_text
from autoflash.export.header import comment
from autoflash.export.package import KERNELS, LIBRARIES, module_files
from autoflash.export.selection import Selection
from autoflash.export.target import Options, Target

COMPAT = Path(autoflash.__file__).parent / "compat" / "flash_attn.py"
"""flash-attn 2's functions on top of attention(); torch and the standard library do for them."""

VERSION = 1
"""Major version of what the functions take: `get_kernel(..., version=1)`."""

_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")  # what the kernels library accepts

_INIT = '''\
"""Attention kernels that were tuned for one device; table.json says which, for what and how."""

from ._attention import attention
from ._flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)

__all__ = [
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
]
'''

_STANDALONE = (
    ("from autoflash.errors import InvalidInput, UnsupportedProblem\n", ""),
    (
        "from autoflash.runtime.attention import attention\n",
        "from ._attention import attention\n\n"
        "InvalidInput, UnsupportedProblem = ValueError, NotImplementedError\n",
    ),
)
"""What of COMPAT's imports becomes what."""


def hf_files(selection: Selection, options: Options) -> dict[str, str | bytes]:
    """The repository: build/, build.toml and a model card.

    A GPU's kernels are the variant torch-cuda. Beside it is torch-cpu, the same functions served
    by PyTorch, so that a model that names the kernel can be tried where there is no GPU.

    Raises:
        InvalidInput: the name is none for a kernel.
        ToolchainMissing: libraries are to be built, and cannot be here.
    """
    name = kernel_name(options.name or f"autoflash-{selection.device.slug}")
    inside = module_files(selection, options)
    inside["__init__.py"] = _INIT
    inside["_flash_attn.py"] = _flash_attn()
    files: dict[str, str | bytes] = {}
    backends = ["cuda", "cpu"] if selection.device.is_cuda else ["cpu"]
    for backend in backends:
        kept = inside if backend == backends[0] else _without_kernels(inside)
        kept = {**kept, "metadata.json": _metadata(name, backend, selection.device, kept)}
        files |= {f"build/torch-{backend}/{path}": content for path, content in kept.items()}
    files["build.toml"] = _build_toml(name, backends, selection)
    files["README.md"] = _card(name, selection, options.binaries)
    files["LICENSE"] = package_text.LICENSE
    return files


def kernel_name(name: str) -> str:
    """The name, or InvalidInput."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"--name {name}: the kernels library takes names of lower-case letters, digits and "
            "dashes, which begin with a letter and do not end with a dash, such as "
            "autoflash-nvidia-h200."
        )
    return name


def _flash_attn() -> str:
    """COMPAT for a package that has its own attention()."""
    text = COMPAT.read_text(encoding="utf-8")
    start = text.index("from __future__")
    for line, instead in _STANDALONE:
        assert text.count(line) == 1, line
        text = text.replace(line, instead)
    title = '"""flash-attn 2: its functions by their names, arguments and defaults."""'
    return f"{title}\n\n{text[start:]}"


def _without_kernels(files: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
    return {path: data for path, data in files.items() if not path.startswith(f"{KERNELS}/")}


def _metadata(name: str, backend: str, device: Device, files: Mapping[str, str | bytes]) -> str:
    """What the kernels library reads first; the id is the name of the module in memory."""
    kind: dict[str, object] = {"type": backend}
    if backend == "cuda":
        # "a": of this capability and no other. The loader, too, refuses others.
        major, minor = divmod(device.capability, 10)
        kind["archs"] = [f"{major}.{minor}{'a' if major >= 9 else ''}"]
    facts = {
        "id": f"_{name.replace('-', '_')}_{backend}_{_digest(files)[:12]}",
        "name": name,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": kind,
    }
    return json.dumps(facts, indent=1) + "\n"


def _digest(files: Mapping[str, str | bytes]) -> str:
    """Of all that is the same in each export of a selection: libraries are not."""
    found = hashlib.sha256()
    for path in sorted(files):
        if path != LIBRARIES and not path.endswith(".so"):
            content = files[path]
            data = content.encode() if isinstance(content, str) else content
            found.update(f"{path} {len(data)}\n".encode() + data)
    return found.hexdigest()


def _build_toml(name: str, backends: list[str], selection: Selection) -> str:
    return f"""\
{comment(selection, "#")}# What lies in build/ is complete: kernel-builder has nothing to build.
[general]
name = "{name}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(backends)}

[torch-noarch]
"""


def _card(name: str, selection: Selection, binaries: bool) -> str:
    """README.md, which the Hub shows."""
    device = selection.device
    notes = [
        f"Attention kernels that autoflash tuned for {device.name} ({device.arch}), in the",
        "layout of Hugging Face `kernels`. They need PyTorch, those in",
        "Triton that too, and none autoflash.",
        "Forward only: calls that need gradients are PyTorch's.",
    ]
    if device.is_cuda:
        notes += [
            "`get_kernel` refuses them on a GPU of another architecture. Where there is none, the",
            "same functions are served by PyTorch, with a warning.",
        ]
    if not binaries:
        notes += [
            "Libraries were not shipped: until they are built, by the commands in `table.json`,",
            "PyTorch serves what is not in Triton.",
        ]
    return f"""\
---
license: apache-2.0
library_name: kernels
tags:
- kernels
- attention
---

# {name}

{chr(10).join(notes)}

```python
from pathlib import Path
from kernels import get_local_kernel  # or get_kernel("user/{name}", version={VERSION})

kernel = get_local_kernel(Path("path/to/this/folder"))
out = kernel.flash_attn_func(q, k, v, causal=True)  # (batch, seqlen, heads, head_dim)
```

In transformers, uploaded, or with `LOCAL_KERNELS="user/{name}=path/to/this/folder"`
in the environment before anything is imported:

```python
model.set_attn_implementation("user/{name}", allow_all_kernels=True)
```

Functions: `flash_attn_func`, `flash_attn_varlen_func`, `flash_attn_kvpacked_func` and
`flash_attn_qkvpacked_func` as in flash-attn 2, without dropout, ALiBi and paged caches, which are
errors; and `attention`. Packed sequences are served a run of equal lengths at a time, and their
lengths are read from the device: no CUDA graph can capture that.

## Kernels

{package_text.winners(selection.entries)}
## How it was measured

{comment(selection, "   ")}"""


TARGET = Target(
    name="hf-kernel",
    summary="A repository for Hugging Face kernels; transformers loads it by its name.",
    templates="*",
    files=hf_files,
)
