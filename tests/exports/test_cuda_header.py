"""Compilers read the exported header, and it says what the records say."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from support.exports import H200, selection, tried, written

from autoflash import export
from autoflash.build import nvcc
from autoflash.errors import InvalidInput
from autoflash.export import Entry

_absent = nvcc.unavailable()
HEADER = "autoflash_nvidia_h200.h"


def lookup(entry: Entry) -> str:
    """The call that asks for a winner."""
    kernel, problem = entry.template.name.partition("/")[2], entry.problem
    arguments = (problem.head_dim, problem.head_dim_v, problem.causal, problem.local,
                 problem.element_size, problem.seqlen_q, problem.softcapped)  # fmt: skip
    return f"autoflash::nvidia_h200::{kernel}::tile({', '.join(map(str, arguments)).lower()})"


def claims(entry: Entry) -> list[str]:
    """static_asserts of the tunables, what is launched, and that there is a tile at all."""
    tile, space = lookup(entry), lookup(entry).partition("::tile")[0]
    facts = {**entry.source.options, **entry.config, "found": True}
    said = []
    for name, value in facts.items():
        text = str(value).lower() if isinstance(value, bool) else value
        if isinstance(value, str):
            enum = "".join(part.capitalize() for part in name.split("_"))
            text = f"{space}::{enum}::k{value.capitalize()}"
        said.append(f'static_assert({tile}.{name} == {text}, "{entry.problem.name}: {name}");')
    return said


def checked(folder: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """What g++ says of a file that includes the header and has these lines."""
    (folder / "claims.cpp").write_text("\n".join([f'#include "{HEADER}"', *lines, ""]))
    flags = ["-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"]
    command = ["g++", *flags, "claims.cpp"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_table_of_the_reviewed_records_says_what_they_say(tmp_path: Path) -> None:
    chosen = selection("cuda-header", pack=H200)
    written(tmp_path, "cuda-header", chosen)
    newest: dict[str, Entry] = {}
    for entry in sorted(chosen.entries, key=lambda entry: entry.problem.flops):
        newest[lookup(entry)] = entry  # of those that the table cannot tell apart, most work
    assert len(newest) > 30
    lines = [claim for entry in newest.values() for claim in claims(entry)]
    done = checked(tmp_path, lines)
    assert done.returncode == 0, done.stderr

    wrong = next(line for line in lines if ".num_stages == 2" in line).replace("== 2", "== 3")
    assert checked(tmp_path, [wrong]).returncode != 0
    nothing = "static_assert(!autoflash::nvidia_h200::fwd_sm90::tile(80, 80, true, false, 2, 1024)"
    assert checked(tmp_path, [nothing + ".found);"]).returncode == 0


@pytest.mark.compile
@pytest.mark.skipif(_absent is not None, reason=f"it needs {_absent}")
def test_nvcc_takes_it_in_host_and_device_code(tmp_path: Path) -> None:
    found = nvcc.compiler()
    written(tmp_path, "cuda-header", selection("cuda-header", pack=H200))
    code = f"""
    #include "{HEADER}"
    namespace tiles = autoflash::nvidia_h200::fwd_sm90;
    constexpr auto kTile = tiles::tile(128, 128, true, false, 2, 4096);
    static_assert(kTile.found && kTile.smem_bytes > 0);
    __global__ void __launch_bounds__(kTile.num_threads) kernel(int* out, int seqlen) {{
        out[0] = tiles::tile(128, 128, true, false, 2, seqlen).block_n + kTile.block_m;
    }}
    """
    (tmp_path / "use.cu").write_text(code)
    folders = [f"-I{folder}" for folder in found.includes]
    flags = ["-std=c++17", "-arch=sm_90", "-cubin", "-Werror=all-warnings"]
    command = [*shlex.split(found.command), *folders, *flags, "use.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "use.cubin").stat().st_size > 0


def test_lengths_between_have_the_nearer_tile_and_work_decides_among_equals(tmp_path: Path) -> None:
    kernel = "cuda/fwd_sm80"
    trials = [
        tried(kernel, "b1s1024h8d64c", tunables={"block_n": 80}),
        tried(kernel, "b1s4096h8d64c", tunables={"block_n": 64}),
        tried(kernel, "b4s4096h8d64c", tunables={"block_n": 96}),
        tried(kernel, "b1s1024h8d64c-bfloat16-unaligned", tunables={"block_n": 112}),
        tried(kernel, "b1s1024h8d64cw63", tunables={"block_n": 128}),
    ]
    chosen = selection("cuda-header", *trials)
    assert not any(entry.won for entry in chosen.entries)
    [text] = export.target("cuda-header").files(chosen, export.Options(name="tiles")).values()
    assert isinstance(text, str)
    (tmp_path / HEADER).write_text(text)
    asked = {("false", 1): 80, ("false", 2048): 80, ("false", 2049): 96, ("false", 99999): 96,
             ("true", 1024): 128}  # fmt: skip
    device = chosen.device.slug.replace("-", "_")
    lines = [
        f"static_assert(tiles::{device}::fwd_sm80::tile(64, 64, true, {local}, 2, {seqlen}).block_n"
        f" == {block_n});"
        for (local, seqlen), block_n in asked.items()
    ]
    done = checked(tmp_path, lines)
    assert done.returncode == 0, done.stderr
    assert "not here: b1s4096h8/8d64c-bfloat16" in text
    assert "fastest trial of these templates" in text


def test_names_that_are_none_and_tables_of_nothing_are_refused() -> None:
    target = export.target("cuda-header")
    chosen = selection("cuda-header", winners=(tried("cuda/fwd_sm80"),))
    with pytest.raises(InvalidInput, match="3d"):
        target.files(chosen, export.Options(name="3d"))
    unaligned = tried("cuda/fwd_sm80", "b1s1024h8d64c-bfloat16-unaligned")
    with pytest.raises(InvalidInput, match="unaligned"):
        target.files(selection("cuda-header", winners=(unaligned,)), export.Options())
