"""A finished folder whose files were changed by somebody who knows of its hashes."""

from __future__ import annotations

import json
from pathlib import Path

from compress.files.digests import file_digests


def forge_report(folder: Path) -> None:
    """The hashes in the report are made those of the files that are there."""
    report = json.loads((folder / "report.json").read_text())
    report["files"] = file_digests(folder)
    (folder / "report.json").write_text(json.dumps(report))
