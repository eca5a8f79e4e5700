"""Whether any place a database may be, or not be, is opened or refused as it should be."""

from __future__ import annotations

import io
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

import autoflash
from autoflash import settings
from autoflash.database import Database, connection, migrations, rows, tables
from autoflash.errors import DatabaseCorrupt, DatabaseError, DatabaseNewer
from autoflash.record import Record

Make = Callable[..., Record]
Become = Callable[[], AbstractContextManager[None]]


def sql(path: Path, *statements: str) -> None:
    opened = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        opened.execute(statement)
    opened.close()


# Places -------------------------------------------------------------------------------------------


def test_the_default_is_in_the_cache_directory_in_wal_mode(packs: Path, record: Make) -> None:
    path = settings.get().cache_dir / "autoflash.db"
    with Database.open() as database:
        assert database.writable
        assert database.place == str(path)
        database.add(record())
        assert path.with_name("autoflash.db-wal").exists()
    with sqlite3.connect(path) as opened:
        assert opened.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    opened.close()


@pytest.mark.parametrize(
    "name", ["with space", "ünïcode-核", "100%25", "a?b", "c#d", "q'uote", "-"]
)
def test_any_directory_name_will_do(packs: Path, tmp_path: Path, record: Make, name: str) -> None:
    for url in (f"sqlite:///{tmp_path}/{name}/a.db", f"{tmp_path}/{name}/a.db"):
        with Database.open(url) as database:
            database.add(record())
            assert database.trials() == [record()]
    assert (tmp_path / name / "a.db").is_file()


def test_a_cache_directory_with_any_name_will_do(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOFLASH_CACHE_DIR", str(tmp_path / "50% off? #1"))
    settings.get.cache_clear()
    with Database.open() as database:
        assert database.writable
    assert (tmp_path / "50% off? #1" / "autoflash.db").is_file()


def test_a_relative_path_stays_where_it_was(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Database.open("sqlite:///here.db") as database:
        monkeypatch.chdir("/")
        assert database.place == str(tmp_path / "here.db")
    assert (tmp_path / "here.db").is_file()


def test_in_memory_nothing_is_shared_or_kept(packs: Path, record: Make) -> None:
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite+pysqlite://"):
        with Database.open(url) as database, Database.open(url) as other:
            database.add(record())
            assert database.writable
            assert database.trials() == [record()]
            assert other.trials() == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "empty"),
        ("sqlite://here.db", "three slashes"),
        ("sqlite:///here.db?mode=ro", "options after the path"),
        ("sqlite:///file:here.db", "options after the path"),
        ("oracel://u:secret@h/db?password=secret", "oracel"),
        ("postgresql://u:secret@host:port/db", "not a database URL"),
        ("postgresql+nosuch://u:secret@host/db?sslpassword=secret", "nosuch"),
        ("://u:secret@host", "not a database URL"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(
    packs: Path, url: str, said: str
) -> None:
    with pytest.raises(DatabaseError, match=said) as raised:
        Database.open(url)
    assert "secret" not in str(raised.value)


def test_a_missing_driver_is_named(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(DatabaseError, match="pip install psycopg2") as raised:
        Database.open("postgresql+psycopg2://user:secret@host/name")
    assert "user:***@host/name" in str(raised.value)


def test_what_a_server_says_is_shown_without_the_password() -> None:
    place = connection.locate("postgresql://u:p%40ss@host/db?sslpassword=word")
    refused = sa.exc.OperationalError("select", {}, Exception("no entry for u p@ss word\nmore"))
    expected = pytest.raises(DatabaseError, match=r"no entry for u \*\*\* \*\*\*")
    with expected as raised, connection.explained(place):
        raise refused
    assert "more" not in str(raised.value)


def test_a_directory_is_no_database(packs: Path, tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="is a directory"):
        Database.open(f"sqlite:///{tmp_path}")


# Versions -----------------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_the_migrations_make_the_tables_that_are_used(database: Database) -> None:
    with sa.create_engine(f"sqlite:///{database.place}").connect() as opened:
        differences = compare_metadata(MigrationContext.configure(opened), tables.metadata)
    opened.engine.dispose()
    assert differences == []


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "sqlite"])
def test_the_migrations_make_sense_to_other_databases(dialect: str) -> None:
    buffer = io.StringIO()
    options = {"as_sql": True, "output_buffer": buffer}
    context = MigrationContext.configure(dialect_name=dialect, opts=options)
    for step in migrations.MIGRATIONS:
        step(Operations(context))
    made = {line.split()[2] for line in buffer.getvalue().splitlines() if "CREATE TABLE" in line}
    assert made == set(tables.metadata.tables)
    assert "ADD COLUMN softcap" in buffer.getvalue()


FORMER = Path(__file__).parents[2] / "data" / "database-1.sql"
"""What autoflash 0.1.0 stored with version 1 of the schema, as SQL: a run, trials and winners."""


@pytest.fixture
def former(packs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "former.db"
    opened = sqlite3.connect(path)
    opened.executescript(FORMER.read_text(encoding="utf-8"))
    opened.close()
    return path


def former_records(record: Make) -> list[Record]:
    """The trials of `former`, as this version means them."""
    return [
        record(),
        record(outcome="crash", reason='größer als "erlaubt"'),
        record("b1s1x777h8/2d96x64c-float32-unaligned", 12.5, outcome="predicted"),
    ]


def test_a_database_without_windows_keeps_all_it_holds(former: Path, record: Make) -> None:
    wanted = former_records(record)
    with Database.open(str(former)) as database:
        assert database.summary()["schema"] == len(migrations.MIGRATIONS)
        assert database.trials() == wanted
        assert database.trials(window_left=None, window_right=None, softcap=0.0) == wanted
        # The pack of then is not shipped any more, and its winner goes as packs do.
        assert database.bests() == [record()]
        [run] = database.runs()
        assert (run["status"], run["command"]) == ("done", "autoflash tune --head-dim 128")
        assert database.trials(run=run["id"]) == wanted[:2]
        # What is stored is known under its digest, and new kinds of problems go beside it.
        for each in wanted:
            database.add(each)
        assert len(database.trials()) == 3
        local = record("b4s4096h32/8d128cw1023cap50")
        database.add(local)
        assert database.set_best(local)
        assert not database.set_best(record(latency_us=90.0, outcome="predicted"))
        assert database.trials(softcap=50.0, window_left=1023) == [local]
    opened = sqlite3.connect(former)
    stored = opened.execute("SELECT digest, record FROM trial ORDER BY id").fetchall()
    opened.close()
    texts = [rows.canonical(each.to_dict()) for each in (*wanted, local)]
    assert stored == [(rows.digest(text), text) for text in texts]


def test_a_pack_loaded_by_a_former_version_stays_loaded(
    former: Path, packs: Path, record: Make
) -> None:
    shipped = record("b16s1024h32d64f-float16", 40.0).to_dict()
    for name in ("window_left", "window_right", "softcap"):
        del shipped["problem"][name]  # as that version wrote it
    (packs / "nvidia-h200.jsonl").write_text(rows.canonical(shipped) + "\n")
    before = loaded_at(former)
    with Database.open(str(former)) as database:
        wanted = record("b16s1024h32d64f-float16", 40.0)
        assert database.bests(pack="nvidia-h200.jsonl") == [wanted]
    assert loaded_at(former) == before


def loaded_at(path: Path) -> list[tuple[str, ...]]:
    opened = sqlite3.connect(path)
    found = opened.execute("SELECT name, digest, loaded FROM pack").fetchall()
    opened.close()
    return found


def test_a_former_database_that_is_only_read_or_merged_is_left_alone(
    former: Path, record: Make
) -> None:
    before = former.read_bytes()
    with Database.open("sqlite://") as target:
        assert target.merge(str(former)) == 4  # three trials, and the winner tuned there
        assert target.trials() == former_records(record)
        assert target.merge(str(former)) == 0
        target.add(record())
        assert len(target.trials()) == 3
    assert former.read_bytes() == before


def test_rows_that_were_damaged_before_stay_as_they_are(former: Path, record: Make) -> None:
    sql(
        former,
        "UPDATE trial SET record = '{\"problem\": 3}', digest = 'x' WHERE id = 2",
        "UPDATE trial SET record = 'half a li' WHERE id = 3",
    )
    with Database.open(str(former)) as database:
        with pytest.warns(RuntimeWarning, match="does not parse"):
            assert database.trials() == [record()]
        assert database.skipped == {"trial": 2}
    opened = sqlite3.connect(former)
    kept = opened.execute("SELECT record FROM trial ORDER BY id").fetchall()
    opened.close()
    assert [text for (text,) in kept[1:]] == ['{"problem": 3}', "half a li"]


def next_version(op: Operations) -> None:
    op.add_column("trial", sa.Column("note", sa.Text))
    op.create_index("trial_note", "trial", ["note"])


def next_version_broken(op: Operations) -> None:
    next_version(op)
    op.execute("UPDATE trial SET no_such_column = 1")


def test_a_next_version_keeps_all_rows(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Make
) -> None:
    path = tmp_path / "a.db"
    known = migrations.MIGRATIONS
    with Database.open(str(path)) as database:
        database.add(record())

    monkeypatch.setattr(migrations, "MIGRATIONS", [*known, next_version_broken])
    with pytest.raises(DatabaseCorrupt, match="no_such_column"):
        Database.open(str(path))
    monkeypatch.setattr(migrations, "MIGRATIONS", known)
    with Database.open(str(path)) as database:  # rolled back, index and column too
        assert database.trials() == [record()]

    monkeypatch.setattr(migrations, "MIGRATIONS", [*known, next_version])
    with Database.open(str(path)) as database:
        assert database.summary()["schema"] == len(known) + 1
        assert database.trials() == [record()]
    with Database.open("sqlite://") as target:  # a former schema is read, and not migrated, there
        monkeypatch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, lambda op: None])
        assert target.merge(str(path)) == 1
    assert b"note" in path.read_bytes()


def test_a_newer_database_is_named_with_both_versions_and_left_alone(
    packs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.db"
    Database.open(str(path)).close()
    sql(path, "INSERT INTO autoflash_schema VALUES (9, '7.7.7', '2030')")
    before = path.read_bytes()
    with pytest.raises(DatabaseNewer) as raised:
        Database.open(str(path))
    for part in (str(path), "version 9", "7.7.7", autoflash.__version__, "upgrade"):
        assert part in str(raised.value)
    assert path.read_bytes() == before


def test_alembic_is_imported_only_to_migrate(packs: Path, tmp_path: Path) -> None:
    program = (
        "import sys, autoflash\n"
        "assert 'sqlalchemy' not in sys.modules\n"
        "from autoflash.database import Database\n"
        f"Database.open({str(tmp_path / 'a.db')!r}).close()\n"
        "print('alembic' in sys.modules)"
    )
    said = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [each.stdout.strip() for each in said] == ["True", "False"]


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"hello", b"not a database" * 400, b"\0" * 4096])
def test_a_file_that_is_no_database_is_named_and_kept(
    packs: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DatabaseCorrupt, match=r"notes\.txt.*(move it away|another database)"):
        Database.open(str(path))
    assert path.read_bytes() == content
    assert sorted(each.name for each in tmp_path.iterdir()) == ["notes.txt"]


def test_a_damaged_database_is_named_and_kept(packs: Path, tmp_path: Path, record: Make) -> None:
    path = tmp_path / "a.db"
    with Database.open(str(path)) as database:
        for number in range(200):
            database.add(record(latency_us=1.0 + number))
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    expected = pytest.raises(DatabaseCorrupt, match=r"a\.db is damaged.*recover")
    with expected as raised, Database.open(str(path)) as database:
        database.trials()
    assert "left as it is" in str(raised.value)
    assert path.read_bytes()[8192:] == content[8192:]


def test_a_cut_off_database_is_named_and_kept(packs: Path, tmp_path: Path, record: Make) -> None:
    path = tmp_path / "a.db"
    with Database.open(str(path)) as database:
        for number in range(200):
            database.add(record(latency_us=1.0 + number))
    content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    expected = pytest.raises(DatabaseCorrupt, match=r"a\.db is damaged")
    with expected, Database.open(str(path)) as database:
        database.trials()
    assert path.read_bytes() == content


def test_somebody_elses_database_is_left_alone(packs: Path, tmp_path: Path) -> None:
    path = tmp_path / "music.db"
    sql(path, "CREATE TABLE song (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(DatabaseCorrupt, match=r"music\.db is no autoflash database.*tables song"):
        Database.open(str(path))
    assert path.read_bytes() == before


def test_tables_that_somebody_changed_are_named(packs: Path, tmp_path: Path, record: Make) -> None:
    path = tmp_path / "a.db"
    Database.open(str(path)).close()
    sql(path, "ALTER TABLE trial RENAME COLUMN policy TO rule")
    expected = pytest.raises(DatabaseCorrupt, match=r"policy.*Something other than autoflash")
    with Database.open(str(path)) as database, expected:
        database.add(record())
    sql(path, "DROP TABLE pack")
    with pytest.raises(DatabaseCorrupt, match="no such table: pack"):
        Database.open(str(path))
    sql(path, "DELETE FROM autoflash_schema")
    with pytest.raises(DatabaseCorrupt, match="gives no version"):
        Database.open(str(path))


def test_an_empty_file_becomes_a_database(packs: Path, tmp_path: Path, record: Make) -> None:
    (tmp_path / "a.db").touch()
    with Database.open(str(tmp_path / "a.db")) as database:
        database.add(record())
        assert database.trials() == [record()]


@pytest.mark.sqlite
def test_a_full_disk_loses_nothing_that_was_stored(database: Database, record: Make) -> None:
    database.add(record())
    with database._store.opened.engine.connect() as opened:
        opened.exec_driver_sql("PRAGMA max_page_count=1")  # SQLite then lets it grow no more

    def fill() -> None:
        for number in range(500):
            database.add(record(latency_us=1.0 + number, reason="x" * 2000))

    with pytest.raises(DatabaseError, match=r"full.*free some space.*is kept"):
        fill()
    stored = database.trials()
    assert stored[0] == record()
    with database._store.opened.engine.connect() as opened:
        opened.exec_driver_sql("PRAGMA max_page_count=100000")
    database.add(record(latency_us=2000.0))
    assert len(database.trials()) == len(stored) + 1


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.sqlite
def test_a_full_disk_keeps_nobody_from_reading(
    packs: Path, url: str, record: Make, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        with Database.open(url) as database:
            database.add(record())
    connect = connection._sqlite

    def full(uri: str) -> sqlite3.Connection:
        opened = connect(uri)
        if uri != ":memory:":
            opened.execute("PRAGMA max_page_count=1")
        return opened

    # Without the pack's row the database has room; a reason of 40 pages has not.
    (packs / "one.jsonl").write_text(rows.canonical(record(reason="x" * 163840).to_dict()))
    monkeypatch.setattr(connection, "_sqlite", full)
    with pytest.warns(RuntimeWarning, match="nothing can be stored now.*full") as warned:
        opened = Database.open(url)
    assert len(warned) == 1
    with opened:
        assert opened.obstacle == "database or disk is full"
        refuses_to_write(opened, record(latency_us=1.0))
        assert len(opened.bests(arch="sm90")) == 1
        assert opened.trials() == ([record()] if exists else [])


# Reading only -------------------------------------------------------------------------------------


def refuses_to_write(database: Database, record: Record) -> None:
    assert not database.writable
    for write in (
        lambda: database.add(record),
        lambda: database.set_best(record),
        lambda: database.prune({"triton/fwd": "d1"}),
        lambda: database.merge("sqlite:///none.db"),
    ):
        with pytest.raises(DatabaseError, match=r"cannot be written.*AUTOFLASH_DATABASE"):
            write()


@pytest.mark.parametrize("closed", ["file", "directory", "both"])
def test_what_cannot_be_written_is_read(
    packs: Path, open_place: Path, unprivileged: Become, record: Make, closed: str
) -> None:
    path = open_place / "a.db"
    with Database.open(str(path)) as database:
        database.set_best(record())
        database.add(record())
    path.chmod(0o666 if closed == "directory" else 0o444)
    open_place.chmod(0o777 if closed == "file" else 0o555)
    before = path.read_bytes()
    with unprivileged(), Database.open(str(path)) as database:  # a warning would be an error
        assert database.bests(arch="sm90") == [record()]
        assert database.trials() == [record()]
        assert "not writable" in database.obstacle
        refuses_to_write(database, record(latency_us=1.0))
    assert path.read_bytes() == before


@pytest.mark.parametrize("left", [("-wal", "-shm"), ("-wal",)])
def test_what_a_killed_writer_left_is_read_too(
    packs: Path, open_place: Path, unprivileged: Become, record: Make, left: tuple[str, ...]
) -> None:
    live = open_place / "live.db"
    copy = open_place / "copy.db"
    with Database.open(str(live)) as database:
        database.add(record())
        for end in ("", *left):
            shutil.copy(f"{live}{end}", f"{copy}{end}")
    for path in open_place.iterdir():
        path.chmod(0o444)
    open_place.chmod(0o555)
    with unprivileged(), Database.open(str(copy)) as database:
        assert not database.writable
        assert database.trials() == [record()]


def test_changed_packs_and_former_schemas_are_served_without_writing(
    packs: Path,
    open_place: Path,
    unprivileged: Become,
    monkeypatch: pytest.MonkeyPatch,
    record: Make,
) -> None:
    path = open_place / "a.db"
    with Database.open(str(path)) as database:
        database.set_best(record())
        database.dump(open_place / "pack.jsonl")
    path.chmod(0o444)
    open_place.chmod(0o555)
    before = path.read_bytes()
    known = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", [*known, next_version])
    shipped = record("b1s1h1d64f")
    (packs / "one.jsonl").write_text(rows.canonical(shipped.to_dict()))
    with unprivileged(), Database.open(str(path)) as database:
        assert database.summary()["schema"] == len(known) + 1
        assert {each.problem for each in database.bests()} == {shipped.problem, record().problem}
        refuses_to_write(database, record(latency_us=1.0))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["below a file", "closed directory", "empty file"])
def test_where_no_database_can_be_made_the_packs_are_served(
    packs: Path, open_place: Path, unprivileged: Become, record: Make, kind: str
) -> None:
    (packs / "one.jsonl").write_text(rows.canonical(record().to_dict()))
    (open_place / "file").touch(mode=0o444)
    open_place.chmod(0o555)
    path = {
        "below a file": open_place / "file" / "a.db",
        "closed directory": open_place / "made" / "a.db",
        "empty file": open_place / "file",
    }[kind]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with unprivileged(), Database.open(str(path)) as database:
            assert database.bests(arch="sm90") == [record()]
            refuses_to_write(database, record(latency_us=1.0))
    said = [str(each.message) for each in warned]
    if kind == "empty file":
        assert said == []
    else:
        assert len(said) == 1
        assert str(path) in said[0]
        assert "AUTOFLASH_CACHE_DIR" in said[0]
    assert [each.name for each in open_place.iterdir()] == ["file"]


def test_a_file_that_may_not_even_be_read_is_an_error(
    packs: Path, open_place: Path, unprivileged: Become
) -> None:
    path = open_place / "a.db"
    Database.open(str(path)).close()
    path.chmod(0)
    with unprivileged(), pytest.raises(DatabaseError, match=r"a\.db.*Make the file"):
        Database.open(str(path))


def test_packs_that_cannot_be_read_leave_the_loaded_ones(
    packs: Path, open_place: Path, unprivileged: Become, record: Make
) -> None:
    path = open_place / "a.db"
    (packs / "one.jsonl").write_text(rows.canonical(record().to_dict()))
    Database.open(str(path)).close()
    (packs / "two.jsonl").touch(mode=0)
    with unprivileged(), pytest.warns(RuntimeWarning, match="two.jsonl.*those loaded before stay"):
        opened = Database.open(str(path))
    with opened:
        assert opened.bests() == [record()]
