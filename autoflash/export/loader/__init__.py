"""Attention kernels that were tuned for one device and exported; table.json says which and how.

`flash_attn_func` is called as that of flash-attn 2, `attention` as that of autoflash. Nothing is
loaded or compiled before the first call, and a GPU is not asked for.
"""

from ._attention import attention, flash_attn_func

__all__ = ["attention", "flash_attn_func"]
