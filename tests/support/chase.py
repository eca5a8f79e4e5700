"""A kernel that does nothing but wait for memory: each load names the address of the next."""

import triton
import triton.language as tl


@triton.jit
def chase(follow, found, steps):
    """Follow a chain of indices, one cache line a step, and store where it ended."""
    at = 0
    for _ in range(steps):
        at = tl.load(follow + at)
    tl.store(found, at)
