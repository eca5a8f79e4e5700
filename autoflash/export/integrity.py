"""Is an export what was written, and how does where it is now differ from where it was made?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoflash.codegen.catalog import Catalog
from autoflash.device import Device
from autoflash.export.bundle import MANIFEST, Bundle

_COMPARED = ("torch", "triton", "cuda", "cudnn", "driver", "cxx")
"""Versions that decide what a kernel is compiled to and what runs it."""


@dataclass(frozen=True, slots=True)
class Files:
    """How the files of an export differ from its manifest; paths below its folder, sorted.

    Attributes:
        missing: listed and not there.
        changed: there, with another content; also a path that leaves the folder.
        extra: there and not listed. Bytecode that Python left is not meant.
    """

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether all that was written is there as it was written."""
        return not (self.missing or self.changed)


def files(bundle: Bundle) -> Files:
    """Compare the files of an export with its manifest."""
    folder = bundle.folder.resolve()
    missing, changed = [], []
    for path, digest in sorted(bundle.files.items()):
        file = (folder / path).resolve()
        if not file.is_relative_to(folder):
            changed.append(path)
        elif not file.is_file():
            missing.append(path)
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(path)
    there = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    known = {*bundle.files, MANIFEST}
    extra = [
        path.as_posix()
        for path in there
        if path.as_posix() not in known and "__pycache__" not in path.parts
    ]
    return Files(tuple(missing), tuple(changed), tuple(sorted(extra)))


def misfit(bundle: Bundle, device: Device) -> str | None:
    """Why the kernels of an export cannot run on a device, or None."""
    made_for = Device.from_dict(bundle.header["device"])
    if made_for.arch != device.arch:
        return (
            f"it is for {made_for.name} ({made_for.arch}), and this is {device.name} "
            f"({device.arch})"
        )
    if lacking := set(made_for.isa) - set(device.isa):
        return f"{device.name} lacks {', '.join(sorted(lacking))}"
    return None


def differences(
    bundle: Bundle, device: Device, environment: Mapping[str, Any], catalog: Catalog
) -> Iterator[str]:
    """What is not as it was when the records of an export were made, a line each.

    Args:
        bundle: the export.
        device: at hand.
        environment: versions at hand (tuning.environment).
        catalog: templates as installed.
    """
    made_for = Device.from_dict(bundle.header["device"])
    if made_for.arch == device.arch and made_for.key != device.key:
        yield (
            f"tuned on {made_for.name} with {made_for.num_sms} multiprocessors or cores; this is "
            f"{device.name} with {device.num_sms}, where other kernels may win"
        )
    for name in _COMPARED:
        then, now = bundle.header["versions"].get(name), environment.get(name)
        before = then if isinstance(then, list) else [then]
        if then is not None and now is not None and str(now) not in map(str, before):
            yield f"{name} was {', '.join(map(str, before))} and is {now}"
    for name, facts in sorted(bundle.header["templates"].items()):
        template = catalog.templates.get(name)
        if template is None:
            yield f"template {name} is not installed"
        elif template.digest != facts["digest"]:
            yield f"template {name} was {facts['digest']} and is {template.digest}"
