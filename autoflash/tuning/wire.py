"""Wire: how tuner and worker talk: JSON objects, each behind its length in four bytes."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from autoflash.codegen.template import Source

_LENGTH = struct.Struct(">I")
HEADER_BYTES = _LENGTH.size
LIMIT_BYTES = 64 << 20
"""No message is nearly as long: a larger length means that the stream is out of step."""


BUILT_IN = "built_in"
"""Beside the fields of a source: the folder of its library, where that is not to be built."""


def pack(message: Mapping[str, Any]) -> bytes:
    """The bytes of one message."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def unpack(received: bytes | bytearray) -> tuple[dict[str, Any], int] | None:
    """The first message in `received` and how many bytes it took; None while it is incomplete.

    Raises:
        ValueError: these are not the bytes of a message.
    """
    if len(received) < HEADER_BYTES:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > LIMIT_BYTES:
        raise ValueError(f"a message of {length} bytes: the stream is out of step")
    end = HEADER_BYTES + length
    if len(received) < end:
        return None
    message = json.loads(bytes(received[HEADER_BYTES:end]))
    if not isinstance(message, dict):
        raise ValueError(f"a message that is a {type(message).__name__}, not an object")
    return message, end


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message of a blocking stream; None when the other side has closed it."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    body = stream.read(_LENGTH.unpack(header)[0])
    found = unpack(header + body)
    return None if found is None else found[0]


def source_to_dict(source: Source) -> dict[str, Any]:
    """A JSON-ready form of a rendered source."""
    return {**dataclasses.asdict(source), "options": dict(source.options)}


def source_from_dict(data: Mapping[str, Any]) -> Source:
    """Inverse of `source_to_dict`."""
    return Source(**{name: value for name, value in data.items() if name != BUILT_IN})
