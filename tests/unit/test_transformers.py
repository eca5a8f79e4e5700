"""Models of transformers on autoflash: the same logits and tokens as on sdpa, by our kernels."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autoflash.errors import InvalidInput, UnsupportedProblem
from autoflash.runtime import fallback, warn

transformers = pytest.importorskip("transformers", reason="needs autoflash[frameworks]")

from autoflash.integrations import transformers_attention  # noqa: E402
from autoflash.integrations.transformers import register_transformers  # noqa: E402

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.3,  # else every token is alike, whatever attention does
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
WINDOW = 5
PADDING = {"none": (0, 0, 0), "left": (4, 0, 1), "right": (-4, 0, -1)}


def model_of(kind: str) -> Any:
    """A small model with random weights."""
    torch.manual_seed(0)
    windowed = {**GROUPED, "sliding_window": WINDOW}
    match kind:
        case "llama":
            config = transformers.LlamaConfig(**GROUPED)
        case "gpt2":
            config = transformers.GPT2Config(
                n_embd=64, n_layer=2, n_head=4, vocab_size=128, initializer_range=0.3,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
        case "qwen2":  # its second layer has a window
            config = transformers.Qwen2Config(
                **windowed, use_sliding_window=True, max_window_layers=1
            )
        case "qwen3":
            config = transformers.Qwen3Config(**GROUPED)
        case "gemma2":  # windows in turns, scores capped
            config = transformers.Gemma2Config(
                **windowed, query_pre_attn_scalar=16, attn_logit_softcapping=5.0
            )
        case "gpt_oss":  # windows in turns, a sink for each head
            config = transformers.GptOssConfig(
                **windowed, num_local_experts=2, num_experts_per_tok=1
            )
        case "bert":
            config = transformers.BertConfig(**SIZES)
        case "modernbert":  # windows to both sides
            config = transformers.ModernBertConfig(
                **SIZES, local_attention=6, cls_token_id=3, sep_token_id=4, norm_eps=1e-5
            )
        case _:
            raise AssertionError(kind)
    model = transformers.AutoModelForCausalLM if "bert" not in kind else transformers.AutoModel
    return model.from_config(config).eval()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with register_transformers():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What autoflash.attention is asked for; each call must reach a kernel."""
    seen: list[dict[str, Any]] = []
    served = transformers_attention.attention

    def count(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append({"q": tuple(q.shape), "k": tuple(k.shape), **options})
        return served(q, k, v, **options)

    def no_torch(*_: Any, **__: Any) -> None:
        raise AssertionError("PyTorch served")

    monkeypatch.setattr(transformers_attention, "attention", count)
    monkeypatch.setattr(fallback, "attention", no_torch)
    return seen


def prompt(padding: str, length: int = 11) -> dict[str, Tensor]:
    """Tokens of three sequences, and which of them count."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 128, (3, length))
    mask = torch.ones_like(tokens)
    for row, count in enumerate(PADDING[padding]):
        mask[row, :count] = 0 if count > 0 else 1
        if count < 0:
            mask[row, count:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def logits(model: Any, implementation: str, given: dict[str, Tensor], **options: Any) -> Tensor:
    """Of the tokens that count."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        result = model(**given, **options)
    return result[0][given["attention_mask"].bool()]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3", "gemma2", "gpt_oss"])
def test_generating_is_token_for_token_the_same(
    calls: list[dict[str, Any]], kind: str, padding: str
) -> None:
    # sdpa leaves Gemma's softcap out, and has no sinks.
    model, reference = model_of(kind), "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    given = prompt(padding)
    wanted = logits(model, reference, given)
    assert not calls
    torch.testing.assert_close(logits(model, "auto_fa", given), wanted, atol=1e-5, rtol=1e-5)
    layers, sequences = 2, 3 if padding != "none" else 1
    assert len(calls) == layers * sequences
    assert all(call["causal"] is True for call in calls)
    windows = {call["window_size"] for call in calls}
    has_window = kind in ("qwen2", "gemma2", "gpt_oss")
    assert windows == ({None, (WINDOW - 1, 0)} if has_window else {None})
    assert {call["k"][2] for call in calls} == {4 if kind == "gpt2" else 2}  # heads not repeated
    if padding == "right":
        return  # a prompt to go on from ends with its last token
    calls.clear()
    tokens = []
    for implementation in (reference, "auto_fa"):
        model.set_attn_implementation(implementation)
        tokens.append(model.generate(**given, max_new_tokens=12, do_sample=False))
    assert len(tokens[0].unique()) > 10
    assert torch.equal(*tokens)
    steps = {call["q"][1] for call in calls}
    assert steps == ({1, 11} if padding == "none" else steps & {1, 7, 10, 11})


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoders(calls: list[dict[str, Any]], kind: str, padding: str) -> None:
    model, given = model_of(kind), prompt(padding)
    wanted = logits(model, "sdpa", given)
    torch.testing.assert_close(logits(model, "auto_fa", given), wanted, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2 * (3 if padding != "none" else 1)
    assert not any(call["causal"] for call in calls)
    windows = {call["window_size"] for call in calls}
    assert windows == ({None, (3, 3)} if kind == "modernbert" else {None})


@pytest.mark.parametrize("padding", ["none", "left"])
def test_caches_of_fixed_size(calls: list[dict[str, Any]], padding: str) -> None:
    model, given = model_of("qwen2"), prompt(padding)
    tokens = []
    for implementation in ("sdpa", "auto_fa"):
        model.set_attn_implementation(implementation)
        tokens.append(
            model.generate(
                **given, max_new_tokens=8, do_sample=False, cache_implementation="static"
            )
        )
    assert torch.equal(*tokens)
    # The prompt by kernels, of the filled part of the cache; a token by PyTorch with the mask.
    assert {call["k"][1] for call in calls} == ({11} if padding == "none" else {7, 10, 11})


def test_a_prompt_in_pieces(calls: list[dict[str, Any]]) -> None:
    model, given = model_of("qwen2"), prompt("none")
    ids = given["input_ids"]
    wanted = logits(model, "sdpa", given).view(3, 11, -1)[:, 4:]
    model.set_attn_implementation("auto_fa")
    with torch.no_grad():
        past = model(ids[:, :4], use_cache=True).past_key_values
        calls.clear()
        rest = model(ids[:, 4:], past_key_values=past).logits
    torch.testing.assert_close(rest, wanted, atol=1e-5, rtol=1e-5)
    assert [(call["q"][1], call["k"][1]) for call in calls] == [(7, 11), (7, 11)]


@pytest.mark.parametrize("kind", ["packed", "holes", "bidirectional prefix", "additive", "sliced"])
def test_masks_that_no_kernel_knows_are_heeded(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, given = model_of("llama"), prompt("none")
    options: dict[str, Any] = {}
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    if kind == "packed":
        places = torch.tensor([[*range(6), *range(5)]] * 3)
        options = {"position_ids": places, "attention_mask": None, "use_cache": False}
    elif kind == "holes":
        given["attention_mask"][1, 3:6] = 0
    elif kind == "bidirectional prefix":
        mask[..., :4] = True
        options = {"attention_mask": mask}
    elif kind == "additive":
        options = {"attention_mask": torch.where(mask, torch.randn(3, 1, 11, 11), -1e9)}
    elif kind == "sliced":  # what a model does to a mask takes away what is written on it
        given = prompt("left")
        whole = torch.nn.Module.__call__

        def slicing(self: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(named.get("attention_mask"), Tensor) and type(self).__name__.endswith(
                "DecoderLayer"
            ):
                named["attention_mask"] = named["attention_mask"][..., :11]
            return whole(self, *arguments, **named)

        monkeypatch.setattr(torch.nn.Module, "__call__", slicing)
    counted = given["attention_mask"].bool()
    results = []
    for implementation in ("sdpa", "auto_fa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**{**given, **options}).logits[counted])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert not calls
    assert (results[0] - logits_without_mask(model, given)[counted]).abs().max() > 0.1


def logits_without_mask(model: Any, given: dict[str, Tensor]) -> Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(given["input_ids"]).logits


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_was_written_to_is_read(mode: Any) -> None:
    from autoflash.integrations.transformers_masks import make_mask, pattern_of

    given = {"batch_size": 1, "q_length": 4, "kv_length": 6, "q_offset": 2}
    with mode():
        mask = make_mask(**given, allow_is_causal_skip=True)
        assert mask is not None
        q, k = torch.ones(1, 4, 4, 16), torch.ones(1, 2, 6, 16)
        pattern = pattern_of(mask, q, k)
        assert pattern is not None
        assert (pattern.causal, pattern.parts[0].keys) == (True, slice(0, 6))
        assert pattern_of(mask, q, k[:, :, :5]) is None  # a mask of other sizes
        mask[..., 0] = False
        assert pattern_of(mask, q, k) is None


def test_a_model_that_chooses_keys_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.DeepseekV32Config(
        **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=24, first_k_dense_replace=2, n_routed_experts=4,
        index_topk=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("auto_fa")
    with pytest.raises(UnsupportedProblem, match=r"^indices: .*attn_implementation='sdpa'"):
        model(prompt("none")["input_ids"])


def test_training_is_served_by_pytorch() -> None:
    model, given = model_of("gpt2").train(), prompt("right")
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    assert model.config.attn_pdrop > 0
    grads = []
    for implementation in ("sdpa", "auto_fa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        torch.manual_seed(0)
        model(**given).loss.backward()
        grads.append(model.transformer.h[0].attn.c_attn.weight.grad.clone())
    assert torch.equal(*grads)  # the same dropout
    model = model_of("gemma2").eval()  # and without: by autoflash's own fallback, with a warning
    warn.forget()
    grads = []
    for implementation in ("eager", "auto_fa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss = model(**given).loss
        loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert "no backward kernels" in str(told[0].message)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_weights_are_returned_where_they_are_asked_for() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 16) for heads in (4, 2, 2))
    layer = torch.nn.Module()
    out, none = transformers_attention.attend(layer, q, k, v, None)
    assert none is None
    same, weights = transformers_attention.attend(layer, q, k, v, None, output_attentions=True)
    assert weights is not None
    assert weights.shape == (2, 4, 7, 7)
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 4, 7))
    torch.testing.assert_close(same, out, atol=1e-5, rtol=1e-5)
    sinks, mask = torch.randn(4), torch.rand(2, 1, 7, 7) > 0.3
    mask[..., 0] = True
    out, _ = transformers_attention.attend(layer, q, k, v, mask, softcap=2.0, s_aux=sinks)
    scores = 2 * torch.tanh((q @ k.repeat_interleave(2, 1).mT) / 4 / 2)
    columns = (scores.masked_fill(~mask, -torch.inf), sinks.view(4, 1, 1).expand(2, 4, 7, 1))
    scores = torch.cat(columns, dim=3)
    wanted = torch.softmax(scores, 3)[..., :7] @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted.transpose(1, 2), atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedProblem, match="position_bias together with softcap"):
        transformers_attention.attend(layer, q, k, v, None, softcap=2.0, position_bias=mask)


def test_compiled_without_graph_breaks() -> None:
    model, given = model_of("llama"), prompt("none")
    wanted = logits(model, "sdpa", given)
    model.set_attn_implementation("auto_fa")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for mask in (None, given["attention_mask"]):
            found = compiled(given["input_ids"], attention_mask=mask, use_cache=False)
            torch.testing.assert_close(found[0].flatten(0, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autoflash", "takes every name with 'flash' in it for FlashAttention"),
        ("my_sdpa", "for PyTorch's attention"),
        ("org/kernel", "as kernels of its hub"),
        ("eager", "is an attention of transformers already"),
    ],
)
def test_names_that_transformers_would_misread(name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        register_transformers(name)


def test_a_name_comes_and_goes() -> None:
    first, again = register_transformers("fast_fa"), register_transformers("fast_fa")
    assert first == again
    model = model_of("llama")
    model.set_attn_implementation("fast_fa")
    with register_transformers("fast_fa"):
        pass  # it was there before
    model.set_attn_implementation("fast_fa")
    first.unregister()
    again.unregister()
    with pytest.raises(ValueError, match="fast_fa"):
        model_of("llama").set_attn_implementation("fast_fa")
    attentions = transformers.AttentionInterface
    attentions.register("theirs", print)
    with pytest.raises(InvalidInput, match="is an attention of transformers already"):
        register_transformers("theirs")
    del attentions._global_mapping["theirs"]


def test_nothing_is_registered_by_an_import() -> None:
    code = """
import sys
import autoflash.integrations.transformers as ours
assert "transformers" not in sys.modules and "torch" not in sys.modules
from autoflash.integrations import transformers_attention
import transformers
assert ours.NAME not in transformers.AttentionInterface().valid_keys()
sys.modules["transformers"] = None
try:
    ours.register_transformers()
except ours.InvalidInput as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'autoflash[frameworks]'" in done.stdout
