"""What became of an export, as `verify` prints it."""

from __future__ import annotations

from autoflash.cli import results
from autoflash.cli.output import remark, say, table, us, write_json
from autoflash.export.verify import Match, Verification
from autoflash.tuning.timing import Comparison


def exit_code(found: Verification) -> int:
    """0 all is well, 5 something is wrong, 4 not everything could be checked."""
    if found.is_wrong:
        return results.EXIT_INVALID
    return results.EXIT_PARTIAL if found.is_partial else results.EXIT_OK


def verified(found: Verification, as_json: bool) -> None:
    """The end of `verify`: files, differences, and a row for each winner."""
    if as_json:
        write_json(found.to_dict())
        return
    bundle, files = found.bundle, found.files
    made_for = bundle.header["device"]
    say(f"{bundle.target} in {bundle.folder}, for {made_for['name']} ({made_for['arch']})")
    intact = len(bundle.files) - len(files.missing) - len(files.changed)
    say(f"{intact} of {len(bundle.files)} files are as they were written")
    for kind in ("missing", "changed", "extra"):
        for path in getattr(files, kind):
            say(f"  {kind}: {path}")
    for line in found.differences:
        remark(f"note: {line}")
    if found.skipped:
        say(f"no kernel was run: {found.skipped}")
        return
    rows = [_row(match) for match in found.matches]
    columns = ("shape", "template", ">recorded us", ">now us", ">vs default", ">vs PyTorch",
               "verdict", "why")  # fmt: skip
    table(f"Raced on {found.device.name}", columns, rows)
    say(
        "vs: how many times faster, with the interval that noise leaves. holds: faster than the "
        "template's default; default: it is that; tie; lost: slower than that."
    )


def _row(match: Match) -> tuple[object, ...]:
    versus_torch = _speedup(match.versus_torch)
    return (
        match.entry["name"],
        match.entry["template"],
        us(match.entry["latency_us"]),
        us(match.now_us),
        _speedup(match.versus_default),
        f"{versus_torch} {match.provider}" if versus_torch else "",
        match.verdict,
        match.reason,
    )


def _speedup(ratio: Comparison | None) -> str:
    if ratio is None:
        return ""
    return f"{1 / ratio.ratio:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]"
