"""How often the properties were tried, for docs/results/fuzz.json."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

EXAMPLES: Counter[str] = Counter()


def count(name: str) -> None:
    """Count one example of a property, and write the number into the report that `make fuzz` asks for."""
    EXAMPLES[name] += 1
    report = os.environ.get("RANK_EXPERTS_FUZZ_REPORT")
    if report and EXAMPLES[name] % 100 == 0:
        file = Path(report)
        found = json.loads(file.read_text()) if file.is_file() else {}
        found["examples"] = found.get("examples", {}) | {name: EXAMPLES[name]}
        file.write_text(json.dumps(found, indent=2) + "\n")
