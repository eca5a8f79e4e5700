"""How the content of one database is taken over into another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sqlalchemy as sa

from autoflash.database import generalised, tables, trials, winners
from autoflash.database.store import CHUNK, Store


def merge(target: Store, source: Store, current: Callable[[], Mapping[str, str]]) -> int:
    """Copy runs, trials, and winners and tables made there; returns how many of these were new.

    Args:
        target: where to.
        source: where from; only read.
        current: gives template name -> current digest, by which winners are compared.
    """
    trial, best = tables.trial.c, tables.best.c
    shared = (
        (tables.device, tables.device.c.key),
        (tables.environment, tables.environment.c.digest),
    )

    def copy_few(connection: sa.Connection) -> dict[int, int]:
        for table, key in shared:
            for row in few[table]:
                winners.put_new(connection, key, row)
        return {row["id"]: trials.put_run(connection, row) for row in few[tables.run]}

    with source.reading() as connection:
        few = {
            table: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for table in (tables.device, tables.environment, tables.run)
        }
        runs = target.write(copy_few)
        query = sa.select(trial.id, trial.run, trial.record).order_by(trial.id)
        found = connection.execute(query.execution_options(yield_per=CHUNK))
        entries = (
            (record, runs.get(row.run))
            for row in found
            for record in source.parsed(tables.trial, row.id, row.record)
        )
        stored = target.write_in_chunks(entries, trials.put)
    bests = source.select(tables.best, {}, {"pack": None}, best.problem, best.device_key)
    stored += target.write_in_chunks(bests, lambda c, some: winners.put_all(c, some, current))
    made_here = source.dispatch_tables(tables.dispatch.c.pack.is_(None))
    return stored + target.write_in_chunks(
        made_here, lambda c, some: generalised.put_all(c, some, current)
    )
