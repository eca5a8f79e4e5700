"""What was exported, as `export` prints it."""

from __future__ import annotations

from autoflash.cli.output import remark, say, write_json
from autoflash.export import Bundle, Selection


def exported(bundle: Bundle, selection: Selection, as_json: bool) -> None:
    """The end of `export`: what was written, for which device, and what was left out."""
    for reason, count in selection.left_out.items():
        remark(f"{count} left out: {reason}; tune again to have them exported")
    if others := sum(not entry.won for entry in selection.entries):
        remark(
            f"for {others} of {len(selection.entries)} problems no kernel of this target holds the "
            "title; the fastest trial of one stands in, never timed beside its rivals"
        )
    if as_json:
        write_json(
            {
                "target": bundle.target,
                "folder": str(bundle.folder),
                "device": selection.device.slug,
                "entries": len(bundle.entries),
                "left_out": dict(selection.left_out),
                "files": dict(bundle.files),
            }
        )
        return
    device = selection.device
    kernels = len({entry.source.digest for entry in selection.entries})
    what = {
        "problem": len(bundle.entries), "kernel": kernels, "dispatch table": len(selection.tables)
    }  # fmt: skip
    counts = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in what.items())
    say(f"{bundle.target}: {counts}, tuned on {device.name} ({device.arch})")
    for path in bundle.files:
        say(f"  {bundle.folder / path}")
