"""What is exported, what is written, and what the command says of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.exports import GPU, H200, database, selection, tried, written

from autoflash import cli, export, settings
from autoflash.codegen.catalog import installed
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.errors import InvalidInput, UnknownName
from autoflash.export.bundle import MANIFEST
from autoflash.export.header import comment, entry_dict, header
from autoflash.record import Record
from autoflash.tuning.timing import METHODS

A100 = KNOWN_GPUS["sm80"]
ONE, TWO = "b1s1024h8d64c-bfloat16", "b1s2048h8d64c-bfloat16"
Run = Callable[..., tuple[int, str, str]]


def stale(record: Record) -> Record:
    """The same of a template as it was before."""
    return dataclasses.replace(record, template_digest="0" * 16)


def names(chosen: export.Selection) -> list[tuple[str, str, bool]]:
    return [(e.problem.name.partition("h")[0], e.template.name, e.won) for e in chosen.entries]


# What is selected ---------------------------------------------------------------------------------


def test_winners_of_other_templates_and_of_changed_ones_are_left_out() -> None:
    triton, cuda = tried("triton/fwd", ONE), tried("cuda/fwd_sm80", TWO)
    changed = stale(tried("triton/fwd", "b1s512h8d64c"))
    # The space has become smaller since: the digest stands, and it cannot be rendered.
    narrow = tried("triton/fwd", "b1s256h8d64c", tunables={"num_stages": 99})
    with database(winners=(triton, cuda, changed, narrow)) as db:
        chosen = export.select(db, installed(), templates="triton/*")
        assert names(chosen) == [("b1s1024", "triton/fwd", True)]
        assert sum(chosen.left_out.values()) == 2
        assert chosen.left_out["triton/fwd has changed since it was tuned"] == 1
        assert any("num_stages=99" in reason for reason in chosen.left_out)
        assert len(export.select(db, installed(), templates="*").entries) == 2
        [entry] = chosen.entries
        rendered = entry.template.render(triton.config, triton.problem, GPU)
        assert entry.source.digest == rendered.digest

        def only(records: object) -> list[Record]:
            return [changed, narrow]

        with pytest.raises(InvalidInput, match=r"holds any more: .* has changed .*\(1\)"):
            export.select(db, installed(), templates="triton/*", choose=only)


def test_an_export_is_for_one_device() -> None:
    here, there = tried("triton/fwd"), tried("triton/fwd", device=A100)
    with database(winners=(here, there)) as db:
        with pytest.raises(InvalidInput, match=r"nvidia-a100-sxm4-80gb, nvidia-h100.*--device"):
            export.select(db, installed(), templates="*")
        assert export.select(db, installed(), templates="*", arch="sm80").device == A100
        assert export.select(db, installed(), templates="*", device_key=GPU.key).device == GPU
    with database() as db, pytest.raises(InvalidInput, match="no winners of such a device"):
        export.select(db, installed(), templates="*")


def test_it_is_said_why_nothing_is_left() -> None:
    def said(templates: str = "*", op: str | None = None, **more: Any) -> str:
        with pytest.raises(InvalidInput) as raised:
            export.select(db, installed(), templates=templates, op=op, **more)
        return str(raised.value)

    none = "nothing to export: there are no winners of such a device. The database has winners of "
    with database() as db:
        assert said() == f"{none}nothing. `autoflash tune` makes some."
    with database(winners=(tried("triton/fwd"), tried("flex/fwd", f"flex:{ONE}"))) as db:
        there = "nvidia-h100-80gb-hbm3 (sm90)"
        assert said(arch="sm80") == f"{none}{there}. `autoflash tune` makes some."
        assert "of 2 winners asked for none is of a template like 'cuda/*'" in said("cuda/*")
        assert said("cuda/*").endswith("`autoflash tune --templates 'cuda/*'` makes some.")
        assert "of 2 winners none is of a problem that" in said(choose=lambda _: ())
        foreign = said(choose=lambda found: [r for r in found if r.problem.is_foreign])
        assert "of op flex: `autoflash export flex`" in foreign
        ours = said(
            "flex/*", "flex", choose=lambda found: [r for r in found if r.problem.op == "fwd"]
        )
        assert "none is of op flex" in ours
        assert "`autoflash tune --op flex`" in ours


def test_the_fastest_trial_stands_in_where_another_kernel_won() -> None:
    trials = [
        tried("triton/fwd", ONE, 90.0, tunables={"num_stages": 1}, second=1),
        tried("triton/fwd", ONE, 80.0, tunables={"num_stages": 2}, second=2),
        tried("triton/fwd", ONE, 10.0, tunables={"num_stages": 3}, second=0, policy="older"),
        tried("triton/fwd", ONE, None, "crash", tunables={"num_stages": 4}, second=3),
        stale(tried("triton/fwd", ONE, 5.0, second=4)),
        tried("triton/fwd", ONE, 5.0, tunables={"num_stages": 99}, second=5),
        tried("triton/fwd", TWO, 30.0, second=6),
        tried("triton/fwd", ONE, 5.0, second=7, device=A100),
    ]
    winners = (tried("cuda/fwd_sm80", ONE, 50.0), tried("triton/fwd", TWO, 40.0))
    with database(*trials, winners=winners) as db:
        plain = export.select(db, installed(), templates="triton/*")
        assert names(plain) == [("b1s2048", "triton/fwd", True)]
        chosen = export.select(
            db, installed(), templates="triton/*", stand_ins=True, trials=True, device_key=GPU.key
        )
        with pytest.raises(InvalidInput, match="winners of 2"):
            export.select(db, installed(), templates="triton/*", stand_ins=True)
    assert names(chosen) == [("b1s1024", "triton/fwd", False), ("b1s2048", "triton/fwd", True)]
    [stand_in, winner] = chosen.entries
    assert (stand_in.record.latency_us, stand_in.config["num_stages"]) == (80.0, 2)
    assert winner.record.latency_us == 40.0
    assert [entry_dict(entry)["won"] for entry in chosen.entries] == [False, True]
    # All trials of this device by the template as it is, in their order, failures too.
    assert [e.record.latency_us for e in chosen.trials] == [90.0, 80.0, 10.0, None, 5.0, 30.0]
    assert plain.trials == ()


def test_the_header_says_what_differs_among_records() -> None:
    one = tried("triton/fwd", ONE, environment={"torch": "2.11.0", "triton": "3.6.0"}, second=3)
    two = tried("triton/fwd", TWO, environment={"torch": "2.13.0", "triton": "3.6.0"}, second=2)
    chosen = selection("json", winners=(one, two))
    facts = header(chosen)
    assert facts["versions"] == {"torch": ["2.11.0", "2.13.0"], "triton": "3.6.0"}
    assert facts["created"] == chosen.created == one.created
    assert facts["device"] == GPU.to_dict()
    assert list(facts["templates"]) == ["triton/fwd"]
    assert facts["method"] == {}  # a policy that this version does not know
    policy, method = next(iter(METHODS.items()))
    timed = selection("json", winners=(dataclasses.replace(one, policy=policy),))
    assert header(timed)["method"] == {policy: method}
    assert f"// Policy {policy}: {method}.\n" in comment(timed, "//")
    text = comment(chosen, "//")
    assert all(line.startswith("// ") for line in text.splitlines())
    assert installed().get("triton/fwd").digest in text
    assert GPU.name in text
    longer = dataclasses.replace(one, default_us=123.456789)
    [entry] = selection("json", winners=(longer,)).entries
    assert entry_dict(entry)["default_us"] == 123.46


# What is written ----------------------------------------------------------------------------------


def test_a_new_export_takes_away_what_the_former_one_wrote_and_nothing_else(tmp_path: Path) -> None:
    chosen, out = selection("json", winners=(tried("triton/fwd"),)), tmp_path / "deep" / "out"
    export.write(out, "json", chosen, {"a.txt": "a", "below/b.bin": b"\0"})
    (out / "mine.txt").write_text("mine")
    bundle = export.write(out, "json", chosen, {"a.txt": "new"})
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert left == ["a.txt", MANIFEST, "mine.txt"]
    assert not (out / "below").exists()
    assert (out / "a.txt").read_text() == "new"
    assert export.read(out) == bundle
    assert bundle.entries[0]["source_digest"] == chosen.entries[0].source.digest


def test_folders_that_hold_other_things_are_left_alone(tmp_path: Path) -> None:
    chosen = selection("json", winners=(tried("triton/fwd"),))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInput, match="is a file"):
        export.write(tmp_path / "file", "json", chosen, {})
    with pytest.raises(InvalidInput, match="holds files and no export of ours"):
        export.write(tmp_path, "json", chosen, {"file": "y"})
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(InvalidInput, match="Choose another folder"):
        export.write(tmp_path / "file" / "below", "json", chosen, {"a": "b"})


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> object:  # root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    chosen = selection("json", winners=(tried("triton/fwd"),))
    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(InvalidInput, match=f"--out {tmp_path}: Permission denied: .*Choose"):
        export.write(tmp_path, "json", chosen, {"a": "b"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"target"', '"tarket"'), "'target'"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "version 2"),
        (lambda text: text.replace('"schema_version": 1', '"version": 1'), "schema_version"),
        (lambda text: text.replace('"a": ', '"../a": '), r"'\.\./a' is no file below the folder"),
        (lambda text: text.replace('"a": ', '"/a": '), "'/a' is no file below the folder"),
        (lambda text: text.replace('"latency_us"', '"late_us"'), "latency_us"),
        (lambda text: text.replace('"batch"', '"bath"'), "bath"),
        (lambda text: text.replace('"entries": [', '"entries": [1, '), "is damaged"),
    ],
)
def test_damaged_and_newer_manifests_are_refused(
    damage: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    chosen = selection("json", winners=(tried("triton/fwd"),))
    export.write(tmp_path, "json", chosen, {"a": "b"})
    path = tmp_path / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(InvalidInput, match=message):
        export.read(tmp_path)
    with pytest.raises(InvalidInput, match=message):  # it may be anybody's now
        export.write(tmp_path, "json", chosen, {"a": "c"})
    assert (tmp_path / "a").read_text() == "b"
    with pytest.raises(InvalidInput, match="is no export"):
        export.read(tmp_path / "nowhere")


TABLES = ("json", "triton-configs", "kernel-tuner", "cuda-header")


def test_processes_with_other_hash_seeds_write_equal_bytes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tuning.db'}"
    with Database.open(url) as db:
        db.load(H200)
        device = next(iter(db.bests())).device
        for number, (template, name) in enumerate(
            [("triton/fwd", ONE), ("triton/fwd", TWO), ("cuda/fwd_sm80", ONE)]
        ):
            for warps in (4, 8):
                db.add(tried(template, name, 9.0, tunables={"num_warps": warps}, device=device,
                             second=number, resources={"compile_s": 1.5}))  # fmt: skip
    code = (
        "import sys\nfrom autoflash import cli\nfor name in sys.argv[1:]:\n"
        "    try: cli.main(['export', name, '--out', name])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
    )
    made = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, *TABLES], cwd=folder, capture_output=True, text=True,
            check=False, env={**os.environ, "PYTHONHASHSEED": seed, "AUTOFLASH_DATABASE": url,
                              "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")})
    assert made[0] == made[1]
    assert {path.parts[0] for path in made[0]} == set(TABLES)
    assert str(tmp_path).encode() not in b"".join(made[0].values())


# What the command says ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, at in export.TARGETS.items() if find_spec(at)])
def test_a_target_is_what_it_is_listed_as(name: str) -> None:
    found = export.target(name)
    assert found.name == name
    assert found.summary.endswith(".")


@pytest.mark.parametrize("name", export.TARGETS)
def test_a_target_is_in_the_index_of_the_documentation(name: str) -> None:
    index = Path(__file__).parents[2] / "docs" / "exports" / "README.md"
    assert f"[`{name}`]({name}.md)" in index.read_text(encoding="utf-8")


def test_a_target_that_is_none_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="kernel-tuner"):
        export.target("kerneltuner")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `autoflash export` with a database of a winner, a stale one and a trial."""
    url = f"sqlite:///{tmp_path / 'tuning.db'}"
    monkeypatch.setenv("AUTOFLASH_DATABASE", url)
    settings.get.cache_clear()
    with Database.open(url) as db:
        db.set_best(tried("cuda/fwd_sm80", ONE))
        db.set_best(stale(tried("triton/fwd", TWO)))
        db.add(tried("triton/fwd", ONE))

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main(["export", *(str(argument) for argument in arguments)])
        said = capsys.readouterr()
        code = exited.value.code
        return (code if isinstance(code, int) else 0), said.out, said.err

    yield run
    settings.get.cache_clear()


def test_the_command_writes_and_says_what_it_left_out(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, remarks = run("cuda-header", "--out", out)
    assert (code, remarks) == (0, "")
    told = "1 problem, 1 kernel, 0 dispatch tables, tuned on NVIDIA H100 80GB HBM3 (sm90)"
    assert f"cuda-header: {told}" in said
    assert [str(path) for path in out.glob("*.h")] == [said.splitlines()[1].strip()]

    code, said, remarks = run("json", "--out", tmp_path / "json", "--json")
    answer = json.loads(said)
    assert (code, answer["entries"], answer["target"]) == (0, 1, "json")
    assert set(answer["files"]) == set(export.read(tmp_path / "json").files)
    assert "1 left out: triton/fwd has changed since it was tuned" in remarks

    code, _, remarks = run("triton-configs", "--out", tmp_path / "triton")
    assert code == 0
    assert "for 1 of 1 problems no kernel of this target holds the title" in remarks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jsn",), "Did you mean 'json'"),
        (("json", "--device", "nvidia-a100"), "unknown device"),
        (("json", "--head-dim", "128"), "none is of a problem that was asked for"),
        (("json", "--name", "autoflash-export"), "--name autoflash-export"),
        (("json", "--name", "../up"), "--name '../up' will not do"),
        (("json", "--name", ".."), "a letter or digit first"),
        (("triton-configs", "--name", "two words"), "--name 'two words'"),
        (("triton-configs", "--name", "triton"), "would hide the module triton"),
        (("cuda-header", "--name", "a-b"), "make a namespace"),
        (("cuda-header", "--name", "int"), "no word of C++"),
        (("flex", "--op", "fwd"), "--op fwd"),
        (("kernel-tuner", "--name", "some"), "leave it"),
    ],
)
def test_mistakes_are_explained(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    code, said, remarks = run(*arguments, "--out", tmp_path / "out")
    assert (code, said) == (2, "")
    assert message in remarks
    assert not (tmp_path / "out").exists()


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    chosen = selection("cuda-header", pack=H200)
    written(tmp_path, "cuda-header", chosen)
    mine = tmp_path / "more.h"
    mine.write_text("mine")
    again = export.target("cuda-header").files(chosen, export.Options())
    with pytest.raises(InvalidInput, match=r"more\.h, which no export wrote"):
        export.write(tmp_path, "cuda-header", chosen, {**again, "more.h": "ours"})
    assert mine.read_text() == "mine"
    written(tmp_path, "cuda-header", chosen)
    assert mine.read_text() == "mine"


def test_an_export_of_another_form_is_not_replaced(tmp_path: Path) -> None:
    written(tmp_path, "cuda-header", selection("cuda-header", pack=H200))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="holds an export of cuda-header, which one of json"):
        written(tmp_path, "json", selection("json", pack=H200))
    assert sorted(tmp_path.iterdir()) == before
