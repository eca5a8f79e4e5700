"""A GPT of two layers whose weights are set by hand, generating text with autoflash.attention.

Its first layer looks one byte back, its second finds where the current byte stood before and copies
what came next: two heads that trained models grow too (Olsson et al., "In-context Learning and
Induction Heads", arXiv 2209.11895). So it goes on with any text that repeats itself:

    python examples/tiny_gpt.py "dispatch dispa"

The prompt is one call with causal=True; then each byte is one row of queries over all keys so
far, as in any decoder with a cache of keys and values. The same is done once more with PyTorch's
attention, and both must agree. The first call compiles a kernel, in seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoflash

WIDTH = 64  # of what stands for a byte, and for a position
LONGEST = 128
SHARP = 40.0  # of scores: nearly all weight goes to the best match

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (batch, seqlen, heads, head_dim) to the same, causal and aligned bottom-right."""


def by_autoflash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel that autoflash has for these shapes."""
    return autoflash.attention(q, k, v, causal=True, softmax_scale=SHARP)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, which aligns causal masks top-left and so needs one that is written."""
    rows, keys = q.shape[1], k.shape[1]
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, visible, scale=SHARP).transpose(1, 2)


class Layer(nn.Module):
    """One head with a cache: what it compares, what it copies, and where it writes it."""

    def __init__(self, asks: int, offers: int, copies: int, writes: int) -> None:
        """Each is one of the parts of the residual stream, WIDTH wide."""
        super().__init__()
        self.parts = (asks, offers, copies)
        self.writes = writes
        self.keys = self.values = torch.empty(1, 0, 1, WIDTH)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """The residual stream (batch, seqlen, parts, WIDTH) with one part more written."""
        q, k, v = (x[:, :, part, None] for part in self.parts)
        self.keys = torch.cat([self.keys, k], dim=1)
        self.values = torch.cat([self.values, v], dim=1)
        x = x.clone()
        x[:, :, self.writes] += attend(q.contiguous(), self.keys, self.values)[:, :, 0]
        return x


class TinyGPT(nn.Module):
    """Bytes in, scores of the next byte out."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.bytes = F.normalize(torch.randn(256, WIDTH), dim=1)
        self.places = F.normalize(torch.randn(LONGEST + 1, WIDTH), dim=1)
        # Parts of the stream: 0 byte, 1 place, 2 the place before, 3 byte before, 4 guess.
        self.layers = nn.ModuleList([Layer(2, 1, 0, 3), Layer(0, 3, 0, 4)])
        self.length = 0

    def forward(self, text: Tensor) -> Tensor:
        """Scores (seqlen, 256) after each byte of `text`, which goes on from the last call."""
        place = torch.arange(self.length, self.length + len(text))
        self.length += len(text)
        nothing = torch.zeros(len(text), WIDTH)
        parts = [self.bytes[text], self.places[place + 1], self.places[place], nothing, nothing]
        x = torch.stack(parts, dim=1)[None]
        for layer in self.layers:
            x = layer(x, self.attend)
        return x[0, :, 4] @ self.bytes.T


@torch.inference_mode()
def generate(attend: Attend, prompt: bytes, count: int) -> tuple[bytes, Tensor]:
    """`count` bytes after the prompt, and all scores on the way."""
    model = TinyGPT(attend)
    scores = [model(torch.tensor(list(prompt)))]
    text = [int(scores[0][-1].argmax())]
    while len(text) < count:
        scores.append(model(torch.tensor(text[-1:])))
        text.append(int(scores[-1][-1].argmax()))
    return bytes(text), torch.cat(scores)


def main() -> None:
    """Generate with both, print the text and how far the scores are apart."""
    parser = argparse.ArgumentParser(description="A tiny GPT that goes on with what repeats.")
    parser.add_argument("prompt", nargs="?", default="dispatch dispa")
    parser.add_argument("--bytes", type=int, default=48, help="how many to generate")
    given = parser.parse_args()
    prompt = given.prompt.encode()
    if not 0 < len(prompt) <= LONGEST - given.bytes or given.bytes < 1:
        parser.error(f"a prompt and {given.bytes} bytes more must be 2 to {LONGEST} bytes")
    text, scores = generate(by_autoflash, prompt, given.bytes)
    same, expected = generate(by_pytorch, prompt, given.bytes)
    print(f"prompt:    {given.prompt}")
    print(f"autoflash: {text.decode(errors='replace')}")
    print(f"PyTorch:   {same.decode(errors='replace')}")
    print(f"largest difference of a score: {(scores - expected).abs().max():.1e}")
    problem = f"b1s{len(prompt)}h1d{WIDTH}c-float32"
    served = autoflash.explain(problem)
    kernel = served.config.template if served.config else "PyTorch"
    print(f"the prompt, {problem}, was served by {kernel}: {served.reason}")
    if text != same or not torch.allclose(scores, expected, atol=1e-4):
        raise SystemExit("they do not agree")


if __name__ == "__main__":
    main()
