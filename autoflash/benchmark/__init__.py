"""How does autoflash compare with what else could be run here? Used by `autoflash bench`."""

from __future__ import annotations

from autoflash.benchmark.grids import GRIDS, grid
from autoflash.benchmark.report import Report, Row, table
from autoflash.benchmark.runner import PROVIDERS, run

__all__ = ["GRIDS", "PROVIDERS", "Report", "Row", "grid", "run", "table"]
