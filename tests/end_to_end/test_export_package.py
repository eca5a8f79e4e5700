"""An exported package works where autoflash is not: installed, imported, compiled and computing."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support import exports, venvs

from autoflash.build import nvcc
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.device import KNOWN_GPUS, for_arch
from autoflash.dispatch_table import Bound, DispatchTable, Family, Leaf, Probe
from autoflash.errors import InvalidInput
from autoflash.export import Options, Selection, package, write
from autoflash.problem import Problem
from autoflash.runtime.dispatch import Dispatcher, Learned

SUPPORT = Path(__file__).parents[1] / "support"
SOURCES = Options(binaries=False)
SM80 = KNOWN_GPUS["sm80"]
TRITON_WINNERS = [
    exports.won("triton/fwd", "b1s256h4/2d64c-float16", SM80),
    exports.won("triton/fwd", "b1s128h2d32f-float32", SM80),
    exports.won("triton/fwd", "b1s128h2d64cw40cap20-float16", SM80),
    # Few rows, many keys: parts of them are put together by a second kernel.
    exports.won("triton/fwd", "b1s4x1024h4/2d64c-float16", SM80),
]


def cpu_selection() -> Selection:
    here = for_arch("cpu")
    names = ("b1s256h4/2d64c-float32", "b1s256h4/2d64f-bfloat16", "b1s192h2d48cw50cap20-float32")
    return exports.selected(exports.won("cpp/fwd", name, here) for name in names)


def case(q: tuple[int, ...], k: tuple[int, ...], dtype: str, **others: Any) -> dict[str, Any]:
    names = {"dim_v", "pitch", "compiled"}
    return {
        "q": q,
        "k": k,
        "v": (*k[:3], others.get("dim_v", k[3])),
        "dtype": dtype,
        **{name: value for name, value in others.items() if name in names},
        "options": {name: value for name, value in others.items() if name not in names},
    }


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a selection and installs that with pip: the interpreter of where it is."""
    root = tmp_path_factory.mktemp("exported")
    python = venvs.venv(root / "venv", venvs.dependencies(root / "dependencies"))

    def install(selection: Selection, name: str, options: Options = SOURCES) -> Path:
        files = package.package_files(selection, dataclasses.replace(options, name=name))
        write(root / name, "package", selection, files)
        venvs.run(python, *venvs.PIP, root / name, cwd=root)
        return python

    return install


def serve(python: Path, name: str, cases: Iterable[Any], **environment: str) -> list[Any]:
    """What the installed package answers to cases, no GPU being visible."""
    done = subprocess.run(
        [str(python), str(SUPPORT / "exported.py"), name],
        input=json.dumps(list(cases)), cwd=python.parent, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def right(found: Any) -> bool:
    return bool(found["error"] <= found["allowed"] and found["lse_error"] < 1e-4)


# Installed, without autoflash and without a GPU --------------------------------------------------


def test_installed_on_a_cpu_it_computes(install: Callable[..., Path]) -> None:
    python = install(cpu_selection(), "tuned_cpu", Options())
    cases = [
        case((1, 256, 4, 64), (1, 256, 2, 64), "float32", causal=True),
        case((2, 201, 4, 64), (2, 70, 2, 64), "float32", causal=True),
        case((1, 70, 4, 64), (1, 201, 2, 64), "float32", causal=True, layout="bhsd"),
        case((1, 99, 4, 64), (1, 131, 2, 64), "bfloat16", pitch=8),
        case((1, 99, 2, 48), (1, 131, 2, 48), "float32", causal=True, window_size=(30, 0),
             softcap=20.0, compiled=True),
        case((1, 64, 4, 64), (1, 64, 2, 64), "float32", causal=True, softmax_scale=-0.2),
        # Nothing was tuned for these.
        case((1, 40, 4, 32), (1, 50, 1, 32), "float32", causal=True),
        case((1, 50, 4, 64), (1, 30, 4, 64), "float16", window_size=(5, 9)),
        case((1, 50, 4, 64), (1, 50, 4, 64), "float64"),
        case((1, 5, 4, 64), (1, 0, 2, 64), "float32", causal=True),
    ]  # fmt: skip
    found = serve(python, "tuned_cpu", cases)
    assert [each["rule"] for each in found[:6]] == ["exact"] + ["nearest"] * 5
    assert [each["rule"] for each in found[6:9]] == ["torch"] * 3
    assert all(right(each) for each in found), found
    assert not any(each["said"] for each in found[:6])
    for each in found[6:9]:
        [warning] = each["said"]
        assert "PyTorch serves attention" in warning
        assert "nothing near it was tuned" in warning


def test_installed_kernels_in_triton_are_right_under_the_interpreter(
    install: Callable[..., Path],
) -> None:
    python = install(exports.selected(TRITON_WINNERS), "tuned_triton")
    cases = [
        case((1, 256, 4, 64), (1, 256, 2, 64), "float16", causal=True),
        case((2, 133, 4, 64), (2, 70, 2, 64), "float16", causal=True),
        case((1, 65, 2, 32), (1, 90, 2, 32), "float32", layout="bhsd"),
        case((1, 100, 2, 64), (1, 131, 2, 64), "float16", causal=True, window_size=(30, 0),
             softcap=20.0),
        case((1, 4, 4, 64), (1, 1024, 2, 64), "float16", causal=True),
    ]  # fmt: skip
    found = serve(python, "tuned_triton", cases, TRITON_INTERPRET="1")
    rules = [each["rule"] for each in found]
    assert rules == ["exact", "nearest", "nearest", "nearest", "exact"]
    assert all(right(each) for each in found), found
    assert len({each["kernel"] for each in found}) == 4
    # Without the interpreter those kernels are for a GPU that is not here: PyTorch serves.
    [by_torch] = serve(python, "tuned_triton", cases[:1])
    assert right(by_torch)
    assert "for NVIDIA A100-SXM4-80GB (sm80), not for cpu" in by_torch["said"][0]


COMPILE = """
import importlib, json, sys
name = sys.argv[1]
table, triton = (importlib.import_module(f"{name}.{part}") for part in ("_table", "_triton"))
found = {}
for each, facts in table.table()["kernels"].items():
    module = triton.module_of(each)
    for function in ("kernel", "combine"):
        if facts["language"] == "python" and hasattr(module, function):
            made = triton.compiled(module, each, function)
            # A launcher takes its arguments in the order of the signature.
            assert [*made.src.signature] == getattr(module, function).arg_names
            found[f"{each}.{function}"] = [made.metadata.target.arch, len(made.asm["cubin"])]
print(json.dumps(found))
"""


@pytest.mark.compile
@pytest.mark.parametrize(
    ("selection", "functions"),
    [
        (exports.selected(TRITON_WINNERS), 5),
        (exports.reviewed("b16s1024h8/8d256c-bfloat16"), 1),  # in Gluon
    ],
    ids=["triton for sm80", "gluon for sm90"],
)
def test_installed_kernels_compile_without_a_gpu(
    selection: Selection, functions: int, install: Callable[..., Path], tmp_path: Path
) -> None:
    name = f"tuned_compiled_{functions}"
    python = install(selection, name)
    said = venvs.run(
        python, "-c", COMPILE, name, cwd=tmp_path,
        environment={"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    found = json.loads(said)
    assert len(found) == functions
    assert {arch for arch, _ in found.values()} == {selection.device.capability}
    assert min(size for _, size in found.values()) > 1000


# Which kernel serves ------------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Exports a selection and imports that here, under a name of its own."""

    def load(selection: Selection, name: str, options: Options = SOURCES) -> types.ModuleType:
        files = package.package_files(selection, dataclasses.replace(options, name=name))
        write(tmp_path / name, "package", selection, files)
        monkeypatch.syspath_prepend(tmp_path / name)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return importlib.import_module(name)

    return load


def asked(table: types.ModuleType, problem: Problem) -> Any:
    return table.Problem(**problem.to_dict())


def drawn(count: int, seed: int = 0) -> list[Problem]:
    """Shapes between those of the H200's winners, as a model may ask for them."""
    some = random.Random(seed)
    names = [
        f"b{some.randint(1, 8)}s{some.randint(1025, 20000)}h{some.choice([8, 16, 24, 32])}"
        f"/{some.choice([1, 2, 4, 8])}d{some.choice([64, 96, 128, 192, 256])}{some.choice('cf')}"
        f"-{some.choice(['bfloat16', 'float8_e4m3fn'])}"
        for _ in range(count)
    ]
    return [Problem.parse(name) for name in names]


def test_the_table_picks_what_autoflash_would(load: Callable[..., types.ModuleType]) -> None:
    selection = dataclasses.replace(exports.reviewed(), tables=exports.reviewed_tables())
    table = load(selection, "tuned_h200")._attention.choices.__globals__
    choices, facts = table["choices"], table["table"]()["kernels"]
    records = [entry.record for entry in selection.entries]
    learned = Learned(records, selection.tables)
    served = Dispatcher(selection.device, learned, installed(), missing=lambda *_: None)
    rules = {"exact": "exact", "table": "table", "bucket": "nearest"}
    exported = {facts["source_digest"] for facts in facts.values()}
    seen = set()
    for problem in [*(entry.problem for entry in selection.entries), *drawn(150)]:
        expected = next(served.choices(problem))
        found = next(choices(table["Problem"](**problem.to_dict())), None)
        if expected.rule == "default":  # 8 bits, and a head_dim that was not tuned with them
            assert found is None, problem.name
            continue
        # A default that looks at sizes is in a package as it was at the nearest shape.
        config = (
            expected.record.config if expected.record else default_near(expected.table, problem)
        )
        template = installed().get(config.template)
        source = template.render(config, problem, selection.device)
        if source.digest not in exported:  # in Gluon, a source for each number of heads a group
            assert (template.language, problem.group_size > 1) == ("python", True)
            continue
        assert found is not None, problem.name
        assert (found[0], facts[found[1]]["source_digest"]) == (
            rules[expected.rule],
            source.digest,
        ), problem.name
        seen.add(found[0])
    assert seen == {"exact", "table", "nearest"}


def default_near(table: DispatchTable | None, problem: Problem) -> Config:
    """The default at the nearest shape that a table was chosen by; all its leaves say so here."""
    assert table is not None
    assert [leaf.config for leaf in table.leaves] == [None]
    chosen_by = [probe for probe in table.probes if not probe.held_out]
    return table.configs[min(chosen_by, key=lambda p: problem.distance(p.problem)).default]


def test_a_kernel_serves_only_what_it_was_compiled_for(
    load: Callable[..., types.ModuleType],
) -> None:
    table = load(exports.selected(TRITON_WINNERS), "tuned_traits")._attention
    ask = lambda name: list(table.choices(asked(table, Problem.parse(name)).settled()))  # noqa: E731
    assert ask("b1s256h4/2d64c-float16")[0][0] == "exact"
    for other in (
        "b1s256h4/2d64c-bfloat16", "b1s256h4/2d64f-float16", "b1s256h4/2d64ccap20-float16",
        "b1s256h4/2d64cw9-float16", "b1s256h4/2d32c-float16", "b1s256h4/2d64x32c-float16",
        "b1s256h4/2d64c-float16-unaligned", "b1s1x1048576h4/2d64c-float16",
    ):  # fmt: skip
        assert ask(other) == [], other
    # How many heads share keys is in the source of Triton's kernels.
    assert ask("b1s256h8/1d64c-float16") == []


def test_dispatch_tables_serve_between_the_winners(load: Callable[..., types.ModuleType]) -> None:
    tuned = exports.won("triton/fwd", "b4s512h8d64c-float16", SM80, tunables={"num_splits": 1})
    long = Problem.parse("b1s8192h8d64c-float16")
    values = {**tuned.config, "num_warps": 4, "num_stages": 3}
    other = Config.of("triton/fwd", values)
    assert installed().get("triton/fwd").broken(other, long, SM80) is None
    shapes = [Problem.parse(f"b1s{rows}h8d64c-float16") for rows in (1024, 2048, 8192)]
    dispatch = DispatchTable(
        device=SM80, family=Family.of(long), policy="test-turns",
        digests={"triton/fwd": tuned.template_digest}, configs=(tuned.config, other),
        leaves=(
            Leaf(where=(Bound("tiles", None, 100),), config=None, probes=1, mean=0.0, worst=0.0),
            Leaf(where=(Bound("tiles", 100, None),), config=1, probes=2, mean=0.0, worst=0.0),
        ),
        probes=tuple(
            Probe(problem=shape, held_out=False, times_us=(2.0, 1.0), default=0)
            for shape in shapes
        ),
        created="2026-11-21T10:00:00Z",
    )  # fmt: skip
    chosen = exports.selected([tuned], tables=(dispatch,))
    table = load(chosen, "tuned_tables")._attention
    kernels = table.table()["kernels"]

    def first(name: str) -> tuple[str, dict[str, Any]]:
        rule, kernel = next(table.choices(asked(table, Problem.parse(name))))
        return rule, kernels[kernel]["config"]

    assert first("b4s512h8d64c-float16") == ("exact", dict(tuned.config))
    assert first("b1s1000h8d64c-float16") == ("table", dict(tuned.config))  # 64 tiles: default
    assert first("b1s5000h8d64c-float16") == ("table", dict(other))
    for name in ("b1s1000h8d64c-float16", "b3s9000h8d64c-float16", "b8s200h8d64c-float16"):
        leaf = dispatch.leaf(Problem.parse(name))
        assert (leaf is not None) == (first(name)[0] == "table"), name


# What is written ---------------------------------------------------------------------------------


def test_all_reviewed_winners_are_exported_and_always_alike(tmp_path: Path) -> None:
    selection = exports.reviewed()
    files = package.package_files(selection, SOURCES)
    again = package.package_files(exports.reviewed(), SOURCES)
    assert files == again
    name = "autoflash_kernels_nvidia_h200"
    table = json.loads(files[f"{name}/table.json"])
    assert len(table["winners"]) == len(selection.entries) > 0
    digests = {entry.source.digest for entry in selection.entries}
    assert {facts["source_digest"] for facts in table["kernels"].values()} == digests
    for kernel in package.kernels(selection):
        text = files[f"{name}/kernels/{kernel.file}"]
        assert text.startswith(kernel.source.text)
        assert ("launch_bound" in text) == (kernel.source.language == "cuda")
    assert not [path for path in files if path.endswith((".so", "libraries.json"))]
    for path, text in files.items():
        if path.endswith(".py"):
            assert not imports(text) & {"autoflash", "jinja2", "optuna", "sqlalchemy"}, path
            ast.parse(text, feature_version=(3, 10))


def imports(text: str | bytes) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_a_name_that_no_package_can_have_is_refused() -> None:
    for name in ("3d", "a b", "class", "../x", "autoflash", "torch", "triton", "json"):
        why = "hide the module" if name.isidentifier() and name != "class" else "has a name of"
        with pytest.raises(InvalidInput, match=f"--name '{name}'.*{why}"):
            Options(name=name).module("tuned")
    assert Options(name="my-kernels").module("tuned") == "my_kernels"
    assert Options().module("tuned") == "tuned"


def test_files_that_were_changed_are_not_run(load: Callable[..., types.ModuleType]) -> None:
    import torch

    loaded = load(cpu_selection(), "tuned_changed", Options())
    kernels = Path(loaded.__file__ or "").parent / "kernels"
    q = torch.randn(1, 64, 4, 64)
    k = torch.randn(1, 64, 2, 64)
    [library] = {
        f"{name}.so"
        for _, name in loaded._attention.choices(
            loaded._attention.problem_of(q, k, k, True, (None, None), 0.0, "bshd")
        )
    }
    whole = (kernels / library).read_bytes()
    (kernels / library).write_bytes(whole + b"\0")
    with pytest.raises(RuntimeError, match=f"{library} is not what was exported"):
        loaded.flash_attn_func(q, k, k, causal=True)
    (kernels / library).unlink()
    with pytest.warns(UserWarning, match=r"is not built\. In its folder, run: g\+\+"):
        loaded.flash_attn_func(q, k, k, causal=True)
    # Whoever builds it by that command may do so with another compiler.
    listed = json.loads((kernels / "libraries.json").read_text())
    (kernels / "libraries.json").write_text(
        json.dumps({name: digest for name, digest in listed.items() if name != library})
    )
    # One for another processor, system or libc is no more than missing.
    (kernels / library).write_bytes(whole[:18] + b"\xb7\0" + whole[20:])  # e_machine: AArch64
    loaded._attention._prepared.clear()
    with pytest.warns(UserWarning, match=r"was not built for this machine \(.*run there: g\+\+"):
        assert loaded.flash_attn_func(q, k, k, causal=True).shape == q.shape
    (kernels / library).unlink()
    command = loaded._attention.table()["commands"][Path(library).stem]
    subprocess.run(command, shell=True, cwd=kernels, check=True)
    loaded._attention._prepared.clear()
    out = loaded.flash_attn_func(q, k, k, causal=True)
    assert (kernels / library).is_file()
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, k)), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
    )  # fmt: skip


def test_what_kernels_cannot_do_is_said(load: Callable[..., types.ModuleType]) -> None:
    import torch

    loaded = load(cpu_selection(), "tuned_refusals")
    q, k = torch.randn(1, 8, 4, 64), torch.randn(1, 8, 2, 64)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0\.1"):
        loaded.flash_attn_func(q, k, k, dropout_p=0.1)
    with pytest.raises(ValueError, match="do not make an attention call"):
        loaded.flash_attn_func(q, k[:, :, :, :32], k)
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        loaded.attention(q[:, :, :3], k, k)
    with pytest.raises(ValueError, match="share dtype and device"):
        loaded.attention(q, k.half(), k)
    with pytest.raises(ValueError, match="window_size"):
        loaded.attention(q, k, k, window_size=(-3, 0))
    with pytest.raises(ValueError, match="last stride"):
        loaded.attention(q[..., ::2], k[..., ::2], k)
    needs = q.clone().requires_grad_()
    with pytest.warns(UserWarning, match="no backward kernels"):
        loaded.attention(needs, k, k, causal=True).sum().backward()
    assert needs.grad is not None
    with pytest.warns(UserWarning, match="nothing near it was tuned"):
        found = loaded.flash_attn_func(needs.detach(), k, k, return_attn_probs=True)
    assert (found[0].shape, found[1].shape, found[2]) == ((1, 8, 4, 64), (1, 4, 8), None)


@pytest.mark.compile
@pytest.mark.slow
def test_libraries_of_cuda_are_built_and_can_be_built_again(tmp_path: Path) -> None:
    if reason := nvcc.unavailable():
        pytest.skip(f"there is no nvcc or there are no headers: {reason}")
    selection = exports.reviewed("b4s4096h16/16d128c-bfloat16")
    files = package.package_files(selection, Options(name="tuned_cuda"))
    write(tmp_path, "package", selection, files)
    [kernel] = package.kernels(selection)
    folder = tmp_path / "tuned_cuda" / "kernels"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [kernel.file, kernel.library, "libraries.json"]
    )
    exported = {"launch_bound", "launch_error"}
    assert exported <= symbols(folder / kernel.library)
    # All but the library and its digest is as without it.
    bare = package.package_files(selection, dataclasses.replace(SOURCES, name="tuned_cuda"))
    assert {path: text for path, text in files.items() if path in bare} == bare

    (folder / kernel.library).unlink()
    readme = files["README.md"]
    assert isinstance(readme, str)
    [command] = [line.strip() for line in readme.splitlines() if "nvcc -" in line]
    cutlass = nvcc.headers().include.parent
    found = nvcc.compiler()
    flags = " ".join([*(f"-I{path}" for path in found.includes),
                      *(f"-L{path}" for path in found.libraries)])  # fmt: skip
    environment = {**os.environ, "CUTLASS": str(cutlass)}
    if shutil.which("nvcc") is None:  # the wheels' must be told where their parts are
        command = command.replace("nvcc", f"{found.command} {flags}", 1)
    subprocess.run(
        command, shell=True, cwd=folder, env=environment, check=True, capture_output=True
    )
    assert exported <= symbols(folder / kernel.library)


def symbols(library: Path) -> set[str]:
    loaded = ctypes.CDLL(str(library))
    names = ("launch_bound", "launch_error", "workspace_bound", "launch")
    return {name for name in names if hasattr(loaded, name)}


@pytest.mark.parametrize("newer", [False, True], ids=["Triton 3.6", "Triton 3.7"])
def test_a_compiled_kernel_is_launched_as_autoflash_does(
    newer: bool, load: Callable[..., types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from autoflash.build import triton

    loaded = load(exports.selected(TRITON_WINNERS[:1]), f"tuned_launch_{int(newer)}")
    launches: list[tuple[Any, ...]] = []
    launcher = types.SimpleNamespace(
        launch=lambda *args: launches.append(args), launch_cooperative_grid=False,
        launch_pdl=False, num_ctas=1, global_scratch_size=0,
        **({"arg_annotations": "annotations", "kernel_signature": "signature"} if newer else {}),
    )  # fmt: skip
    kernel = types.SimpleNamespace(run=launcher, function=11, packed_metadata="packed")
    own = importlib.import_module(f"{loaded.__name__}._triton")
    monkeypatch.setattr(own, "compiled", lambda *_: kernel)
    monkeypatch.setattr(own, "interpreting", lambda: False)
    monkeypatch.setattr(own, "stream", lambda index: 7)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    [(name, _)] = loaded._attention.table()["kernels"].items()
    scalars = [1, 256, 256, 4, 2, 256, 0, *range(100, 112), 0.0]
    q, k, v, out = (torch.empty(1) for _ in range(4))
    own.load(name, 0)(scalars)((q, k, v, out, None), 0.125)

    ours = triton._CompiledFunction(None, kernel, launcher)  # type: ignore[arg-type]
    addresses = [tensor.data_ptr() for tensor in (q, k, v, out)]
    module = own.module_of(name)
    ours.bind(module.grid(*scalars[:5]), (0, *scalars))(*addresses, 0, 0.125, 7)
    assert launches[0] == launches[1]
