"""Database: what tuning stores and serving reads; the only place where the two meet."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from autoflash import settings
from autoflash.database import (
    generalised,
    lines,
    migrations,
    opening,
    packs,
    rows,
    tables,
    trials,
    winners,
)
from autoflash.database.connection import explained, use_wal
from autoflash.database.merge import merge
from autoflash.database.opening import Opened
from autoflash.database.store import Filter, Store, warn
from autoflash.device import Device
from autoflash.dispatch_table import DispatchTable
from autoflash.errors import (
    AutoflashError,
    DatabaseCorrupt,
    DatabaseError,
    DatabaseNewer,
    InvalidInput,
)
from autoflash.problem import Problem
from autoflash.record import Record


class Database:
    """Trials, winners and runs, in SQLite or any database that SQLAlchemy knows.

    Threads may share one; processes may not (open it again after a fork). Every call is one short
    transaction: what returned is stored, whatever becomes of the process.

    Attributes:
        place: where it is, for messages; without the password.
    """

    def __init__(self, opened: Opened, digests: Mapping[str, str] | None = None) -> None:
        self._store = Store(opened)
        self._digests = digests
        self.place = opened.place.shown

    @classmethod
    def open(cls, url: str | None = None, *, digests: Mapping[str, str] | None = None) -> Database:
        """Open, bring the schema up to date and load the packs whose content changed.

        Where the database can only be read it is opened for reading. Where there is none and none
        can be made, one in memory that holds the packs takes its place, with a warning. `writable`
        tells. `Database.open("sqlite://")` needs no disk at all.

        Args:
            url: SQLAlchemy URL, or the path of a SQLite file; None is settings' database_url.
            digests: template name -> digest of the templates as they are now; None is the
                installed catalog, read when first needed.

        Raises:
            DatabaseNewer: a newer autoflash wrote it.
            DatabaseCorrupt: it is no database, not ours, or damaged; it is left as it is.
            DatabaseError: it cannot be used for another reason.
        """
        opened = opening.open_url(settings.get().database_url if url is None else url)
        database = cls(opened, digests)
        try:
            database._ready()
        except BaseException:
            database.close()
            raise
        return database

    def _ready(self) -> None:
        """Migrate and load packs, in memory where the file cannot be written."""
        contents = self._packs()

        def loaded(connection: sa.Connection) -> bool:
            return contents is None or packs.are_loaded(connection, contents)

        def update(connection: sa.Connection) -> list[str]:
            migrations.migrate(connection, self.place)
            if contents is None or loaded(connection):  # or another process was faster
                return []
            return packs.load(connection, contents, self._current)

        def update_if_needed() -> list[str]:
            opened = self._store.opened
            if self.writable and opened.place.path is not None:
                with explained(opened.place):
                    use_wal(opened.engine)
            with self._store.reading() as connection:
                if opened.is_current and loaded(connection):
                    return []
            if not self.writable:
                self._store.move_to_memory()
            return self._store.write(update, force=True)

        try:
            complaints = update_if_needed()
        except (DatabaseCorrupt, DatabaseNewer):
            raise
        except DatabaseError as error:
            if self._store.opened.place.path is None or not self.writable:
                raise
            # A full disk, or a writer that hangs, must not keep anybody from reading.
            warn(f"nothing can be stored now, what is there is read: {error}")
            reason = str(error).removeprefix(f"{self.place}: ").partition(". ")[0]
            self._store.move_to_memory(obstacle=reason)
            complaints = update_if_needed()
        if complaints:
            warn(f"{len(complaints)} lines of packs are left out: {lines.summary(complaints)}")

    def _packs(self) -> dict[Path, bytes] | None:
        directory = settings.get().tuning_db_dir
        try:
            return packs.read(directory)
        except OSError as error:
            warn(f"the records in {directory} cannot be read ({error}); those loaded before stay.")
            return None

    def close(self) -> None:
        """Close the connection; the object is of no further use."""
        self._store.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def writable(self) -> bool:
        """Whether anything can be stored; if not, every method that stores is a DatabaseError."""
        return not self._store.opened.obstacle

    @property
    def obstacle(self) -> str:
        """Why nothing can be stored; "" if it can."""
        return self._store.opened.obstacle

    @property
    def skipped(self) -> Counter[str]:
        """Table -> rows met so far that do not parse and were left out."""
        return self._store.skipped

    # Runs and trials ----------------------------------------------------------------------------

    def start_run(
        self,
        *,
        command: str,
        device: Device,
        environment: Mapping[str, Any],
        seed: int,
        budget: Mapping[str, Any],
    ) -> int:
        """Note that a tuning run begins; its status is "running" until `finish_run`.

        Args:
            command: what the user typed, or an equal of it.
            device: what is tuned for.
            environment: versions of what takes part.
            seed: of the search.
            budget: limits asked for, such as {"max_seconds": 60}.

        Returns:
            Its id, for `add` and `finish_run`.
        """
        return self._store.write(
            lambda connection: trials.start_run(
                connection,
                command=command,
                device=device,
                facts=environment,
                seed=seed,
                budget=budget,
            )
        )

    def finish_run(self, run: int, status: str) -> None:
        """Note that a run ended, and how.

        Raises:
            InvalidInput: there is no such run.
        """
        ended = tables.run.update().where(tables.run.c.id == run)
        ended = ended.values(status=status, ended=rows.utc_now())
        if self._store.write(lambda connection: connection.execute(ended).rowcount) != 1:
            raise InvalidInput(f"there is no run {run} in {self.place}.")

    def runs(self) -> list[dict[str, Any]]:
        """The runs in order; "running" is one that goes on or was killed."""
        with self._store.reading() as connection:
            found = connection.execute(sa.select(tables.run).order_by(tables.run.c.id))
            return [dict(row) for row in found.mappings()]

    def device_keys(self) -> list[str]:
        """Device.key of every device that something is stored of."""
        with self._store.reading() as connection:
            found = connection.execute(sa.select(tables.device.c.key).order_by(tables.device.c.key))
            return list(found.scalars())

    def add(self, record: Record, run: int | None = None) -> None:
        """Store a trial, whatever its outcome; once it returns a kill cannot lose it.

        A record without `created` gets this moment; one equal to a stored one is not stored twice.

        Raises:
            InvalidInput: the record cannot be meant, such as "ok" without a time.
        """
        entry = (rows.stamped(record), run)
        self._store.write(lambda connection: trials.put(connection, [entry]))

    def trials(
        self,
        *,
        problem: Problem | None = None,
        device_key: str | None = None,
        policy: str | None = None,
        template: str | None = None,
        **columns: Filter,
    ) -> list[Record]:
        """The trials that agree with all that is given, in the order in which they were stored.

        Args:
            problem: this problem exactly.
            device_key: Device.key.
            policy: how they were timed.
            template: the template's name.
            **columns: other columns of table trial, such as head_dim=128 or outcome="ok".

        Raises:
            UnknownName: there is no such column.
        """
        named = {"problem": problem.name if problem else None, "device_key": device_key,
                 "policy": policy, "template": template}  # fmt: skip
        return self._store.select(tables.trial, named, columns, tables.trial.c.id)

    # Winners ------------------------------------------------------------------------------------

    def set_best(self, record: Record) -> bool:
        """Make a record the winner for its problem and device, if it stands high enough.

        The template that it names is taken to be as it is now. A predicted record never replaces a
        measured one whose template still is what it was; a measured one replaces a predicted one,
        one from a pack, one of another template version, and an older one.

        Returns:
            Whether it was stored.

        Raises:
            InvalidInput: a record of this outcome cannot be a winner.
        """
        record = rows.stamped(record)
        if (reason := winners.unfit(record)) is not None:
            raise InvalidInput(f"{record.problem.name}: {reason}.")
        mine = {record.config.template: record.template_digest}
        return self._store.write(
            lambda connection: winners.put(connection, record, lambda: {**self._current(), **mine})
        )

    def bests(
        self,
        *,
        arch: str | None = None,
        device_key: str | None = None,
        **columns: Filter,
    ) -> list[Record]:
        """The winners that agree with all that is given, by problem and device.

        One query. Their templates may have changed since: compare template_digest.

        Args:
            arch: "sm90", "cpu" and the like.
            device_key: Device.key.
            **columns: other columns of table best, such as head_dim=128; pack=None for those that
                were tuned here.

        Raises:
            UnknownName: there is no such column.
        """
        named = {"arch": arch, "device_key": device_key}
        best = tables.best.c
        return self._store.select(tables.best, named, columns, best.problem, best.device_key)

    # Dispatch tables -----------------------------------------------------------------------------

    def set_table(self, table: DispatchTable) -> bool:
        """Store the dispatch table of a family on a device in place of a former one.

        One of which no leaf holds any more, or that is older, does not replace one that stands
        higher. A table without `created` gets this moment.

        Returns:
            Whether it was stored.
        """
        made = table if table.created else dataclasses.replace(table, created=rows.utc_now())
        return self._store.write(
            lambda connection: generalised.put(connection, made, self._current)
        )

    def tables(self, device_key: str | None = None) -> list[DispatchTable]:
        """The dispatch tables of a device, or all, by family; their templates may have changed."""
        key = tables.dispatch.c.device_key
        return self._store.dispatch_tables(*([key == device_key] if device_key else []))

    # Whole databases ----------------------------------------------------------------------------

    def dump(self, path: str | Path, *, device_key: str | None = None, trials: bool = False) -> int:
        """Write the winners and dispatch tables, or all trials, as text: one per line, sorted.

        Equal content gives equal bytes. What is of one device is a pack for tuning_db/.

        Args:
            path: of the file; replaced at once and only when all is written.
            device_key: only those of this device.
            trials: all trials instead of winners and tables.

        Returns:
            The number of lines.

        Raises:
            DatabaseError: the file cannot be written.
        """
        if trials:
            return lines.write_dump(Path(path), self.trials(device_key=device_key))
        winning = self.bests(device_key=device_key)
        return lines.write_dump(Path(path), winning, self.tables(device_key))

    def load(self, path: str | Path, *, trials: bool = False) -> int:
        """Read what `dump` wrote, by the rules of `set_best` and `add`.

        A line that does not parse is left out; one warning gives the places and reasons.

        Args:
            path: of the file.
            trials: it holds trials, not winners.

        Returns:
            How many records and tables were stored: neither known before nor worse than those here.

        Raises:
            InvalidInput: the file cannot be read, or holds trials where winners were expected.
            DatabaseCorrupt: no line of it is a record.
        """
        records, made, complaints = lines.read_dump(Path(path))
        if not trials:
            _refuse_trials(records, path)
        stored = self._put_trials(records) if trials else self._put_bests(records)
        stored += self._store.write_in_chunks(
            made, lambda connection, some: generalised.put_all(connection, some, self._current)
        )
        if complaints:
            warn(f"{len(complaints)} lines are left out: {lines.summary(complaints)}")
        return stored

    def merge(self, url: str) -> int:
        """Take over the runs, trials, and the winners and dispatch tables made in another database.

        The other one is only read. Doing it twice changes nothing.

        Args:
            url: of the other database, or its path.

        Returns:
            How many trials, winners and tables were stored.

        Raises:
            InvalidInput: there is none, or it is this one.
            DatabaseError: it cannot be read; also its kinds, as in `open`.
        """
        if not self.writable:
            raise self._store.refusal()
        other = Store(opening.open_source(url, self._store.opened.place))
        try:
            return merge(self._store, other, self._current)
        finally:
            other.close()

    def prune(self, digests: Mapping[str, str]) -> int:
        """Delete the trials, and the winners and tables made here, of templates no longer so.

        Args:
            digests: template name -> digest of the templates as they are now.

        Returns:
            How many trials, winners and tables were deleted.

        Raises:
            InvalidInput: `digests` is empty, which would delete everything.
        """
        if not digests:
            raise InvalidInput("prune was given no template, and would have deleted every record.")
        contents = self._packs()

        def delete(connection: sa.Connection) -> int:
            removed = trials.prune(connection, digests) + generalised.prune(connection, digests)
            # A deleted winner may have stood before one from a pack.
            if contents is not None:
                packs.load(connection, contents, lambda: digests)
            return removed

        return self._store.write(delete)

    def summary(self) -> dict[str, int | str | bool]:
        """Where it is, what version, and how many rows each table has."""
        counted = (tables.run, tables.trial, tables.best, tables.dispatch, tables.pack)
        with self._store.reading() as connection:
            counts = {
                table.name: connection.execute(
                    sa.select(sa.func.count()).select_from(table)
                ).scalar_one()
                for table in counted
            }
            version = connection.execute(sa.select(sa.func.max(tables.schema.c.version)))
            schema = int(version.scalar_one())
        return {"place": self.place, "writable": self.writable, "schema": schema, **counts}

    # Inside --------------------------------------------------------------------------------------

    def _put_trials(self, records: Sequence[Record]) -> int:
        return self._store.write_in_chunks([(each, None) for each in records], trials.put)

    def _put_bests(self, records: Sequence[Record]) -> int:
        return self._store.write_in_chunks(
            records, lambda connection, some: winners.put_all(connection, some, self._current)
        )

    def _current(self) -> Mapping[str, str]:
        """Template name -> digest of the templates as they are now."""
        if self._digests is None:
            from autoflash.codegen import catalog

            try:
                installed = catalog.installed().templates
            except AutoflashError:
                installed = {}  # whoever renders it gets the error; then none is current
            self._digests = {name: each.digest for name, each in installed.items()}
        return self._digests


def _refuse_trials(records: Sequence[Record], path: str | Path) -> None:
    seen: set[tuple[str, str]] = set()
    for record in records:
        key = (record.problem.name, record.device.key)
        reason = winners.unfit(record)
        if key in seen:
            reason = "it has two records for one device"
        if reason is not None:
            raise InvalidInput(
                f"{path} is no dump of winners: {record.problem.name}: {reason}. If it is one of "
                "trials, load it as such. Nothing was loaded."
            )
        seen.add(key)
