"""Rows of the bundled kit without its own split, so that a benchmark says how many are held out."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(folder: Path, count: int) -> str:
    """Write so many rows of the kit's, one after another and over again."""
    from edge_client.data.instructions import load_instructions

    kit = load_instructions("kit").examples
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(count):
            row = kit[number % len(kit)]
            line = {"instruction": row.instruction, "input": row.input, "output": row.output}
            line["category"] = row.category or ""  # with one on each row, nothing is clustered
            if number >= len(kit):  # no two rows are alike
                line["instruction"] += f" ({number})"
            file.write(json.dumps(line) + "\n")
    return str(path)
