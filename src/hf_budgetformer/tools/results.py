"""What was measured, beside the checkpoint that it was measured on."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, values: Any) -> None:
    """Writes a JSON file at once, into folders made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


__all__ = ["write_json"]
