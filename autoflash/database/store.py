"""How one opened database is read and written: transactions, and rows that do not parse."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from autoflash.database import generalised, rows
from autoflash.database.connection import explained, refusal
from autoflash.database.opening import Opened, copied_to_memory
from autoflash.database.tables import dispatch
from autoflash.dispatch_table import DispatchTable
from autoflash.errors import DatabaseError, UnknownName
from autoflash.record import Record

T = TypeVar("T")
Filter = str | float | None
"""What a column may be asked to equal."""

CHUNK = 1000
"""Rows per transaction of a merge: others may write in between, and a kill loses few."""

_NO_FILTER = frozenset({"id", "digest", "record"})


class Store:
    """An opened database. One thread at a time uses it; each waits for the others.

    Attributes:
        opened: where it is, the way to it, and what stands against writing.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._lock = threading.RLock()
        self._bad: dict[str, set[Any]] = {}

    def close(self) -> None:
        """Close the connection."""
        self.opened.engine.dispose()

    def move_to_memory(self, obstacle: str = "") -> None:
        """Go on with a copy in memory, which `write(..., force=True)` may change."""
        self.opened = copied_to_memory(self.opened, obstacle)

    @property
    def skipped(self) -> Counter[str]:
        """Table -> rows met so far that do not parse."""
        return Counter({table: len(keys) for table, keys in self._bad.items()})

    def refusal(self) -> DatabaseError:
        """The error of a write where only reading is possible."""
        return refusal(self.opened.place, self.opened.obstacle)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection; what its driver raises comes out as a DatabaseError."""
        engine = self.opened.engine
        with self._lock, explained(self.opened.place), engine.connect() as connection:
            yield connection

    def write(self, work: Callable[[sa.Connection], T], *, force: bool = False) -> T:
        """Do `work` in one write transaction; `force` is for filling a database in memory.

        Raises:
            DatabaseError: it cannot be written, or the disk is full; nothing of `work` is stored.
        """
        if self.opened.obstacle and not force:
            raise self.refusal()
        engine = self.opened.engine.execution_options(autoflash_write=True)
        with self._lock, explained(self.opened.place):
            try:
                with engine.begin() as connection:
                    return work(connection)
            except IntegrityError:
                # On a server two writers may look for a row, find none and both insert it; the
                # second attempt finds it. SQLite's writers come one after the other.
                with engine.begin() as connection:
                    return work(connection)

    def write_in_chunks(
        self, entries: Iterable[T], put: Callable[[sa.Connection, Sequence[T]], int]
    ) -> int:
        """`put` the entries, CHUNK per transaction; returns the sum of what it returned."""
        source = iter(entries)
        stored = 0
        while chunk := list(islice(source, CHUNK)):
            stored += self.write(partial(_swapped, put, chunk))
        return stored

    def select(
        self,
        table: sa.Table,
        named: Mapping[str, str | None],
        columns: Mapping[str, Filter],
        *order: sa.Column[Any],
    ) -> list[Record]:
        """The records of the rows that agree with `named`, None apart, and with `columns`.

        Raises:
            UnknownName: one of `columns` is no column to select by.
        """
        known = [column.name for column in table.c if column.name not in _NO_FILTER]
        for name in columns:
            if name not in known:
                raise UnknownName.of(f"column of table {table.name}", name, known)
        wanted = {k: v for k, v in named.items() if v is not None} | dict(columns)
        query = sa.select(*order, table.c.record).order_by(*order)
        query = query.where(*(table.c[name] == value for name, value in wanted.items()))
        with self.reading() as connection:
            found = connection.execute(query).all()
        return [record for *key, text in found for record in self.parsed(table, tuple(key), text)]

    def dispatch_tables(self, *conditions: sa.ColumnElement[bool]) -> list[DispatchTable]:
        """The dispatch tables of the rows of which all this holds, by family and device."""
        order = (dispatch.c.family, dispatch.c.device_key)
        query = sa.select(*order, dispatch.c.content).where(*conditions).order_by(*order)
        with self.reading() as connection:
            found = connection.execute(query).all()
        return [
            table
            for family, device_key, text in found
            for table in self._valid(dispatch, (family, device_key), text, generalised.parse)
        ]

    def parsed(self, table: sa.Table, key: Any, text: str) -> list[Record]:
        """The record of a row; or nothing, and one warning per table."""
        return self._valid(table, key, text, rows.parse)

    def _valid(self, table: sa.Table, key: Any, text: str, parse: Callable[[str], T]) -> list[T]:
        try:
            return [parse(text)]
        except ValueError as error:
            bad = self._bad.setdefault(table.name, set())
            if not bad:
                warn(
                    f"{self.opened.place.shown}: row {key} of table {table.name} does not parse "
                    f"({error}); it, and any other such row, is left out."
                )
            bad.add(key)
            return []


def _swapped(
    put: Callable[[sa.Connection, Sequence[T]], int], chunk: Sequence[T], connection: sa.Connection
) -> int:
    return put(connection, chunk)


def warn(message: str) -> None:
    """One RuntimeWarning."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
