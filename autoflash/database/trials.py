"""How trials and runs are stored, taken over from another database, and thrown away."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from autoflash.database import rows, winners
from autoflash.database.tables import best, environment, run, trial
from autoflash.device import Device
from autoflash.record import Record


def put(connection: sa.Connection, entries: Sequence[tuple[Record, int | None]]) -> int:
    """Store (record, run) pairs, each record once; returns how many were new."""
    fresh = {row["digest"]: (row, record) for row, record in _rows(entries)}
    held = connection.execute(sa.select(trial.c.digest).where(trial.c.digest.in_(list(fresh))))
    for digest in held.scalars():
        del fresh[digest]
    devices = {record.device.key: record.device for _, record in fresh.values()}
    for found in devices.values():
        winners.put_device(connection, found)
    facts = {row["environment"]: record.environment for row, record in fresh.values()}
    for each in facts.values():
        put_environment(connection, each)
    if fresh:
        connection.execute(trial.insert(), [row for row, _ in fresh.values()])
    return len(fresh)


def _rows(entries: Iterable[tuple[Record, int | None]]) -> Iterable[tuple[dict[str, Any], Record]]:
    return ((rows.trial_row(record, number), record) for record, number in entries)


def put_environment(connection: sa.Connection, facts: Mapping[str, Any]) -> str:
    """Store an environment unless it is known; returns its digest."""
    row = rows.environment_row(facts)
    winners.put_new(connection, environment.c.digest, row)
    return str(row["digest"])


def start_run(
    connection: sa.Connection,
    *,
    command: str,
    device: Device,
    facts: Mapping[str, Any],
    seed: int,
    budget: Mapping[str, Any],
) -> int:
    """Store a run that begins now; returns its id."""
    winners.put_device(connection, device)
    row = {
        "uid": uuid.uuid4().hex,
        "command": command,
        "device_key": device.key,
        "environment": put_environment(connection, facts),
        "seed": seed,
        "budget": rows.canonical(budget),
        "status": "running",
        "started": rows.utc_now(),
    }
    key = connection.execute(run.insert().values(row)).inserted_primary_key
    assert key is not None
    return int(key[0])


def put_run(connection: sa.Connection, row: Mapping[str, Any]) -> int:
    """Store a run of another database, whose device and environment are here; returns its id."""
    winners.put_new(connection, run.c.uid, {k: v for k, v in row.items() if k != "id"})
    found = connection.execute(sa.select(run.c.id).where(run.c.uid == row["uid"])).scalar_one()
    return int(found)


def prune(connection: sa.Connection, digests: Mapping[str, str]) -> int:
    """Delete the trials and winners whose template is not one of these; returns how many.

    Winners that came from a pack stay: they would come back when it is loaded again.
    """
    removed = 0
    for table in (trial, best):
        holds = sa.or_(
            *(
                (table.c.template == name) & (table.c.template_digest == digest)
                for name, digest in digests.items()
            )
        )
        stale = sa.delete(table).where(sa.not_(holds))
        if table is best:
            stale = stale.where(best.c.pack.is_(None))
        removed += connection.execute(stale).rowcount
    return removed
