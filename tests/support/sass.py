"""What is a binary made of? Read by the disassembler that comes with Triton."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest


def opcodes(binary: Path) -> Counter[str]:
    """Opcode -> how often the machine code of a cubin or library has it: "HGMMA", "LDL", ..."""
    spec = find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    tool = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run(
        [tool, "--dump-sass", binary],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    # "/*0a10*/   @!P0 LDGSTS.E.BYPASS.128 [R3], ..."
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", done.stdout)
    assert found, done.stderr
    return Counter(found)
