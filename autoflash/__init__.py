"""autoflash: a code-generating kernel autotuner for flash attention."""

__version__ = "0.1.0"
