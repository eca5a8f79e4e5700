"""Which of two records is the winner of a problem on a device, and how it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from autoflash.database import rows
from autoflash.database.tables import best, device
from autoflash.device import Device
from autoflash.record import Record


def unfit(record: Record) -> str | None:
    """Why a record cannot be a winner, or None."""
    if record.outcome in ("ok", "predicted"):
        return None
    return f"outcome {record.outcome!r} cannot be a winner; only 'ok' and 'predicted' can"


def put(
    connection: sa.Connection,
    record: Record,
    current: Callable[[], Mapping[str, str]],
    pack_name: str | None = None,
    *,
    ties: bool = True,
) -> bool:
    """Store a winner unless the one that is there stands higher.

    What counts, in this order: its template is as it was then; it was measured, not predicted; it
    was tuned here, not shipped in a pack; it is newer. A row that does not parse counts nothing.

    Args:
        connection: in a write transaction.
        record: what may be stored.
        current: gives template name -> current digest; asked only where there is a choice.
        pack_name: the pack that the record comes from.
        ties: whether it is stored, too, where both stand equally high.

    Returns:
        Whether it was stored.
    """
    row = {**rows.best_row(record), "pack": pack_name}
    here = (best.c.problem == row["problem"]) & (best.c.device_key == row["device_key"])
    old = connection.execute(sa.select(best).where(here)).mappings().one_or_none()
    if old is None:
        put_device(connection, record.device)
        connection.execute(best.insert().values(row))
        return True
    if _parses(old["record"]):
        digests = current()
        new, held = _standing(row, digests), _standing(dict(old), digests)
        if new < held or (new == held and not ties):
            return False
    connection.execute(best.update().where(here).values(row))
    return True


def put_all(
    connection: sa.Connection, records: Sequence[Record], current: Callable[[], Mapping[str, str]]
) -> int:
    """`put` several that another database holds; returns how many stand higher than those here."""
    return sum(put(connection, record, current, ties=False) for record in records)


def _standing(row: Mapping[str, Any], digests: Mapping[str, str]) -> tuple[bool, bool, bool, str]:
    return (
        digests.get(row["template"]) == row["template_digest"],
        row["outcome"] == "ok",
        row["pack"] is None,
        row["created"],
    )


def _parses(text: str) -> bool:
    try:
        rows.parse(text)
    except ValueError:
        return False
    return True


def put_device(connection: sa.Connection, found: Device) -> None:
    """Store a device unless its key is known."""
    put_new(connection, device.c.key, rows.device_row(found))


def put_new(connection: sa.Connection, key: sa.Column[Any], row: Mapping[str, Any]) -> None:
    """Insert a row unless there is one with its key; every SQL database can do it so."""
    if connection.execute(sa.select(key).where(key == row[key.name])).first() is None:
        connection.execute(sa.insert(key.table).values(row))
