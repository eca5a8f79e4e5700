"""However it is installed, autoflash finds its templates and its records."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import venvs
from support.venvs import run, venv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
ASK = """
import json, autoflash
from autoflash import settings
from autoflash.codegen import catalog
from autoflash.workload import presets
found = settings.get()
print(json.dumps({
    "package": autoflash.__file__,
    "templates_dir": str(found.templates_dir),
    "templates": sorted(catalog.installed().templates),
    "presets": len(presets.installed()),
    "packs": sorted(path.name for path in found.tuning_db_dir.glob("*.jsonl")),
}))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from what the sdist holds."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    [sdist] = out.glob("*.tar.gz")
    # Without a filter Python 3.12 warns; those before 3.11.4 know none.
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(sdist) as archive:
        archive.extractall(out, **safely)
    [unpacked] = (path for path in out.iterdir() if path.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=unpacked)
    return out


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return venvs.dependencies(tmp_path_factory.mktemp("packaging") / "dependencies")


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_installation_finds_its_data(
    kind: str, dist: Path, dependencies: Path, tmp_path: Path
) -> None:
    python = venv(tmp_path / "venv", dependencies)
    what = {
        "wheel": [next(dist.glob("*.whl"))],
        "sdist": [next(dist.glob("*.tar.gz"))],
        "editable": ["--editable", next(path for path in dist.iterdir() if path.is_dir())],
    }[kind]
    run(python, *venvs.PIP, *what, cwd=tmp_path)

    answer = json.loads(run(python, "-c", ASK, cwd=tmp_path))

    inside = dist if kind == "editable" else tmp_path / "venv"
    assert Path(answer["package"]).is_relative_to(inside)
    assert Path(answer["templates_dir"]).is_relative_to(inside)
    endings = (".py.jinja", ".cu.jinja", ".cpp.jinja", ".flex.jinja")
    files = [
        path.relative_to(ROOT / "templates").as_posix()
        for path in (ROOT / "templates").rglob("*.jinja")
        if path.name.endswith(endings) and not path.name.startswith("_")
    ]
    assert answer["templates"] == sorted(re.sub(r"\.\w+\.jinja$", "", name) for name in files)
    assert answer["presets"] > 0
    assert answer["packs"] == sorted(path.name for path in (ROOT / "tuning_db").glob("*.jsonl"))

    version = run(python.parent / "autoflash", "version", "--json", cwd=tmp_path)
    assert json.loads(version)["package"] == str(Path(answer["package"]).parent)


def test_the_wheel_is_pure_and_holds_the_package_alone(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"autoflash"}
    # Data that exports are made of, beside the modules that read it.
    assert "autoflash/export/schema/autoflash-configs-1.schema.json" in names


def test_nothing_heavy_is_imported_with_the_package() -> None:
    heavy = ["torch", "triton", "jinja2", "sqlalchemy", "alembic", "optuna", "typer", "rich"]
    code = f"import sys, autoflash; print([m for m in {heavy} if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_every_dependency_has_a_pin_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "triton" not in pins, "PyTorch's CUDA builds demand one of their own"
    pins["triton"] = makefile.partition("OLDEST_TRITON := ")[2].partition("\n")[0]
    for text in (*project["dependencies"], *extras["bench"], *extras["dev"], *extras["consumers"]):
        wanted = Requirement(text)
        if wanted.name == project["name"]:  # with extras that are listed here themselves
            continue
        if wanted.marker is None or wanted.marker.evaluate({"python_version": "3.11"}):
            assert wanted.specifier.contains(pins[wanted.name.lower()]), text
