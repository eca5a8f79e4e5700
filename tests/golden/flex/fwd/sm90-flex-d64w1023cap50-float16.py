"""FlexAttention for 4096 query rows and 5000 keys of head_dim 64, float16."""

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

KERNEL_OPTIONS = {
}
"""Of the forward alone: without "fwd_" tiles and warps would be those of the backward too."""

MASK_BLOCK = 128


def mask_mod(batch, head, row, key):
    after = key - row - 904
    return (after >= -1023) & (after <= 0)


def block_mask(device):
    return create_block_mask(
        mask_mod, None, None, 4096, 5000, device=device, BLOCK_SIZE=MASK_BLOCK
    )


def score_mod(score, batch, head, row, key):
    return 50.0 * torch.tanh(score / 50.0)


def attention(scale):
    def run(q, k, v, mask):
        return flex_attention(
            q, k, v, score_mod=score_mod, block_mask=mask, scale=scale,
            enable_gqa=False, kernel_options=KERNEL_OPTIONS,
        )

    return run


def attention_with_lse(scale):
    def run(q, k, v, mask):
        out, found = flex_attention(
            q, k, v, score_mod=score_mod, block_mask=mask, scale=scale,
            enable_gqa=False, kernel_options=KERNEL_OPTIONS,
            return_aux=AuxRequest(lse=True),
        )
        return out, found.lse

    return run
