"""How dispatch tables are stored: one per family and device, by the rules that winners follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from autoflash.database import rows, winners
from autoflash.database.tables import dispatch
from autoflash.dispatch_table import DispatchTable
from autoflash.errors import AutoflashError

KEY = "table"
"""What a line of a dump has, alone, where it holds a dispatch table and no record."""


def to_text(table: DispatchTable) -> str:
    """The one text of a table; equal tables have equal texts."""
    return rows.canonical(table.to_dict())


def to_line(table: DispatchTable) -> str:
    """The table's line in a dump."""
    return rows.canonical({KEY: table.to_dict()})


def parse(text: str | bytes) -> DispatchTable:
    """The table of a row or of a dump's line.

    Raises:
        ValueError: it does not parse or cannot be meant; the message says what is wrong.
    """
    try:
        data = json.loads(text)
        table = DispatchTable.from_dict(data.get(KEY, data))
        rows.utc(table.created)
    except KeyError as error:
        raise ValueError(f"the dispatch table lacks {error}") from None
    except (TypeError, AttributeError, RecursionError, AutoflashError) as error:
        raise ValueError(f"no dispatch table: {error}") from None
    return table


def is_line(line: bytes) -> bool:
    """Whether a line of a dump holds a table; sorted keys and no spaces leave one beginning."""
    return line.lstrip().startswith(f'{{"{KEY}":'.encode())


def row_of(table: DispatchTable) -> dict[str, Any]:
    """The columns of table dispatch, pack apart."""
    return {
        "family": table.family.name,
        "device_key": table.device.key,
        "arch": table.device.arch,
        "policy": table.policy,
        "created": rows.utc(table.created),
        "content": to_text(table),
    }


def put(
    connection: sa.Connection,
    table: DispatchTable,
    current: Callable[[], Mapping[str, str]],
    pack_name: str | None = None,
    *,
    ties: bool = True,
) -> bool:
    """Store a table unless the one that is there stands higher.

    What counts, in this order: some leaf of it still holds; it was made here, not shipped in a
    pack; it is newer.

    Args:
        connection: in a write transaction.
        table: what may be stored.
        current: gives template name -> current digest; asked only where there is a choice.
        pack_name: the pack that the table comes from.
        ties: whether it is stored, too, where both stand equally high.

    Returns:
        Whether it was stored.
    """
    row = {**row_of(table), "pack": pack_name}
    here = (dispatch.c.family == row["family"]) & (dispatch.c.device_key == row["device_key"])
    old = connection.execute(sa.select(dispatch).where(here)).mappings().one_or_none()
    if old is None:
        winners.put_device(connection, table.device)
        connection.execute(dispatch.insert().values(row))
        return True
    try:
        held = parse(old["content"])
    except ValueError:
        held = None
    if held is not None:
        digests = current()
        new = (_holds(table, digests), pack_name is None, row["created"])
        former = (_holds(held, digests), old["pack"] is None, old["created"])
        if new < former or (new == former and not ties):
            return False
    connection.execute(dispatch.update().where(here).values(row))
    return True


def put_all(
    connection: sa.Connection,
    tables: Sequence[DispatchTable],
    current: Callable[[], Mapping[str, str]],
) -> int:
    """`put` several from elsewhere; returns how many stand higher than those here."""
    return sum(put(connection, table, current, ties=False) for table in tables)


def prune(connection: sa.Connection, digests: Mapping[str, str]) -> int:
    """Delete the tables made here of whose templates none is one of these; returns how many."""
    query = sa.select(dispatch.c.family, dispatch.c.device_key, dispatch.c.content)
    removed = 0
    for row in connection.execute(query.where(dispatch.c.pack.is_(None))).all():
        try:
            if _holds(parse(row.content), digests):
                continue
        except ValueError:
            pass
        here = (dispatch.c.family == row.family) & (dispatch.c.device_key == row.device_key)
        removed += connection.execute(sa.delete(dispatch).where(here)).rowcount
    return removed


def sorted_tables(tables: Iterable[DispatchTable]) -> list[DispatchTable]:
    """In the order of a dump."""
    return sorted(tables, key=lambda table: (table.family.name, table.device.key))


def _holds(table: DispatchTable, digests: Mapping[str, str]) -> bool:
    return any(table.is_current(name, digests.get(name)) for name in table.digests)
