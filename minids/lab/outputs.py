"""Running a solution's notebook, keeping the outputs that are worth keeping, and judging them.

Kept: text, pictures, errors. Dropped: live widgets (their picture stays, where they have one), progress bars, and the
names of this machine's folders, so that two machines store the same text.
"""

import copy
import os
import re
import tempfile
from pathlib import Path

from minids.lab.source import ROOT, BuildError

WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\r|\d+%\|")
TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
VERDICT = re.compile(r"^\W*(\d\d\.\d+ [^\n:]+: (?:PASS|FAIL|NOT ATTEMPTED)\b[^\n]*)", re.MULTILINE)
CELL_SECONDS = 900


def execute(notebook, folder, fast=False, name="the notebook"):
    """Run a notebook's cells in place, in `folder`, without the learner's progress; raises BuildError if one fails.

    `fast` sets MINIDS_FAST, which makes training cells short; what a solution stores is run without it.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    with tempfile.TemporaryDirectory() as home:
        settings = {"MINIDS_HOME": str(Path(home, "minids")), "IPYTHONDIR": str(Path(home, "ipython"))}
        env = {key: value for key, value in os.environ.items() if key != "MINIDS_FAST"} | settings
        place = {"metadata": {"path": str(folder)}}
        options = {"timeout": CELL_SECONDS, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
        client = NotebookClient(
            notebook, resources=place, **options
        )  # its widget state is dropped below: off, it crashes
        try:
            client.execute(env=env | ({"MINIDS_FAST": "1"} if fast else {}))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            tail = "\n".join(TERMINAL.sub("", str(error)).strip().splitlines()[-30:])
            raise BuildError(f"{name} did not run; repair this cell:\n{tail}") from error


def code_cells(notebook):
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def clean(outputs):
    """The outputs to store, without widgets, progress bars and this machine's folders."""
    kept = []
    for output in map(copy.deepcopy, outputs):
        output.get("metadata", {}).pop(WIDGET, None)
        if output.output_type == "stream":
            if output.name == "stderr" and PROGRESS.search(output.text):
                output.text = "".join(
                    t for t in output.text.splitlines(keepends=True) if not PROGRESS.search(t)
                ).lstrip()
            output.text = anonymous(output.text)
            keep = bool(output.text.strip())
        elif "data" in output:
            live = output.data.pop(WIDGET, None) is not None
            keep = not live or any(kind.startswith("image/") or kind == "text/html" for kind in output.data)
            for kind in [kind for kind in output.data if kind.startswith("text/")]:
                output.data[kind] = anonymous(output.data[kind])
        else:
            keep = True
        kept += [output] if keep else []
    return kept


def anonymous(text):
    """A text without the folders of this machine."""
    text = re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "<cell>", text)
    return text.replace(str(ROOT) + os.sep, "").replace(str(Path.home()) + os.sep, "~" + os.sep)


def graft(notebook, executed):
    """Whether `executed` ran exactly the code of `notebook`; if so its outputs are copied over."""
    new, old = code_cells(notebook), code_cells(executed)
    if [cell.source for cell in new] != [cell.source for cell in old] or not was_run(executed):
        return False
    for cell, ran in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = clean(ran.outputs), ran.execution_count
    return True


def was_run(notebook):
    """Whether every code cell that has code was run."""
    return all(cell.execution_count is not None for cell in code_cells(notebook) if cell.source.strip())


def texts(output):
    """The readable texts of one output."""
    data = [output.data[kind] for kind in output.get("data", {}) if kind.startswith("text/")]
    return [re.sub(r"<[^<>]*>", "\n", TERMINAL.sub("", text)) for text in [output.get("text", ""), *data]]


def verdicts(notebook):
    """The verdict lines that a notebook's checks printed, in order, each once."""
    found = [
        line for cell in code_cells(notebook) for output in cell.outputs for line in map(VERDICT.findall, texts(output))
    ]
    return list(dict.fromkeys(verdict.strip() for lines in found for verdict in lines))


def faults(notebook):
    """What is wrong with a solution's stored outputs: not run, an error, a verdict that is no PASS."""
    if not was_run(notebook):
        return ["is not executed"]
    errors = [(cell, out) for cell in code_cells(notebook) for out in cell.outputs if out.output_type == "error"]
    found = [f"has an error in cell {cell.id}: {out.ename}: {out.evalue}" for cell, out in errors]
    return found + [f"has the verdict {line!r}" for line in verdicts(notebook) if ": PASS" not in line]
