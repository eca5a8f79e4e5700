"""Does an export still hold, here and now? Its files, its kernels, its winners against the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflash import device as devices
from autoflash.codegen import catalog as catalogs
from autoflash.codegen.catalog import Catalog
from autoflash.device import Device
from autoflash.export import bundle as bundles
from autoflash.export import integrity, rematch
from autoflash.export.bundle import Bundle
from autoflash.export.rematch import Match
from autoflash.tuning import effort as efforts
from autoflash.tuning.effort import Effort
from autoflash.tuning.environment import environment

__all__ = ["Match", "Verification", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        bundle: the export.
        device: on which.
        files: how they differ from the manifest.
        differences: between then and now, a line each: warnings.
        skipped: why no kernel was run; None: they were.
        matches: what became of each winner; empty where none was run.
    """

    bundle: Bundle
    device: Device
    files: integrity.Files
    differences: tuple[str, ...]
    skipped: str | None
    matches: tuple[Match, ...]

    @property
    def is_wrong(self) -> bool:
        """Whether a file is not what was written, a result wrong, or a winner slower."""
        return not self.files.intact or any(match.is_bad for match in self.matches)

    @property
    def is_partial(self) -> bool:
        """Whether something was not checked."""
        return self.skipped is not None or any(m.verdict == "unchecked" for m in self.matches)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "folder": str(self.bundle.folder),
            "target": self.bundle.target,
            "device": self.device.to_dict(),
            "status": "wrong" if self.is_wrong else "partial" if self.is_partial else "ok",
            "files": {
                "checked": len(self.bundle.files),
                "missing": list(self.files.missing),
                "changed": list(self.files.changed),
                "extra": list(self.files.extra),
            },
            "differences": list(self.differences),
            "skipped": self.skipped,
            "winners": [match.to_dict() for match in self.matches],
        }


def verify(
    folder: Path,
    *,
    effort: str | Effort = "quick",
    on_step: Callable[[str], None] = lambda line: None,
    catalog: Catalog | None = None,
) -> Verification:
    """Check an export's files, and, where they are intact and its device fits, its kernels.

    Nothing of an export is executed in this process, and nothing at all of one whose files are not
    as they were written.

    Args:
        folder: holds the manifest.
        effort: how long winners are raced, as in tuning.
        on_step: told what goes on, a line at a time.
        catalog: the templates; None: those installed.

    Raises:
        InvalidInput: there is no export in that folder.
        UnknownName: there is no such effort.
        CacheError: another process tunes this device, or the cache cannot be written.
    """
    budget = efforts.of(effort)
    bundle = bundles.read(folder)
    known = catalog or catalogs.installed()
    on_cpu = bundle.header["device"]["arch"] == "cpu"
    here = devices.for_arch("cpu") if on_cpu else devices.native()
    files = integrity.files(bundle)
    skipped = integrity.misfit(bundle, here)
    if not files.intact:
        skipped = "files are not as they were written; export again, or take those back"
    matches = () if skipped else rematch.play(bundle, here, budget, known, on_step)
    return Verification(
        bundle=bundle,
        device=here,
        files=files,
        differences=tuple(integrity.differences(bundle, here, environment(here), known)),
        skipped=skipped,
        matches=tuple(matches),
    )
