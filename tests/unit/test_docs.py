"""The documentation names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from autoflash.cli import app

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found += [f"{name} {sub}" for sub in below] if below else [name]
    return found


def variables() -> list[str]:
    text = (ROOT / "autoflash" / "settings.py").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"AUTOFLASH_[A-Z_]+\b", text)))


def targets() -> list[str]:
    found = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found[1].split()


def test_what_is_looked_for_is_found() -> None:
    assert {"tune", "why", "db dump"} <= set(commands())
    assert {"AUTOFLASH_CACHE_DIR", "AUTOFLASH_DATABASE"} <= set(variables())
    assert {"tune", "test"} <= set(targets())


@pytest.mark.parametrize("command", commands())
def test_every_command_is_in_the_readme(command: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"autoflash {re.escape(command)}\b", readme), f"autoflash {command}"


@pytest.mark.parametrize("variable", variables())
def test_every_variable_is_in_the_readme(variable: str) -> None:
    assert variable in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_other_file_reads_a_variable_of_ours() -> None:
    # The command line writes two of them, so that the processes it starts see its options.
    allowed = {"settings.py", "options.py"}
    readers = [
        path.name
        for path in (ROOT / "autoflash").rglob("*.py")
        if re.search(r"""environ.{0,20}["']AUTOFLASH_""", path.read_text(encoding="utf-8"))
    ]
    assert set(readers) <= allowed


@pytest.mark.parametrize("target", targets())
def test_every_make_target_is_in_the_contributors_page(target: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"`make {target}`" in page
