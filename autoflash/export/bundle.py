"""An export on disk: its files, and the manifest that lets `autoflash verify` check them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.export.header import SCHEMA_VERSION, entry_dict, header
from autoflash.export.selection import Selection
from autoflash.problem import Problem

MANIFEST = "autoflash-export.json"
"""Beside the files of an export: the header, each winner, and the digest of each file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What a manifest says.

    Attributes:
        folder: where it is.
        target: which form it is of.
        header: as in autoflash.export.header.
        entries: the winners, as `entry_dict` has them.
        files: path below the folder -> sha256 of its content.
    """

    folder: Path
    target: str
    header: Mapping[str, Any]
    entries: tuple[Mapping[str, Any], ...]
    files: Mapping[str, str]


def write(
    folder: Path, target: str, selection: Selection, files: Mapping[str, str | bytes]
) -> Bundle:
    """Write the files of an export and their manifest; what a former export left there goes.

    Args:
        folder: made where there is none. One that has files, but no manifest, is somebody else's.
        target: name of the form.
        selection: what was exported.
        files: path below the folder -> content.

    Raises:
        InvalidInput: the folder is not ours, holds another form or a file that would be lost, or
            cannot be read or written.
    """
    try:
        former = _former(folder, target)
        taken = sorted(path for path in files if path not in former and (folder / path).exists())
    except OSError as error:
        raise _unusable(folder, error) from error
    if taken:
        raise InvalidInput(
            f"--out {folder} holds {taken[0]}, which no export wrote and this one would replace. "
            "Move it away, or name another folder."
        )
    contents = {
        path: text.encode() if isinstance(text, str) else text for path, text in files.items()
    }
    for path in contents:
        assert _is_inside(path), path
    bundle = Bundle(
        folder=folder,
        target=target,
        header=header(selection),
        entries=tuple(entry_dict(entry) for entry in selection.entries),
        files={path: hashlib.sha256(data).hexdigest() for path, data in sorted(contents.items())},
    )
    manifest = {
        "target": target,
        "header": bundle.header,
        "entries": bundle.entries,
        "files": bundle.files,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    try:
        for path, data in {**contents, MANIFEST: text.encode()}.items():
            whole = folder / path
            whole.parent.mkdir(parents=True, exist_ok=True)
            part = whole.with_name(f".{whole.name}.part")
            part.write_bytes(data)
            part.replace(whole)
        for path in sorted(former - set(contents)):
            _remove(folder, path)
    except OSError as error:
        raise _unusable(folder, error) from error
    return bundle


def read(folder: Path) -> Bundle:
    """What is exported in a folder.

    Raises:
        InvalidInput: there is no manifest, or it is damaged, of another version, or names files
            that are not below the folder.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        bundle = Bundle(
            folder=folder,
            target=data["target"],
            header=dict(data["header"]),
            entries=tuple(data["entries"]),
            files=dict(data["files"]),
        )
        version = bundle.header["schema_version"]
        if version == SCHEMA_VERSION:
            _require_sound(bundle)
    except OSError as error:
        raise InvalidInput(
            f"{folder} is no export: {MANIFEST} cannot be read there ({error.strerror}). "
            "`autoflash export TARGET --out DIR` makes one."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, InvalidInput) as error:
        raise InvalidInput(
            f"{path} is damaged: {error!r}. Export again, into another folder if this one stays."
        ) from error
    if version != SCHEMA_VERSION:
        raise InvalidInput(
            f"{path} is of schema version {version}, and this autoflash knows {SCHEMA_VERSION}. "
            "Export again, or use the autoflash that made it."
        )
    return bundle


def _require_sound(bundle: Bundle) -> None:
    """Raise what a reader of a manifest would stumble over later, whatever it is."""
    Device.from_dict(bundle.header["device"])
    bundle.header["versions"].items()
    for facts in bundle.header["templates"].values():
        facts["digest"]
    for entry in bundle.entries:
        Problem.from_dict(entry["problem"])
        dict(entry["config"])
        for name in ("name", "template", "source_digest", "latency_us"):
            entry[name]
    for path in bundle.files:
        if not _is_inside(path):
            raise ValueError(f"{path!r} is no file below the folder")


def _is_inside(path: str) -> bool:
    """Whether a path is one that an export may write, and may take away again."""
    parts = PurePosixPath(path)
    return path != MANIFEST and not parts.is_absolute() and ".." not in parts.parts


def _remove(folder: Path, path: str) -> None:
    """Take a file of a former export away, and the folders that are empty without it."""
    gone = folder / path
    gone.unlink(missing_ok=True)
    for parent in gone.parents:
        if parent == folder or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()


def _unusable(folder: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"--out {folder}: {error.strerror}: {error.filename}. Choose another folder."
    )


def _former(folder: Path, target: str) -> set[str]:
    """The files of an export of this form that is there already."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise InvalidInput(f"--out {folder} is a file; name a folder.")
    if not any(folder.iterdir()):
        return set()
    try:
        former = read(folder)
    except InvalidInput as error:
        raise InvalidInput(
            f"--out {folder} holds files and no export of ours, which could be replaced: {error} "
            "Name an empty or a new folder."
        ) from error
    if former.target != target:
        raise InvalidInput(
            f"--out {folder} holds an export of {former.target}, which one of {target} would take "
            "away. Name another folder."
        )
    return set(former.files)
