"""Serving: from a call of `autoflash.attention` to the launch of a kernel. Never tunes."""
