"""An export in the layout of Hugging Face kernels: that library and transformers load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import exports

from autoflash import device as devices
from autoflash.errors import InvalidInput
from autoflash.export import Options, Selection, target, write

kernels = pytest.importorskip("kernels", reason="needs autoflash[frameworks]")
pytest.importorskip("transformers", reason="needs autoflash[frameworks]")

H200 = [  # one of each family, and one of which there is no library
    "b4s4096h32/8d128c-bfloat16",
    "b16s1024h8/8d256c-bfloat16",
    "b4s4096h16/16d128c-float8_e4m3fn",
]
LOAD = """
import json, os, sys, warnings
folder, name = sys.argv[1:]
os.environ.update(LOCAL_KERNELS=f"{name}={folder}", HF_HUB_OFFLINE="1")
sys.modules["autoflash"] = None  # an export needs none
from pathlib import Path
import kernels, torch
from transformers import LlamaConfig, LlamaForCausalLM

told = []
warnings.showwarning = lambda message, *_: told.append(str(message))
warnings.simplefilter("always")
local = kernels.get_local_kernel(Path(folder))
named = kernels.get_kernel(name, version=1)
functions = sys.modules[local.__name__ + "._flash_attn"]
calls, attention = [], functions.attention

def count(q, k, v, **options):
    calls.append(tuple(q.shape[:2]))
    return attention(q, k, v, **options)

functions.attention = count
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.3,
)).eval()
tokens = torch.randint(3, 128, (3, 11))
results = []
for padding in (0, 4):
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    pair, before = [], len(calls)
    for implementation in ("sdpa", name):
        model.set_attn_implementation(implementation, allow_all_kernels=True)
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits[mask.bool()]
        shapes = sorted(set(calls[before:]))
        made = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
        pair.append((logits, made))
    (one, ours), (two, theirs) = pair
    results.append([(one - two).abs().max().item(), torch.equal(ours, theirs), shapes])
q = torch.randn(2, 9, 4, 16)
out, lse, none = local.flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
compiled = torch.compile(
    lambda q: local.flash_attn_func(q, q, q, causal=True), fullgraph=True, backend="aot_eager"
)
print(json.dumps({
    "same": local is named,
    "module": local.__name__,
    "results": results,
    "lse": list(lse.shape),
    "compiled": torch.equal(compiled(q), out),
    "prepared": sys.modules[local.__name__ + "._load"].prepare.cache_info().currsize,
    "told": [line for line in told if "PyTorch serves" in line],
}))
"""


def loaded(folder: Path, name: str) -> dict[str, Any]:
    """What a process says that has the libraries and an export, and no autoflash."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTOFLASH_")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), name],
        capture_output=True, text=True, cwd=folder.parent, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def check(said: dict[str, Any]) -> None:
    """Of a batch without padding, then of one whose first sequence has four tokens of it."""
    for (error, tokens_equal, shapes), wanted in zip(
        said["results"], ([[3, 11]], [[1, 7], [2, 11]]), strict=True
    ):
        assert error < 1e-4
        assert tokens_equal
        assert shapes == wanted


def tuned_here() -> Selection:
    """The default of the CPU's template as the winner of what a small Llama asks."""
    names = ("b3s1x16h4/2d16c-float32", "b3s11h4/2d16c-float32", "b2s9h4d16c-float32")
    here = devices.for_arch("cpu")
    return exports.selected(exports.won("cpp/fwd", name, here) for name in names)


@pytest.fixture(scope="module")
def h200() -> Selection:
    found = exports.reviewed(*H200)
    assert len(found.entries) == len(H200)
    return found


def test_a_model_runs_on_the_kernels_of_an_export(tmp_path: Path) -> None:
    selection = tuned_here()
    files = target("hf-kernel").files(selection, Options(name="autoflash-attn"))
    write(tmp_path / "export", "hf-kernel", selection, files)
    said = loaded(tmp_path / "export", "someone/autoflash-attn")
    assert said["same"]
    assert said["module"].startswith("_autoflash_attn_cpu_")
    check(said)
    assert (said["lse"], said["compiled"]) == ([2, 4, 9], True)
    assert said["told"] == []  # kernels served
    assert said["prepared"] >= 2


def test_an_export_for_a_gpu_is_right_without_one(tmp_path: Path, h200: Selection) -> None:
    options = Options(binaries=False)
    files = target("hf-kernel").files(h200, options)
    assert files == target("hf-kernel").files(h200, options)  # the same bytes
    write(tmp_path / "export", "hf-kernel", h200, files)
    said = loaded(tmp_path / "export", "someone/tuned")  # whatever the name
    assert said["module"].startswith("_autoflash_nvidia_h200_cpu_")
    check(said)
    assert "are for NVIDIA H200 (sm90), not for cpu" in said["told"][0]
    assert said["prepared"] == 0


def test_the_kernels_library_reads_what_is_said_of_it(tmp_path: Path, h200: Selection) -> None:
    from kernels._rust import Backend, Build, Metadata

    files = target("hf-kernel").files(h200, Options(binaries=False))
    write(tmp_path / "export", "hf-kernel", h200, files)
    assert Build.open(tmp_path / "export").general.backends == [Backend.CUDA, Backend.CPU]
    ids = set()
    for variant, backend, archs in (
        ("torch-cuda", Backend.CUDA, ["9.0a"]),
        ("torch-cpu", Backend.CPU, None),
    ):
        said = Metadata.read_from_file(tmp_path / "export" / "build" / variant / "metadata.json")
        assert (str(said.name), said.version) == ("autoflash-nvidia-h200", 1)
        assert (said.backend.backend_type, said.backend.archs) == (backend, archs)
        assert said.id.isidentifier()
        ids.add(said.id)
    assert len(ids) == 2
    assert {Path(path).suffix for path in files if "/kernels/" in path} == {".cu", ".py"}
    assert not any("/kernels/" in path for path in files if "torch-cpu" in path)
    card = str(files["README.md"])
    assert "| b4s4096h32/8d128c-bfloat16 | `cuda/fwd_sm90` |" in card
    assert "Libraries were not shipped" in card
    assert "torch 2.11.0+cu130" in card


@pytest.mark.parametrize("name", ["Autoflash", "2fast", "fast-", "fast_attention", "user/fast"])
def test_names_that_the_kernels_library_refuses(h200: Selection, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"--name {name}: the kernels library takes"):
        target("hf-kernel").files(h200, Options(name=name, binaries=False))
    from kernels._rust import KernelName

    with pytest.raises(ValueError, match="name"):
        KernelName(name)
