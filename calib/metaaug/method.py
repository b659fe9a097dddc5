"""Rows of the table of methods: Genie's reconstruction, on the samples and their transformed copies together."""

from __future__ import annotations

from dataclasses import replace

from compress.calib.metaaug.settings import PUBLISHED, MetaAug
from compress.calib.reconstruction import GENIE

__all__ = ["METAAUG", "METAAUG_PUBLISHED"]

METAAUG = replace(GENIE, transform=MetaAug())
METAAUG_PUBLISHED = replace(GENIE, transform=PUBLISHED)
