"""What is measured, beside whom, and the recorded results: `python -m minids.bench` (see harness.py for the rules).

A suite is a module with `run(quick=False) -> dict`, the result that `harness.result` makes; its first docstring line
is its description. A record is one result of a suite, with its provenance, in records/NAME.json.
"""

import json
from pathlib import Path

SUITES = {"cpu": "minids.bench.cpu"}
RECORDS = Path(__file__).with_name("records")


def record(name):
    """The recorded result of suite `name` as a dict, or None where nothing is recorded yet."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
