"""`autoflash verify` finds out what is wrong with an export, and survives it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import exports

from autoflash import cli
from autoflash.codegen.catalog import installed
from autoflash.device import KNOWN_GPUS, for_arch
from autoflash.errors import InvalidInput
from autoflash.export import Options, Selection, bundle, package, rematch, verify, write
from autoflash.export.rematch import Match
from autoflash.export.verify import Verification
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.timing import Comparison

EFFORT = dataclasses.replace(EFFORTS["quick"], rounds=5, finals_ms=5.0, timing_ms=2.0)
SOURCES = Options(binaries=False)
VERDICTS = {"holds", "tie", "lost", "default"}


def selection() -> Selection:
    here = for_arch("cpu")
    default = exports.won("cpp/fwd", "b1s128h2d32f-float32", here)
    changed = exports.won("cpp/fwd", "b1s96h4/2d32c-float32", here)
    space = installed().get("cpp/fwd").space(changed.problem, here).configs
    others = (config for config in space if config["prepack"] != changed.config["prepack"])
    return exports.selected([default, dataclasses.replace(changed, config=next(others))])


@pytest.fixture(scope="module")
def built() -> Mapping[str, str | bytes]:
    return package.package_files(selection(), Options(name="tuned"))


def check(folder: Path) -> Verification:
    return verify.verify(folder, effort=EFFORT)


def said(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        cli.main(["verify", str(folder), *options])
    out, err = capsys.readouterr()
    return int(exited.value.code or 0), out, err


# Intact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["library", "source", "template"])
def test_an_intact_export_is_checked_and_raced(
    origin: str, built: Mapping[str, str | bytes], tmp_path: Path
) -> None:
    files: Mapping[str, str | bytes] = {
        "library": built,
        "source": {p: c for p, c in built.items() if not p.endswith((".so", "libraries.json"))},
        "template": {"some.json": "{}"},
    }[origin]
    write(tmp_path, "package", selection(), files)
    found = check(tmp_path)
    assert found.files.intact
    assert found.skipped is None
    [causal, full] = sorted(found.matches, key=lambda match: match.entry["name"], reverse=True)
    for match in (causal, full):
        assert (match.outcome, match.reason, match.origin) == ("ok", "", origin)
        assert match.now_us is not None
        assert match.now_us > 0
        assert match.versus_torch is not None
        assert match.verdict in VERDICTS
    assert causal.versus_default is not None
    assert causal.versus_default.rounds == EFFORT.rounds
    assert full.is_default
    assert full.verdict == "default"
    assert not found.is_partial
    assert found.is_wrong == (causal.verdict == "lost")


def test_the_command_says_what_it_found(
    built: Mapping[str, str | bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, "package", selection(), built)
    monkeypatch.setattr(
        rematch, "play", lambda *_: [finished(entry) for entry in bundle.read(tmp_path).entries]
    )
    code, out, _ = said(tmp_path, capsys)
    assert code == 0
    assert f"{len(built)} of {len(built)} files are as they were written" in out
    assert "1.25x [1.11, 1.43]" in out
    assert "holds" in out
    code, out, _ = said(tmp_path, capsys, "--json")
    answer = json.loads(out)
    assert (code, answer["status"], answer["target"]) == (0, "ok", "package")
    assert answer["winners"][0]["versus_default"] == {"ratio": 0.8, "low": 0.7, "high": 0.9}


def finished(entry: Mapping[str, Any], low: float = 0.7, high: float = 0.9, **others: Any) -> Match:
    ratio = Comparison(ratio=(low + high) / 2, low=low, high=high, rounds=5)
    fields: dict[str, Any] = {"outcome": "ok", "now_us": 9.0, "versus_default": ratio}
    return Match(entry=entry, **{**fields, **others})


@pytest.mark.parametrize(
    ("match", "verdict", "code"),
    [
        (finished({}, 0.8, 0.9), "holds", 0),
        (finished({}, 0.98, 1.01), "tie", 0),
        (finished({}, 1.002, 1.2), "tie", 0),  # less than any margin
        (finished({}, 1.1, 1.2), "lost", 5),
        (finished({}, is_default=True, versus_default=None), "default", 0),
        (finished({}, versus_default=None), "right", 0),
        (finished({}, outcome="wrong_result"), "wrong", 5),
        (finished({}, outcome="crash"), "wrong", 5),
        (finished({}, outcome="unchecked"), "unchecked", 4),
    ],
)
def test_a_winner_must_not_lose_beyond_the_noise(
    match: Match,
    verdict: str,
    code: int,
    built: Mapping[str, str | bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert match.verdict == verdict
    write(tmp_path, "package", selection(), built)
    [entry, _] = bundle.read(tmp_path).entries
    monkeypatch.setattr(rematch, "play", lambda *_: [dataclasses.replace(match, entry=entry)])
    assert said(tmp_path, capsys)[0] == code


# Not as it was written ----------------------------------------------------------------------------


def touch_nothing(*_: object) -> list[Match]:
    raise AssertionError("a kernel of a damaged export was run")


def test_of_a_tampered_export_nothing_is_run(
    built: Mapping[str, str | bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, "package", selection(), built)
    monkeypatch.setattr(rematch, "play", touch_nothing)
    library, source = (
        next(path for path in sorted(built) if path.endswith(end)) for end in (".so", ".cpp")
    )
    (tmp_path / library).write_bytes((tmp_path / library).read_bytes() + b"\0")
    (tmp_path / source).unlink()
    (tmp_path / "tuned" / "more.py").write_text("")
    (tmp_path / "tuned" / "__pycache__").mkdir()
    (tmp_path / "tuned" / "__pycache__" / "left.pyc").write_bytes(b"")
    code, out, _ = said(tmp_path, capsys)
    assert code == 5
    assert f"{len(built) - 2} of {len(built)} files" in out
    for line in (f"changed: {library}", f"missing: {source}", "extra: tuned/more.py"):
        assert line in out
    assert ".pyc" not in out
    assert "no kernel was run: files are not as they were written" in out


def test_a_manifest_cannot_name_files_elsewhere(
    built: Mapping[str, str | bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    write(folder, "package", selection(), built)
    (tmp_path / "outside").write_text("x")
    path = folder / bundle.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["../outside"] = hashlib.sha256(b"x").hexdigest()
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr(rematch, "play", touch_nothing)
    with pytest.raises(InvalidInput, match=r"'\.\./outside' is no file below the folder"):
        check(folder)
    with pytest.raises(InvalidInput, match="is no file below the folder"):
        write(folder, "package", selection(), {"a": "b"})
    assert (tmp_path / "outside").read_text() == "x"
    # Nor by a link: what it points to is not what was written.
    manifest["files"]["inside"] = manifest["files"].pop("../outside")
    path.write_text(json.dumps(manifest))
    (folder / "inside").symlink_to(tmp_path / "outside")
    assert check(folder).files.changed == ("inside",)


@pytest.mark.parametrize("damage", ["", "{", "{}", '{"files": 1}'])
def test_what_is_no_export_is_a_mistake(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage:
        (tmp_path / bundle.MANIFEST).write_text(damage)
    code, out, err = said(tmp_path, capsys)
    assert (code, out) == (2, "")
    assert "is damaged" in err if damage else "is no export" in err
    with pytest.raises(InvalidInput):
        check(tmp_path / "nowhere")


# Wrong, crashing, elsewhere -----------------------------------------------------------------------


def altered(
    built: Mapping[str, str | bytes], tmp_path: Path, *instead: str
) -> dict[str, str | bytes]:
    """The export with libraries that do something else than their sources say."""
    files = dict(built)
    known = package.kernels(selection())
    for kernel, first in zip(known, instead, strict=True):
        text = kernel.text.replace("  return launch(", f"  {first} return launch(")
        assert text != kernel.text
        (tmp_path / kernel.file).write_text(text)
        assert kernel.command
        subprocess.run(kernel.command, shell=True, cwd=tmp_path, check=True)
        files[f"tuned/kernels/{kernel.library}"] = (tmp_path / kernel.library).read_bytes()
    return files


def test_kernels_that_are_wrong_or_crash_cost_their_row_alone(
    built: Mapping[str, str | bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work").mkdir()
    files = altered(built, tmp_path / "work", "__builtin_trap();", "if (num_threads) return 0;")
    write(tmp_path / "export", "package", selection(), files)
    found = check(tmp_path / "export")
    assert found.files.intact
    outcomes = {match.outcome: match.reason for match in found.matches}
    assert set(outcomes) == {"crash", "wrong_result"}
    assert "killed by" in outcomes["crash"]
    assert "left unwritten" in outcomes["wrong_result"]
    assert found.is_wrong
    monkeypatch.setattr(rematch, "play", lambda *_: list(found.matches))
    code, out, _ = said(tmp_path / "export", capsys)
    assert code == 5
    assert out.count("wrong ") == 2


def test_on_another_arch_only_files_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rematch, "play", touch_nothing)
    monkeypatch.setattr(verify.devices, "native", lambda: for_arch("cpu"))
    record = exports.won("triton/fwd", "b1s256h4/2d64c-float16", KNOWN_GPUS["sm80"])
    chosen = exports.selected([record])
    write(tmp_path, "package", chosen, package.package_files(chosen, SOURCES))
    code, out, _ = said(tmp_path, capsys)
    assert code == 4
    assert "no kernel was run: it is for NVIDIA A100-SXM4-80GB (sm80)" in out
    (tmp_path / "LICENSE").write_text("mine")
    assert said(tmp_path, capsys)[0] == 5


def test_sources_are_found_in_what_was_exported(tmp_path: Path) -> None:
    chosen = exports.reviewed()  # CUDA with its entry point appended, and Gluon
    write(tmp_path / "export", "package", chosen, package.package_files(chosen, SOURCES))
    (tmp_path / "scratch").mkdir()
    found = rematch._shipped(bundle.read(tmp_path / "export"), tmp_path / "scratch")
    assert {digest: side.source for digest, side in found.items()} == {
        entry.source.digest: entry.source for entry in chosen.entries
    }
    assert {side.origin for side in found.values()} == {"source"}


def manifest_with(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / bundle.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_other_versions_templates_and_devices_are_told(tmp_path: Path) -> None:
    write(tmp_path, "json", selection(), {"some.json": "{}"})

    def change(manifest: dict[str, Any]) -> None:
        manifest["header"]["versions"]["torch"] = ["1.0", "1.1"]
        manifest["header"]["device"]["name"] = "Another CPU"
        manifest["header"]["templates"]["cpp/fwd"]["digest"] = "0123"

    manifest_with(tmp_path, change)
    found = check(tmp_path)
    told = " | ".join(found.differences)
    assert "torch was 1.0, 1.1 and is 2" in told
    assert "tuned on Another CPU" in told
    assert "template cpp/fwd was 0123 and is " in told
    # Without a source of its own, and with other templates, there is nothing to run.
    assert [match.verdict for match in found.matches] == ["unchecked", "unchecked"]
    assert "not that which was tuned (0123)" in found.matches[0].reason
    assert found.is_partial
    assert not found.is_wrong
