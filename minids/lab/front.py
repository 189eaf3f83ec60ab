"""The README's first screen: the ladder as a figure with what each rung bought, from the record alone.

The block between the two markers and the figure are made by `make lessons`; `minids.lab.build --check` fails where they
are not what the record says. A figure carries the digest of its record, since its strokes depend on matplotlib.
"""

import hashlib
import io
import json

from minids import bench
from minids.bench import ladder, tables

OPEN, CLOSE = "<!-- ladder -->", "<!-- /ladder -->"
FIGURE = "minids/bench/records/ladder.svg"
COMMAND = "python -m minids.bench ladder --record"


def shown():
    """The record that the README shows: a GPU's before a processor's, then the newest; None without a complete one."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in bench.RECORDS.glob("ladder-*.json")]
    found = [one for one in found if one["complete"]]
    return max(found, key=lambda one: ("gpu" in one["provenance"], one["provenance"]["date"]), default=None)


def block(outcome):
    """The lines between the markers: figure, verdicts, and where they come from."""
    if outcome is None:
        return f"The ladder is not recorded yet: `{COMMAND}`\n"
    lines = [f"![The ladder: what each technique bought on the same text]({FIGURE})", ""]
    lines += [f"- {verdict}" for verdict in ladder.verdicts(outcome, brief=True)]
    where = f"{tables.where(outcome)}; `{outcome['provenance']['command']}`"
    return "\n".join([*lines, "", f"<sub>{ladder.conditions(outcome)}. {where}</sub>", ""])


def digest(outcome):
    return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


def picture(outcome):
    """The figure as SVG on a white ground, with the record's digest in it."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "minids"}):
        about = {"Date": None, "Description": f"record {digest(outcome)}"}
        ladder.draw(outcome).savefig(file, format="svg", metadata=about, facecolor="white")
    return file.getvalue()


def fill(text, outcome):
    """README's `text` with its block filled; as it is where it has no block."""
    if not (text.count(OPEN) == text.count(CLOSE) == 1 and text.index(OPEN) < text.index(CLOSE)):
        return text
    return f"{text.split(OPEN)[0]}{OPEN}\n{block(outcome)}{CLOSE}{text.split(CLOSE)[1]}"


def is_of(path, outcome):
    """Whether the figure at `path` was drawn from this record."""
    return path.exists() and digest(outcome) in path.read_text(encoding="utf-8")
