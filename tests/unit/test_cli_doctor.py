from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from autoflash import settings
from autoflash.build import nvcc
from autoflash.cli import doctor, main
from autoflash.codegen import catalog


def finding(name: str) -> doctor.Finding:
    [found] = [each for each in doctor.diagnose().findings if each.what == name]
    return found


def assert_helps(found: doctor.Finding, status: str) -> None:
    """What is not right is explained: what it costs, and what to do."""
    assert found.status == status
    assert found.costs
    assert found.next_step


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> pytest.MonkeyPatch:
    return monkeypatch


def set_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setenv(name, str(value))
    settings.get.cache_clear()


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name)
    )


def test_a_machine_like_this_one_can_do_something(
    cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    said = capsys.readouterr().out
    assert exited.value.code == 0
    assert "This machine can:" in said
    assert "Next: autoflash tune" in said


def test_json_holds_all_that_the_text_says(
    cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["is_useful"] is True
    assert {each["what"] for each in answer["findings"]} >= {
        "torch", "GPU", "CPU", "triton", "C++ compiler", "ninja", "nvcc", "cache", "database",
        "templates",
    }  # fmt: skip


def test_no_compiler(setting: pytest.MonkeyPatch) -> None:
    set_variable(setting, "AUTOFLASH_CXX", "no-such-compiler")
    assert_helps(finding("C++ compiler"), "missing")
    assert "AUTOFLASH_CXX" in finding("C++ compiler").next_step
    assert not [what for what in doctor.diagnose().can if "CPU" in what]


def test_a_compiler_that_does_not_work(setting: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho cannot find -lgomp >&2\nexit 1\n")
    broken.chmod(0o755)
    set_variable(setting, "AUTOFLASH_CXX", broken)
    found = finding("C++ compiler")
    assert_helps(found, "broken")
    assert "cannot find -lgomp" in found.found


def test_no_triton(setting: pytest.MonkeyPatch) -> None:
    hide(setting, "triton")
    assert_helps(finding("triton"), "missing")


@pytest.mark.parametrize(
    ("version", "status"),
    [("3.5.1", "broken"), ("3.6.0", "ok"), ("3.9.0+git1", "ok"), ("3.10.0", "broken")],
)
def test_triton_versions(setting: pytest.MonkeyPatch, version: str, status: str) -> None:
    hide(setting, "nothing")
    setting.setattr(doctor.importlib.metadata, "version", lambda name: version)
    setting.setattr(importlib.util, "find_spec", lambda *_: object())
    assert finding("triton").status == status


def test_no_torch(setting: pytest.MonkeyPatch) -> None:
    setting.setitem(sys.modules, "torch", None)
    diagnosis = doctor.diagnose()
    [torch] = [each for each in diagnosis.findings if each.what == "torch"]
    assert_helps(torch, "missing")
    assert not diagnosis.is_useful
    assert "torch" in diagnosis.next_step


def test_a_missing_library(setting: pytest.MonkeyPatch) -> None:
    hide(setting, "optuna")
    found = finding("libraries")
    assert_helps(found, "missing")
    assert "optuna" in found.next_step


def test_a_machine_that_can_do_nothing_exits_with_5(
    setting: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_variable(setting, "AUTOFLASH_CXX", "no-such-compiler")
    hide(setting, "triton")
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 5
    assert "Next: pip install" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(setting: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Below a file, so that it cannot be written by root either.
    set_variable(setting, "AUTOFLASH_CACHE_DIR", tmp_path / "file" / "cache")
    assert_helps(finding("cache"), "broken")
    assert "AUTOFLASH_CACHE_DIR" in finding("cache").next_step
    assert_helps(finding("database"), "broken")


def test_a_database_that_is_none(setting: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, by far" * 100)
    set_variable(setting, "AUTOFLASH_DATABASE", f"sqlite:///{tmp_path}/notes.txt")
    found = finding("database")
    assert_helps(found, "broken")
    assert "notes.txt" in found.found


def test_a_template_with_a_mistake(setting: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fwd.cpp.jinja").write_text("no declaration\n")
    set_variable(setting, "AUTOFLASH_TEMPLATES", tmp_path)
    catalog.installed.cache_clear()
    try:
        found = finding("templates")
        assert_helps(found, "broken")
        assert "fwd.cpp.jinja:1" in found.found
    finally:
        catalog.installed.cache_clear()


def test_a_probe_that_fails_does_not_end_the_visit(setting: pytest.MonkeyPatch) -> None:
    def fails() -> doctor.Finding:
        raise RuntimeError("unforeseen")

    setting.setattr(doctor, "_ninja", fails)
    broken = [each for each in doctor.diagnose().findings if each.status == "broken"]
    assert [each.found for each in broken] == ["RuntimeError: unforeseen"]


def test_the_three_states_of_a_machine(
    cache_dir: Path, setting: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setting.setattr(nvcc, "unavailable", lambda: None)
    compiler = nvcc.Compiler("/opt/nvcc", "13.0.88", (), ())
    setting.setattr(nvcc, "compiler", lambda: compiler)
    setting.setattr(nvcc, "headers", lambda: nvcc.Headers(tmp_path, "4.2.0"))
    can_build = finding("nvcc")
    assert (can_build.status, can_build.costs) == ("ok", "")
    assert can_build.found == "can build: /opt/nvcc 13.0.88, CUTLASS 4.2.0"

    setting.setattr(nvcc, "unavailable", lambda: "a compiler")
    neither = finding("nvcc")
    assert neither.found == "neither a compiler nor built kernels; it would take a compiler"
    for digest, arch in (("aa01", "sm90"), ("aa02", "sm90"), ("bb03", "sm80")):
        made = cache_dir / "kernels" / digest[:2] / digest
        made.mkdir(parents=True)
        (made / "kernel.cu").touch()
        (made / "meta.json").write_text(json.dumps({"arch": arch}))
    (cache_dir / "kernels" / "bb" / "bb03" / "kernel.cu").with_name("meta.json").write_text("{")
    binaries = finding("nvcc")
    assert binaries.found == "binaries only: 2 for sm90; it would take a compiler"


@pytest.mark.parametrize("gpu", [False, True])
def test_nvcc_is_missed_by_templates_that_need_it_where_they_could_run(
    cache_dir: Path, setting: pytest.MonkeyPatch, gpu: bool
) -> None:
    setting.setattr(nvcc, "unavailable", lambda: "a compiler")
    needs_it = any(t.language == "cuda" for t in catalog.installed().templates.values())
    found = doctor._nvcc(gpu)
    assert found.status == ("missing" if needs_it and gpu else "absent")
    if needs_it:
        assert "autoflash[cuda,nvcc]" in found.next_step
