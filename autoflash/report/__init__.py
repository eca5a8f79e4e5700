"""What did tuning find, device by device? Used by `autoflash report`."""

from __future__ import annotations

from autoflash.report.ceilings import Ceilings
from autoflash.report.findings import Chapter, Findings, findings
from autoflash.report.page import page
from autoflash.report.table import Table

__all__ = ["Ceilings", "Chapter", "Findings", "Table", "findings", "page"]
