"""How a URL becomes a database that can be read at least, and what stands against writing."""

from __future__ import annotations

import os
import sqlite3
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from autoflash.database import connection, migrations
from autoflash.database.connection import Place, explained
from autoflash.errors import DatabaseError, InvalidInput


@dataclass(frozen=True, slots=True)
class Opened:
    """A database that answers.

    Attributes:
        place: where it is.
        engine: the way to it.
        obstacle: why nothing can be stored; "" if it can.
        is_current: whether its schema is the newest.
    """

    place: Place
    engine: sa.Engine
    obstacle: str
    is_current: bool


def open_url(url: str) -> Opened:
    """Open a database, or one in memory where there is none and none can be made.

    It is not changed before it is known to be ours.
    """
    place = connection.locate(url)
    if place.path is None:
        engine = connection.server(place) if place.url is not None else connection.in_memory()
        return _checked(place, engine, "")
    if os.path.isdir(place.path):  # noqa: PTH112 (Path.is_dir raises where a parent is closed)
        raise DatabaseError(f"{place.shown} is a directory; name a file in it.")
    obstacle = connection.obstacle(place.path)
    with explained(place):
        if not obstacle:
            try:
                engine = connection.readwrite(place.path)
            except sqlite3.OperationalError as error:
                if not connection.is_unwritable(error):
                    raise
                obstacle = str(error)
            else:
                return _checked(place, engine, "")
        if os.path.isfile(place.path):  # noqa: PTH113 (as above)
            return _checked(place, connection.readonly(place.path), obstacle)
    warnings.warn(
        f"there is no tuning database {place.shown} and none can be made: {obstacle}. The records "
        "shipped with autoflash are used, and nothing can be stored. Set AUTOFLASH_CACHE_DIR or "
        "AUTOFLASH_DATABASE to a place that this user may write.",
        RuntimeWarning,
        stacklevel=4,
    )
    return _checked(place, connection.in_memory(), obstacle)


def open_source(url: str, target: Place) -> Opened:
    """Open another database to take over what it holds; it is left as it is.

    Raises:
        InvalidInput: there is none, or it is `target` itself.
    """
    place = connection.locate(url)
    if place.url is not None:
        if place.url == target.url:
            raise InvalidInput(f"{place.shown} cannot be merged into itself.")
        opened = _checked(place, connection.server(place), "only read")
        if not opened.is_current:
            raise DatabaseError(
                f"{place.shown} has the schema of a former autoflash; open it once with this one, "
                "as by AUTOFLASH_DATABASE=... autoflash show, before it is merged."
            )
        return opened
    path = place.path
    if path is None or not os.path.isfile(path):  # noqa: PTH113 (as above)
        raise InvalidInput(f"there is no database {place.shown} to merge; give its path or URL.")
    if target.path is not None and _same(path, target.path):
        raise InvalidInput(f"{place.shown} cannot be merged into itself.")
    with explained(place):
        opened = _checked(place, connection.readonly(path), "only read")
    return opened if opened.is_current else _migrated(copied_to_memory(opened))


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def copied_to_memory(opened: Opened, obstacle: str = "") -> Opened:
    """The same content in memory, where it can be migrated and filled with packs.

    Args:
        opened: a SQLite database; closed.
        obstacle: why it cannot be written; "" is the one known.
    """
    with explained(opened.place):
        engine = connection.in_memory(copy_of=opened.engine)
    opened.engine.dispose()
    return replace(opened, engine=engine, obstacle=obstacle or opened.obstacle)


def _migrated(opened: Opened) -> Opened:
    with explained(opened.place), opened.engine.begin() as write:
        migrations.migrate(write, opened.place.shown)
    return replace(opened, is_current=True)


def _checked(place: Place, engine: sa.Engine, obstacle: str) -> Opened:
    """Ask the version; the engine is closed if it is not one that we can use."""
    try:
        with explained(place), engine.connect() as read:
            version = migrations.version(read, place.shown)
    except BaseException:
        engine.dispose()
        raise
    return Opened(place, engine, obstacle, version == len(migrations.MIGRATIONS))
