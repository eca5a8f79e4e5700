"""How text files are read and written: a Record, or a dispatch table, as JSON per line, sorted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from autoflash.database import generalised, rows
from autoflash.dispatch_table import DispatchTable
from autoflash.errors import DatabaseCorrupt, DatabaseError, InvalidInput
from autoflash.record import Record

_SHOWN = 5
"""Complaints that a message lists before it only counts."""


class Lines(NamedTuple):
    """What a file's lines hold.

    Attributes:
        records: one per line, but for those of tables.
        tables: likewise.
        complaints: for each line that gives neither, where and why.
    """

    records: list[Record]
    tables: list[DispatchTable]
    complaints: list[str]


def parse_lines(
    content: bytes, name: object, refuse: Callable[[Record], str | None] = lambda record: None
) -> Lines:
    """The records and dispatch tables of a file's content.

    Args:
        content: of the file.
        name: of the file.
        refuse: why a record that parses is out of place, or None.
    """
    found = Lines([], [], [])
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            if generalised.is_line(line):
                found.tables.append(generalised.parse(line))
                continue
            record = rows.parse(line)
            reason = refuse(record)
        except ValueError as error:  # a UnicodeDecodeError is one too
            reason = str(error)
        if reason is None:
            found.records.append(record)
        else:
            found.complaints.append(f"{name}:{number}: {reason}")
    return found


def summary(complaints: list[str]) -> str:
    """The first complaints, and how many there are."""
    text = "; ".join(complaints[:_SHOWN])
    more = len(complaints) - _SHOWN
    return f"{text}; and {more} more" if more > 0 else text


def read_dump(path: Path) -> Lines:
    """The records and tables of a dump, and complaints about the lines that do not parse.

    Raises:
        InvalidInput: the file cannot be read.
        DatabaseCorrupt: not one line of it is a record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read ({error.strerror or error}); give a file that autoflash db "
            "dump wrote."
        ) from None
    found = parse_lines(content, path)
    if found.complaints and not (found.records or found.tables):
        raise DatabaseCorrupt(
            f"{path} is not a dump of autoflash: {summary(found.complaints)}. Nothing was loaded."
        )
    return found


def write_dump(path: Path, records: Iterable[Record], tables: Iterable[DispatchTable] = ()) -> int:
    """Write records in order, then tables, one per line; a former file stays on any failure.

    Returns:
        The number of lines.

    Raises:
        DatabaseError: the file cannot be written.
    """
    lines = [rows.canonical(record.to_dict()) for record in sorted(records, key=rows.sort_key)]
    lines += [generalised.to_line(table) for table in generalised.sorted_tables(tables)]
    content = "".join(f"{line}\n" for line in lines).encode()
    # A pipe or a device is written to, not replaced; the pipe behind /dev/stdout has no other name.
    special = path.exists() and not path.is_file()
    target = path if special else path.resolve()
    written = target if special else target.with_name(f".{target.name}.{os.getpid()}")
    try:
        written.write_bytes(content)
        if not special:
            written.replace(target)
    except OSError as error:
        if not special:
            written.unlink(missing_ok=True)
        raise DatabaseError(
            f"{path} cannot be written ({error.strerror or error}); name a file in a directory "
            "that exists, that this user may write and that has space. A former file is kept."
        ) from None
    return len(lines)
