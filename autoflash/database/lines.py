"""How records are read from and written to text files: one Record as JSON per line, sorted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from autoflash.database import rows
from autoflash.errors import DatabaseCorrupt, DatabaseError, InvalidInput
from autoflash.record import Record

_SHOWN = 5
"""Complaints that a message lists before it only counts."""


def parse_lines(
    content: bytes, name: object, refuse: Callable[[Record], str | None] = lambda record: None
) -> tuple[list[Record], list[str]]:
    """The records of a file's content, and for each line that gives none where and why.

    Args:
        content: of the file.
        name: of the file.
        refuse: why a record that parses is out of place, or None.
    """
    records, complaints = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = rows.parse(line)
            reason = refuse(record)
        except ValueError as error:  # a UnicodeDecodeError is one too
            reason = str(error)
        if reason is None:
            records.append(record)
        else:
            complaints.append(f"{name}:{number}: {reason}")
    return records, complaints


def summary(complaints: list[str]) -> str:
    """The first complaints, and how many there are."""
    text = "; ".join(complaints[:_SHOWN])
    more = len(complaints) - _SHOWN
    return f"{text}; and {more} more" if more > 0 else text


def read_dump(path: Path) -> tuple[list[Record], list[str]]:
    """The records of a dump, and complaints about the lines that do not parse.

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
    records, complaints = parse_lines(content, path)
    if complaints and not records:
        raise DatabaseCorrupt(
            f"{path} is not a dump of autoflash: {summary(complaints)}. Nothing was loaded."
        )
    return records, complaints


def write_dump(path: Path, records: Iterable[Record]) -> int:
    """Write records in order, one per line; a former file stays if anything goes wrong.

    Returns:
        The number of lines.

    Raises:
        DatabaseError: the file cannot be written.
    """
    lines = [rows.canonical(record.to_dict()) for record in sorted(records, key=rows.sort_key)]
    content = "".join(f"{line}\n" for line in lines).encode()
    target = path.resolve()
    # A pipe or a device is written to, not replaced.
    special = target.exists() and not target.is_file()
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
