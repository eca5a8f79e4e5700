"""Whether text becomes records and records text: packs, dump, load, merge, prune."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autoflash.config import Config
from autoflash.database import Database, merge, rows, store
from autoflash.device import KNOWN_GPUS
from autoflash.errors import DatabaseCorrupt, DatabaseError, InvalidInput
from autoflash.problem import Problem
from autoflash.record import Record

Make = Callable[..., Record]
CURRENT = {"triton/fwd": "d1", "cpp/fwd": "c1"}
EARLIER, LATER = "2026-11-20T10:00:00+00:00", "2026-11-22T10:00:00+00:00"


def write(path: Path, *records: Record) -> None:
    path.write_text("".join(rows.canonical(each.to_dict()) + "\n" for each in records))


# Packs --------------------------------------------------------------------------------------------


def test_a_pack_is_loaded_once_per_content(
    packs: Path, url: str, record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoflash.database import packs as module

    loads = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda *args: loads.append(1) or load(*args))
    write(packs / "nvidia.jsonl", record(), record("b1s1h1d64f"))
    for _ in range(3):
        with Database.open(url) as database:
            assert len(database.bests(pack="nvidia.jsonl")) == 2
    assert len(loads) == 1
    write(packs / "nvidia.jsonl", record(latency_us=50.0))
    with Database.open(url) as database:
        assert database.bests() == [record(latency_us=50.0)]
    (packs / "nvidia.jsonl").unlink()
    with Database.open(url) as database:
        assert database.bests() == []
    assert len(loads) == 3


def test_what_was_tuned_here_stands_above_packs_and_survives_their_change(
    packs: Path, url: str, record: Make
) -> None:
    shipped = record(created=LATER, latency_us=90.0)
    write(packs / "nvidia.jsonl", shipped)
    mine = record(latency_us=95.0, created=EARLIER)
    with Database.open(url, digests=CURRENT) as database:
        assert database.set_best(mine)
    write(packs / "nvidia.jsonl", shipped, record("b1s1h1d64f"))
    with Database.open(url, digests=CURRENT) as database:
        assert database.bests() == [record("b1s1h1d64f"), mine]


@pytest.mark.parametrize(
    ("mine", "digests"),
    [
        ({"outcome": "predicted", "created": LATER}, CURRENT),
        ({"template_digest": "d0", "created": LATER}, CURRENT),
    ],
)
def test_a_measured_row_of_a_pack_replaces_what_is_worth_less(
    packs: Path, url: str, record: Make, mine: dict[str, object], digests: dict[str, str]
) -> None:
    with Database.open(url, digests=digests) as database:
        assert database.set_best(record(**mine))
    write(packs / "nvidia.jsonl", record())
    with Database.open(url, digests=digests) as database:
        assert database.bests() == [record()]


def test_of_two_packs_with_one_problem_the_measured_and_newer_row_wins(
    packs: Path, url: str, record: Make
) -> None:
    write(packs / "a.jsonl", record(created=LATER), record("b1s1h1d64f"))
    write(packs / "b.jsonl", record(), record("b1s1h1d64f", outcome="predicted", created=LATER))
    with Database.open(url, digests=CURRENT) as database:
        assert database.bests() == [record("b1s1h1d64f"), record(created=LATER)]
        assert database.bests(pack="b.jsonl") == []


def test_a_bad_line_of_a_pack_is_named_and_the_others_are_served(
    packs: Path, url: str, record: Make
) -> None:
    lines = [
        rows.canonical(record().to_dict()).encode(),
        b"",
        b"{not json",
        b"\xff\xfe",
        b'{"problem": {"batch": 1}}',
        rows.canonical(record("b1s1h1d64f", outcome="timeout").to_dict()).encode(),
        b"[1, 2]",
        rows.canonical({**record().to_dict(), "from_the_future": 1}).encode(),
        rows.canonical(record("b1s2h1d64f").to_dict()).replace("100.0", "NaN").encode(),
        rows.canonical(record(f"b{1 << 63}s2h1d64f").to_dict()).encode(),
        rows.canonical(record().to_dict()).replace("100.0", "1e400").encode(),
        b"[" * 100_000,
    ]
    (packs / "nvidia.jsonl").write_bytes(b"\n".join(lines))
    with pytest.warns(RuntimeWarning) as warned:
        opened = Database.open(url)
    [warning] = warned
    said = str(warning.message)
    assert said.startswith("10 lines of packs are left out")
    for place in ("nvidia.jsonl:3: ", "nvidia.jsonl:6: outcome 'timeout'", "and 5 more"):
        assert place in said
    with opened:
        assert opened.bests() == [record()]
    Database.open(url).close()  # and not a second time


def test_in_memory_the_packs_are_there(packs: Path, record: Make) -> None:
    write(packs / "nvidia.jsonl", record())
    with Database.open("sqlite://") as database:
        assert database.bests(arch="sm90") == [record()]


SHIPPED = Path(__file__).parents[3] / "tuning_db"


def test_packs_are_what_dump_writes(packs: Path, tmp_path: Path, record: Make) -> None:
    write(tmp_path / "made.jsonl", record("b1s64h8d64f"), record("b1s128h8d64f"), record())
    for path in (tmp_path / "made.jsonl", *sorted(SHIPPED.glob("*.jsonl"))):
        with Database.open("sqlite://") as database:
            assert database.load(path) == len(path.read_bytes().splitlines()), path.name
            database.dump(tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes(), path.name


def test_the_readme_of_packs_names_every_key(record: Make) -> None:
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for key in record().to_dict():
        assert f"`{key}`" in text


def test_a_dump_may_go_into_a_pipe(packs: Path, record: Make) -> None:
    # Such a name leads nowhere: the target of the link is "pipe:[12345]".
    read, write_to = os.pipe()
    with Database.open("sqlite://") as database, os.fdopen(read, "rb") as out:
        database.set_best(record())
        database.dump(Path(f"/dev/fd/{write_to}"))
        os.close(write_to)
        assert Record.from_dict(json.loads(out.read())) == record()


# Dump and load ------------------------------------------------------------------------------------


def test_a_dump_does_not_depend_on_the_order_in_which_records_came(
    packs: Path, tmp_path: Path, record: Make
) -> None:
    records = [
        record(f"b{batch}s{seqlen}h8d{dim}{mask}-{dtype}", config=Config.of("triton/fwd", values))
        for batch, seqlen, dim, mask, dtype in itertools.product(
            (1, 16), (512, 4096), (64, 128), "cf", ("float16", "bfloat16")
        )
        for values in ({"block_m": 64, "é": 1}, {"é": 1, "block_m": 64})
    ]
    contents = []
    for seed in range(3):
        random.Random(seed).shuffle(records)
        with Database.open("sqlite://") as database:
            for each in records:
                database.set_best(each)
                database.add(each)
            assert database.dump(tmp_path / f"best-{seed}") == 32
            assert database.dump(tmp_path / f"trial-{seed}", trials=True) == 32
        best = (tmp_path / f"best-{seed}").read_bytes()
        assert best == (tmp_path / f"trial-{seed}").read_bytes()
        contents.append(best)
    assert len(set(contents)) == 1
    problems = [Problem.from_dict(json.loads(line)["problem"]) for line in best.splitlines()]
    assert [p.dtype for p in problems] == ["bfloat16"] * 16 + ["float16"] * 16
    # Numbers, not text: 64 before 128, 512 before 4096.
    assert [(p.head_dim, p.causal, p.seqlen_q, p.batch) for p in problems[:16]] == list(
        itertools.product((64, 128), (False, True), (512, 4096), (1, 16))
    )


def test_lines_of_before_there_were_windows_are_read(tmp_path: Path, record: Make) -> None:
    wanted = [record("b1s64h8d64f"), record()]
    lines = [each.to_dict() for each in wanted]
    for line in lines:
        for name in ("window_left", "window_right", "softcap"):
            assert not line["problem"].pop(name)
    path = tmp_path / "former.jsonl"
    path.write_text("".join(rows.canonical(line) + "\n" for line in lines))
    with Database.open("sqlite://") as database:
        assert database.load(path, trials=True) == 2
        assert database.trials() == wanted
        database.add(wanted[0])
        assert len(database.trials()) == 2  # it is the same
        assert database.load(path) == 2
        assert database.bests(softcap=0.0) == wanted
        assert database.dump(tmp_path / "now.jsonl") == 2
    assert '"window_left":null' in (tmp_path / "now.jsonl").read_text().splitlines()[0]


def test_windows_and_caps_lie_together_in_a_dump(tmp_path: Path, record: Make) -> None:
    names = ("b1s64h1d64f", "b1s4096h1d64f", "b1s64h1d64fw7x7", "b1s4096h1d64fw7x7",
             "b1s64h1d64fw7x7cap5", "b1s64h1d64c", "b1s64h1d64ccap5", "b1s64h1d64cw9")  # fmt: skip
    with Database.open("sqlite://") as database:
        for name in sorted(names):
            database.set_best(record(name))
        database.dump(tmp_path / "all.jsonl")
        again = tmp_path / "again.jsonl"
        with Database.open("sqlite://") as other:
            assert other.load(tmp_path / "all.jsonl") == len(names)
            other.dump(again)
    assert again.read_bytes() == (tmp_path / "all.jsonl").read_bytes()
    found = [rows.parse(line).problem for line in again.read_text().splitlines()]
    kinds = [(p.causal, p.local, p.softcap) for p in found]
    assert kinds == sorted(kinds)
    assert found[0].seqlen_q < found[1].seqlen_q


def test_a_dump_is_read_back(database: Database, tmp_path: Path, record: Make) -> None:
    a100 = record(device=KNOWN_GPUS["sm80"])
    for each in (record(), a100, record("b1s1h1d64f", reason="größer")):
        database.set_best(each)
    database.add(record(outcome="crash"))
    assert database.dump(tmp_path / "all.jsonl") == 3
    assert database.dump(str(tmp_path / "one.jsonl"), device_key=a100.device.key) == 1
    assert database.dump(tmp_path / "trials.jsonl", trials=True) == 1
    assert "größer" in (tmp_path / "all.jsonl").read_text(encoding="utf-8")
    with Database.open("sqlite://", digests=CURRENT) as other:
        assert other.load(tmp_path / "one.jsonl") == 1
        assert other.bests() == [a100]
        assert other.load(tmp_path / "all.jsonl") == 2  # the third is there
        assert other.bests() == database.bests()
        assert other.load(tmp_path / "trials.jsonl", trials=True) == 1
        assert other.load(tmp_path / "trials.jsonl", trials=True) == 0
        assert other.trials() == database.trials()


def test_loading_an_older_winner_changes_nothing(
    database: Database, tmp_path: Path, record: Make
) -> None:
    database.set_best(record())
    write(tmp_path / "old.jsonl", record(created=EARLIER, latency_us=1.0))
    assert database.load(tmp_path / "old.jsonl") == 0
    assert database.bests() == [record()]


def test_bad_lines_of_a_dump_are_named(database: Database, tmp_path: Path, record: Make) -> None:
    path = tmp_path / "some.jsonl"
    write(path, record())
    path.write_bytes(b"{}\n" + path.read_bytes() + b"{\n")
    with pytest.warns(RuntimeWarning, match=r"2 lines.*some.jsonl:1: it lacks.*some.jsonl:3: "):
        assert database.load(path) == 1
    assert database.bests() == [record()]


def test_a_file_that_is_no_dump_is_refused(
    database: Database, tmp_path: Path, record: Make
) -> None:
    (tmp_path / "notes.txt").write_text("buy milk\n")
    with pytest.raises(DatabaseCorrupt, match=r"not a dump of autoflash: .*notes.txt:1: "):
        database.load(tmp_path / "notes.txt")
    with pytest.raises(InvalidInput, match=r"none.jsonl cannot be read \(No such file"):
        database.load(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match=r"cannot be read \(Is a directory"):
        database.load(tmp_path)


def test_trials_are_not_taken_for_winners(database: Database, tmp_path: Path, record: Make) -> None:
    path = tmp_path / "trials.jsonl"
    write(path, record(), record(latency_us=500.0))
    with pytest.raises(InvalidInput, match=r"two records for one device.*Nothing was loaded"):
        database.load(path)
    write(path, record(outcome="crash"))
    with pytest.raises(InvalidInput, match="'crash' cannot be a winner"):
        database.load(path)
    assert database.bests() == []


def test_a_dump_that_cannot_be_written_leaves_the_former_one(
    database: Database, tmp_path: Path, record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("former")
    database.set_best(record())

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DatabaseError, match=r"a.jsonl cannot be written \(No space"):
            database.dump(path)
    assert path.read_text() == "former"
    assert [each.name for each in tmp_path.glob("*.jsonl*")] == ["a.jsonl"]
    assert not list(tmp_path.glob(".a.jsonl*"))
    with pytest.raises(DatabaseError, match="cannot be written"):
        database.dump(tmp_path / "none" / "a.jsonl")


def test_a_dump_to_a_device_does_not_replace_it(database: Database, tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    assert database.dump(link) == 0
    assert Path("/dev/null").is_char_device()


# Merge and prune ----------------------------------------------------------------------------------


def test_merging_twice_is_merging_once(
    database: Database, packs: Path, tmp_path: Path, record: Make
) -> None:
    write(packs / "nvidia.jsonl", record("b7s7h7d64f"))
    other_path = tmp_path / "other.db"
    with Database.open(str(other_path), digests=CURRENT) as other:
        run = other.start_run(
            command="tune",
            device=KNOWN_GPUS["sm80"],
            environment={"torch": "2.11"},
            seed=1,
            budget={},
        )
        other.finish_run(run, "done")
        other.add(record(device=KNOWN_GPUS["sm80"]), run=run)
        other.add(record())
        other.add(record(outcome="timeout"))
        other.set_best(record(created=LATER))
        other.set_best(record("b1s1h1d64f", created=EARLIER))
        theirs = other.runs()
        before = other_path.read_bytes()
        wal = other_path.with_name("other.db-wal").read_bytes()

        mine = database.start_run(
            command="mine", device=KNOWN_GPUS["sm90"], environment={}, seed=2, budget={}
        )
        database.add(record(), run=mine)
        database.set_best(record())
        database.set_best(record("b1s1h1d64f"))
        assert database.merge(f"sqlite:///{other_path}") == 3  # two trials, one winner
        assert database.merge(str(other_path)) == 0
        assert other_path.read_bytes() == before
        assert other_path.with_name("other.db-wal").read_bytes() == wal
    assert database.bests() == [record("b1s1h1d64f"), record(created=LATER)]
    assert len(database.trials()) == 3
    runs = database.runs()
    assert [row["command"] for row in runs] == ["mine", "tune"]
    assert {**runs[1], "id": 0} == {**theirs[0], "id": 0}
    assert database.trials(run=runs[1]["id"]) == [record(device=KNOWN_GPUS["sm80"])]


def test_many_trials_are_merged(
    database: Database, tmp_path: Path, record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK", 50)
    monkeypatch.setattr(merge, "CHUNK", 50)
    path = tmp_path / "many.jsonl"
    write(path, *(record(latency_us=1.0 + number) for number in range(220)))
    with Database.open(str(tmp_path / "other.db")) as other:
        assert other.load(path, trials=True) == 220
        assert database.merge(str(tmp_path / "other.db")) == 220
        assert database.trials() == other.trials()


@pytest.mark.sqlite
def test_what_cannot_be_merged_is_named(database: Database, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no database .*none.db to merge"):
        database.merge(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "link.db").symlink_to(database.place)
    for url in (database.place, str(tmp_path / "link.db")):
        with pytest.raises(InvalidInput, match="into itself"):
            database.merge(url)
    (tmp_path / "bad.db").write_bytes(b"x" * 5000)
    with pytest.raises(DatabaseCorrupt, match=r"bad\.db"):
        database.merge(str(tmp_path / "bad.db"))


def test_prune_takes_away_what_is_of_former_templates(packs: Path, url: str, record: Make) -> None:
    shipped = record(latency_us=90.0, created=EARLIER)
    write(packs / "nvidia.jsonl", shipped)
    gone = Config.of("triton/gone", {})
    with Database.open(url, digests={"triton/fwd": "d0", "triton/gone": "d1"}) as database:
        for each in (
            record(template_digest="d0"),
            record("b1s1h1d64f", config=gone),
            record("b1s2h1d64f"),
        ):
            database.add(each)
            database.set_best(each)
        assert len(database.bests(pack=None)) == 3
        assert database.prune(CURRENT) == 4
        assert database.trials() == [record("b1s2h1d64f")]
        # The winner of the former template stood before the one that was shipped.
        assert database.bests() == [record("b1s2h1d64f"), shipped]
        assert database.prune(CURRENT) == 0
        with pytest.raises(InvalidInput, match="every record"):
            database.prune({})


# The line format ----------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
NUMBER = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(TEXT, st.none() | st.booleans() | NUMBER | TEXT)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(reason=TEXT, resources=JSON, environment=JSON)
def test_a_line_says_everything_once(
    record: Make, reason: str, resources: dict[str, object], environment: dict[str, object]
) -> None:
    stored = record(reason=reason, resources=resources, environment=environment)
    line = rows.canonical(stored.to_dict())
    assert "\n" not in line
    assert rows.parse(line.encode()) == stored
    assert rows.canonical(rows.parse(line).to_dict()) == line
    backwards = dict(reversed(stored.to_dict().items()))
    assert rows.canonical(backwards) == line


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_line_is_a_value_error_or_can_be_stored(
    record: Make, data: st.DataObject
) -> None:
    content = bytearray(rows.canonical(record().to_dict()).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    try:
        parsed = rows.parse(bytes(content))
    except ValueError:
        return  # nothing else may come out
    assert rows.parse(rows.best_row(parsed)["record"]) == parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21T10:00:00+00:00", "2026-11-21T10:00:00+00:00"),
        ("2026-11-21T10:00:00Z", "2026-11-21T10:00:00+00:00"),
        ("2026-11-21T12:30:00+02:30", "2026-11-21T10:00:00+00:00"),
        ("2026-11-21T10:00:00", "2026-11-21T10:00:00+00:00"),
        ("", ""),
    ],
)
def test_moments_are_compared_in_utc(text: str, expected: str) -> None:
    assert rows.utc(text) == expected
