"""What is public, and what is loaded when."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import autoflash

HEAVY = {"torch", "triton", "jinja2", "sqlalchemy", "alembic", "optuna", "typer", "rich", "numpy"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after running `code`."""
    report = "import json, sys; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\n{report}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_public_names() -> None:
    assert autoflash.__all__ == [
        "AutoflashError",
        "BuildError",
        "Config",
        "Device",
        "InvalidInput",
        "Problem",
        "Record",
        "UnsupportedProblem",
        "__version__",
        "attention",
        "explain",
        "warmup",
    ]


@pytest.mark.parametrize("name", autoflash.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(autoflash, name) is getattr(autoflash, name)
    assert name in dir(autoflash)
    assert getattr(autoflash, name).__doc__


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'autoflash' has no attribute 'atention'"):
        autoflash.atention  # noqa: B018


def test_importing_autoflash_loads_nothing_heavy() -> None:
    assert (
        modules_after("import autoflash; autoflash.__version__; autoflash.__all__") & HEAVY == set()
    )
    assert (
        modules_after("from autoflash import Problem; Problem.parse('b1s1h1d64c')") & HEAVY == set()
    )


CALL = """
import autoflash, torch
q = torch.ones(1, 3, 2, 64)
with torch.inference_mode():
    assert torch.equal(autoflash.attention(q, q, q), q)
"""


def test_a_call_never_loads_the_search_or_the_command_line() -> None:
    loaded = modules_after(CALL)
    assert "torch" in loaded
    assert loaded & {"optuna", "typer"} == set()
    searched = (
        f"{CALL}\nimport sys; assert not any(m.startswith('autoflash.tuning') for m in sys.modules)"
    )
    assert "torch" in modules_after(searched)
