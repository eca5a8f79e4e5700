"""Ledger: puts trials and winners into the database, and keeps them while it cannot be written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autoflash.errors import DatabaseError
from autoflash.record import Record

if TYPE_CHECKING:
    from autoflash.database import Database


class _Entry(NamedTuple):
    record: Record
    run: int | None
    winner: bool


class Ledger:
    """What a run has to store, in order.

    A disk that is full, or another process that holds the database for long, does not end a run:
    what cannot be stored waits in memory and is tried again with each record that follows.

    Attributes:
        trouble: why the last record could not be stored; "" if it was.
    """

    def __init__(self, database: Database) -> None:
        self.trouble = ""
        self._database = database
        self._waiting: list[_Entry] = []

    def trial(self, record: Record, run: int | None) -> None:
        """Store a trial of a run, at once if that is possible."""
        self._waiting.append(_Entry(record, run, winner=False))
        self._flush()

    def winner(self, record: Record) -> None:
        """Store a winner, likewise."""
        self._waiting.append(_Entry(record, None, winner=True))
        self._flush()

    def close(self) -> None:
        """Store what waits, or write it to a file.

        Raises:
            DatabaseError: not everything could be stored; the message says where it is now.
        """
        error = self._flush()
        if error is None:
            return
        trials = [entry.record for entry in self._waiting if not entry.winner]
        winners = len(self._waiting) - len(trials)
        try:
            where = f"The trials are in {self._written(trials)}"
        except (OSError, DatabaseError) as unwritten:
            where = f"They are lost, for no file could be written either ({unwritten})"
        raise DatabaseError(
            f"{len(trials)} trials and {winners} winners of this run could not be stored: {error} "
            f"{where}. The run that follows goes on from what is stored."
        ) from error

    def _flush(self) -> DatabaseError | None:
        """Store what waits, in its order; what stands against it."""
        while self._waiting:
            record, run, winner = self._waiting[0]
            try:
                if winner:
                    self._database.set_best(record)
                else:
                    self._database.add(record, run)
            except DatabaseError as error:
                self.trouble = f"{len(self._waiting)} records wait to be stored: {error}"
                return error
            del self._waiting[0]
        self.trouble = ""
        return None

    def _written(self, trials: list[Record]) -> str:
        from autoflash.database import lines

        path = Path(tempfile.mkdtemp(prefix="autoflash-unsaved-")) / "trials.jsonl"
        lines.write_dump(path, trials)
        return f"{path}: once there is room, `autoflash db load --trials {path}` brings them back"
