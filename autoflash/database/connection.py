"""Where a database is, how it is opened, and what its driver's errors mean."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from autoflash.errors import DatabaseCorrupt, DatabaseError

BUSY_TIMEOUT_S = 30.0
"""Longest wait for another process's write; ours take milliseconds, a merge at most seconds."""

_LOCK = int.from_bytes(b"autoflas", "big", signed=True)
"""PostgreSQL's advisory lock of a writer; locks are of one database of the server."""

_SQLITE = re.compile(r"sqlite(?:\+pysqlite)?:(?P<rest>.*)", re.DOTALL)
_PASSWORD = re.compile(r"(?<=://)(?P<user>[^:/@]*):.*@")
_CLOSED = ("readonly database", "unable to open")
_FULL = ("disk is full", "disk i/o error", "no space", "quota")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a database is.

    Attributes:
        shown: for messages: the path, or the URL without its password.
        path: of the SQLite file, absolute; None for one in memory or on a server.
        url: of the server; None for SQLite.
    """

    shown: str
    path: Path | None = None
    url: sa.URL | None = field(default=None, repr=False)


def locate(url: str) -> Place:
    """Read a SQLAlchemy URL, or the bare path of a SQLite file.

    After `sqlite:///` everything is the path, taken literally: a cache directory may well have a
    "%", "?" or "#" in its name, which SQLAlchemy versions read in different ways.

    Raises:
        DatabaseError: it is neither.
    """
    if "://" not in url:
        if not url:
            raise DatabaseError("the database URL is empty; give one such as sqlite:////tmp/a.db.")
        return _file(url)
    if found := _SQLITE.fullmatch(url):
        rest = found["rest"]
        if rest in ("//", "///", "///:memory:"):
            return Place("the database in memory")
        if not rest.startswith("///"):
            raise DatabaseError(
                f"{url}: a SQLite URL has three slashes before a relative path and four before an "
                "absolute one: sqlite:///here.db, sqlite:////tmp/there.db."
            )
        if rest.startswith("///file:") or re.search(r"\?\w+=[^/]*$", rest):
            raise DatabaseError(
                f"{url}: options after the path of a SQLite URL are not supported; give the path "
                "alone. A file that cannot be written is opened for reading by itself."
            )
        return _file(rest[3:])
    shown = _PASSWORD.sub(r"\g<user>:***@", url.partition("?")[0])
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise DatabaseError(
            f"{shown} is not a database URL; one looks like sqlite:////tmp/autoflash.db or "
            "postgresql+psycopg://user:password@host:5432/name."
        ) from None
    # The options of a URL may hold a password too.
    return Place(parsed.set(query={}).render_as_string(hide_password=True), url=parsed)


def _file(text: str) -> Place:
    path = Path(text).expanduser().absolute()
    return Place(str(path), path)


def obstacle(path: Path) -> str:
    """Why this user cannot write or make a SQLite file, "" if nothing stands against it.

    Makes the directory: SQLite does not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"its directory cannot be made ({error})"
    effective = os.access in os.supports_effective_ids
    # The directory too: SQLite puts its journal beside the file.
    for each in (path.parent, path):
        exists = os.path.lexists(each)
        if exists and not os.access(each, os.R_OK | os.W_OK, effective_ids=effective):
            return f"{each} is not writable for this user"
    return ""


def readwrite(path: Path) -> sa.Engine:
    """A SQLite file, made if it does not exist. Writers queue for BUSY_TIMEOUT_S."""
    connection = _sqlite(_uri(path))
    try:
        # With WAL, NORMAL loses nothing when a process is killed and cannot corrupt; a power cut
        # may take the last trials. FULL costs a disk flush per trial for that.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("SELECT 1 FROM sqlite_master").fetchall()
    except BaseException:
        connection.close()
        raise
    return _engine(connection)


def use_wal(engine: sa.Engine) -> None:
    """Readers then never wait for a writer, nor it for them. Only for a file known to be ours."""
    with engine.connect() as outer:
        connection = outer.connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        # Changing the mode needs the file for itself and does not wait for it by itself.
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                # Where the file system has no shared memory the answer is the former mode:
                # slower, still right.
                connection.execute("PRAGMA journal_mode=WAL").fetchone()
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def readonly(path: Path) -> sa.Engine:
    """A SQLite file for reading only; nothing is written, not even beside it."""
    uri = f"{_uri(path)}?mode=ro"
    connection = _sqlite(uri)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchall()
    except sqlite3.Error as error:
        connection.close()
        if not is_unwritable(error):
            raise
        # A file in WAL mode needs its -shm file even to be read. Where that can be neither found
        # nor made nobody can be writing here, which is what `immutable` asserts.
        wal = Path(f"{path}-wal")
        if os.path.isfile(wal) and wal.stat().st_size:  # noqa: PTH113 (never raises)
            return _replayed(path, wal)
        connection = _sqlite(f"{uri}&immutable=1")
    return _engine(connection)


def _replayed(path: Path, wal: Path) -> sa.Engine:
    """In memory, a file with the journal that a killed writer left and `immutable` ignores."""
    with tempfile.TemporaryDirectory(prefix="autoflash-") as directory:
        copy = Path(directory, "copy.db")
        shutil.copyfile(path, copy)
        shutil.copyfile(wal, f"{copy}-wal")
        engine = readwrite(copy)
        try:
            return in_memory(copy_of=engine)
        finally:
            engine.dispose()


def in_memory(copy_of: sa.Engine | None = None) -> sa.Engine:
    """A SQLite database in memory, empty or with the content of another SQLite engine."""
    connection = _sqlite(":memory:")
    if copy_of is not None:
        with copy_of.connect() as source:
            raw = source.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)
            raw.backup(connection)
    return _engine(connection)


def server(place: Place) -> sa.Engine:
    """A database of any other kind.

    Raises:
        DatabaseError: SQLAlchemy does not know it, or its driver is not installed.
    """
    assert place.url is not None
    try:
        engine = sa.create_engine(place.url, pool_pre_ping=True)
        if engine.dialect.name == "postgresql":
            sa.event.listen(engine, "begin", _begin_on_postgresql)
        return engine
    except NoSuchModuleError:
        raise DatabaseError(
            f"{place.shown}: SQLAlchemy knows no database {place.url.drivername!r}; without any "
            "AUTOFLASH_DATABASE, autoflash uses SQLite in the cache directory."
        ) from None
    except ImportError as error:
        raise DatabaseError(
            f"{place.shown}: the driver of this database is not installed ({error}); install it "
            f"with pip install {error.name or 'it'}, or name another in the URL."
        ) from None
    except (SQLAlchemyError, ValueError, TypeError) as error:
        raise DatabaseError(f"{place.shown} cannot be used: {_text(error, place)}.") from None


def _uri(path: Path) -> str:
    return f"file:{quote(os.fsencode(path))}"


def _sqlite(uri: str) -> sqlite3.Connection:
    # isolation_level None: Python then begins no transactions of its own; `_begin` does.
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _engine(connection: sqlite3.Connection) -> sa.Engine:
    """An engine around one connection; Database lets one thread at a time use it."""
    engine = sa.create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: sa.Connection) -> None:
    # A transaction that begins by reading and then writes fails at once if somebody else wrote in
    # between; one that takes the write lock first waits its turn.
    immediate = connection.get_execution_options().get("autoflash_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _begin_on_postgresql(connection: sa.Connection) -> None:
    # Writers come one after the other, as SQLite's do: of several that meet an empty database one
    # makes the tables, and none keeps a winner that another has just replaced by a better one.
    if connection.get_execution_options().get("autoflash_write", False):
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what a driver raises into DatabaseError and its kind, with the next step."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _explain(error, place) from error


def _explain(error: Exception, place: Place) -> DatabaseError:
    text = _text(error, place)
    start = f"{place.shown}: {text}."
    low = text.lower()
    if any(sign in low for sign in ("not a database", "malformed", "encrypted")):
        return DatabaseCorrupt(
            f"{place.shown} is damaged or no database at all ({text}). It was left as it is: save "
            f"what can be read with sqlite3 {place.shown} .recover, move it away to start anew, or "
            "name another database with AUTOFLASH_DATABASE."
        )
    if any(sign in low for sign in ("no such table", "no such column", "has no column")):
        return DatabaseCorrupt(
            f"{start} Something other than autoflash changed its tables. It was left as it is: "
            "move it away to start anew, or name another database with AUTOFLASH_DATABASE."
        )
    if any(sign in low for sign in _CLOSED):
        return DatabaseError(f"{start} {_advice(place)}")
    if any(sign in low for sign in _FULL):
        return DatabaseError(
            f"{start} The disk is full or failing: free some space, or name a database on another "
            "disk with AUTOFLASH_DATABASE. Everything stored before this is kept."
        )
    if "foreign key" in low:
        return DatabaseError(
            f"{start} The row names a run that is not in this database; start_run makes one."
        )
    if "locked" in low or "busy" in low:
        return DatabaseError(
            f"{start} Another process has been writing for more than {BUSY_TIMEOUT_S:.0f} s; wait "
            "for it, or end it if it hangs. Everything stored before this is kept."
        )
    return DatabaseError(
        f"{start} Check AUTOFLASH_DATABASE; without it autoflash uses SQLite in the cache "
        "directory. Everything stored before this is kept."
    )


def _advice(place: Place) -> str:
    return (
        "Make the file and its directory writable for this user, or name another database with "
        "AUTOFLASH_DATABASE."
    )


def refusal(place: Place, reason: str) -> DatabaseError:
    """The error of a write where only reading is possible."""
    return DatabaseError(f"{place.shown} cannot be written: {reason}. {_advice(place)}")


def is_unwritable(error: Exception) -> bool:
    """Whether SQLite means that it cannot write here; reading may still be possible."""
    return any(sign in str(error).lower() for sign in (*_CLOSED, *_FULL))


def _text(error: Exception, place: Place) -> str:
    """What the driver said, on one line and without the password."""
    said = str(getattr(error, "orig", None) or error).strip().splitlines()
    text = said[0].rstrip(".") if said else type(error).__name__
    if place.url is not None:
        options = [value for name, value in place.url.query.items() if "pass" in name.lower()]
        for secret in (place.url.password, *options):
            text = text.replace(str(secret), "***") if secret else text
    return text
