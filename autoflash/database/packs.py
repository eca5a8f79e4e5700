"""The reviewed records of tuning_db/*.jsonl: loaded again only when their content changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import sqlalchemy as sa

from autoflash.database import generalised, lines, winners
from autoflash.database.rows import utc_now
from autoflash.database.tables import best, dispatch, pack


def read(directory: Path) -> dict[Path, bytes]:
    """Path -> content of every pack, in order; none where there is no such directory.

    Raises:
        OSError: the directory or a pack in it cannot be read.
    """
    if not directory.is_dir():
        return {}
    found = sorted(path for path in directory.iterdir() if path.suffix == ".jsonl")
    return {path: path.read_bytes() for path in found}


def are_loaded(connection: sa.Connection, contents: Mapping[Path, bytes]) -> bool:
    """Whether the database holds these packs, with this content, and no others."""
    held = connection.execute(sa.select(pack.c.name, pack.c.digest))
    wanted = {path.name: sha256(content).hexdigest() for path, content in contents.items()}
    return {row.name: row.digest for row in held} == wanted


def load(
    connection: sa.Connection,
    contents: Mapping[Path, bytes],
    current: Callable[[], Mapping[str, str]],
) -> list[str]:
    """Replace every winner and dispatch table that came from a pack by those of these packs.

    All of them, not only those of a pack that changed: one pack may have hidden a row of another,
    and they are small.

    Args:
        connection: in a write transaction.
        contents: what `read` gave.
        current: gives template name -> digest of the template as installed.

    Returns:
        A complaint, with file and line, about each line that holds neither a winner nor a table.
    """
    for shipped in (best, dispatch):
        connection.execute(sa.delete(shipped).where(shipped.c.pack.is_not(None)))
    connection.execute(sa.delete(pack))
    complaints: list[str] = []
    for path, content in contents.items():
        row = {"name": path.name, "digest": sha256(content).hexdigest(), "loaded": utc_now()}
        connection.execute(pack.insert().values(row))
        found = lines.parse_lines(content, path, winners.unfit)
        complaints += found.complaints
        for record in found.records:
            winners.put(connection, record, current, pack_name=path.name)
        for table in found.tables:
            generalised.put(connection, table, current, pack_name=path.name)
    return complaints
