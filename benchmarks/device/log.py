"""The record of a run: a JSON object a line, appended as it goes, so that a run that is cut keeps what it has."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Log:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, stage: str, **found: Any) -> Record:
        record = {"stage": stage, "at": round(time.time(), 2), **found}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def read(self, stage: str | None = None) -> list[Record]:
        """The records so far, of one stage or of all; the last line may have been cut."""
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [r for r in records if stage in (None, r["stage"])]
