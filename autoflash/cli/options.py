"""The options that several commands share, and how they reach the layers below."""

from __future__ import annotations

import fnmatch
import os
from typing import TYPE_CHECKING, Annotated

import typer

from autoflash import settings
from autoflash.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from autoflash.database import Database
    from autoflash.device import Device

ArchOption = Annotated[
    str,
    typer.Option(
        "--arch",
        metavar="ARCH",
        help="sm80, sm86, sm89, sm90, sm100, sm120, cpu, or native: the device found here. "
        "One that is not here is planned and compiled for, and its times are predicted.",
    ),
]
HereOption = Annotated[
    str,
    typer.Option(
        "--arch",
        metavar="ARCH",
        help="sm80, sm86, sm89, sm90, sm100, sm120, cpu, or native: the device found here.",
    ),
]
AnyArchOption = Annotated[
    str | None, typer.Option("--arch", metavar="ARCH", help="Only of this arch.")
]
AnyDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Only of this device: its name, such as nvidia-h200, its key, or native.",
    ),
]
TemplatesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--templates", metavar="GLOB", help="Only these templates, such as 'cpp/*'; repeatable."
    ),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--effort",
        metavar="quick|normal|full",
        help="How long to search; without it, quick on a CPU and normal on a GPU.",
    ),
]
TrialsOption = Annotated[
    int | None, typer.Option("--trials", metavar="N", min=1, help="Most trials per problem.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="SQLAlchemy URL of the tuning database (AUTOFLASH_DATABASE; default: SQLite in the "
        "cache directory).",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs", metavar="N", min=1, help="Compile processes at once (AUTOFLASH_JOBS; default: "
        "the cores this process may use).",
    ),
]  # fmt: skip
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="all|N,N...",
        help="Tune on several devices of this host at once, each with problems of its own: their "
        "numbers or UUIDs, all of one kind. Default: the first.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the search and of the random inputs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def use(*, jobs: int | None = None, database: str | None = None) -> settings.Settings:
    """Let options beat the environment, for this process and the ones that it starts."""
    if jobs is not None:
        os.environ["AUTOFLASH_JOBS"] = str(jobs)
    if database is not None:
        os.environ["AUTOFLASH_DATABASE"] = database
    # `bench` calls attention() as a model does, but those calls are no model's.
    os.environ.pop("AUTOFLASH_RECORD", None)
    settings.get.cache_clear()
    return settings.get()


def default_effort(device: Device) -> str:
    """The effort that is meant where none is asked for: a CPU's user has it at hand, and waits."""
    return "normal" if device.is_cuda else "quick"


def template_names(globs: list[str] | None) -> list[str] | None:
    """The installed templates that the globs name; None where none was given.

    Raises:
        UnknownName: a glob names no template.
    """
    if not globs:
        return None
    from autoflash.codegen import catalog

    known = catalog.installed().templates
    wanted = [word.strip() for text in globs for word in text.split(",") if word.strip()]
    for glob in wanted:
        if not fnmatch.filter(known, glob):
            raise UnknownName.of("template", glob, known)
    return [name for name in known if any(fnmatch.fnmatchcase(name, glob) for glob in wanted)]


def device_key(text: str | None, db: Database) -> str | None:
    """The Device.key that --device means among those the database knows.

    Raises:
        UnknownName: the database knows no such device.
        InvalidInput: it knows several, such as one GPU with different numbers of SMs.
    """
    if text is None:
        return None
    if text == "native":
        from autoflash import device

        return device.native().key
    known = {key: key.partition(":")[0] for key in db.device_keys()}
    found = [key for key, slug in known.items() if text.lower() in (key, slug)]
    if not found:
        raise UnknownName.of("device", text, {*known.values(), "native"})
    if len(found) > 1:
        raise InvalidInput(f"--device {text} could be any of {', '.join(found)}; give one of them.")
    return found[0]
