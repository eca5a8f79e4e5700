"""Environments without autoflash in them: what do tests of installations run in?"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

PIP = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
"""Installs from files that are here, with the build tools that are here."""


def run(*command: object, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; without variables of autoflash's and of this environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AUTOFLASH_", "PYTHONPATH", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def dependencies(folder: Path) -> Path:
    """What is installed here except autoflash itself, so that nothing need be downloaded."""
    folder.mkdir()
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for entry in (entry for place in places for entry in Path(place).iterdir()):
        if "autoflash" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def venv(folder: Path, dependencies: Path) -> Path:
    """The interpreter of a new environment that has these dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    (Path(site.strip()) / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return python
