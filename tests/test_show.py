"""What minids logs: a plain note in a notebook, a warning on stderr elsewhere."""

import logging
import subprocess
import sys

import pytest

from minids.lab import show

WARN = "import logging, minids.lab; logging.getLogger('minids').warning('a %s', 'note ' * 40)"


@pytest.fixture
def log(monkeypatch):
    """minids' log, with handlers of this test alone."""
    found = logging.getLogger("minids")
    monkeypatch.setattr(found, "handlers", [])
    return found


def test_in_a_notebook_a_log_line_is_printed_once_in_lines_that_fit(log, monkeypatch, capsys):
    monkeypatch.setattr(show, "in_jupyter", lambda: True)
    show.print_log(), show.print_log()
    log.warning("a %s", "note " * 40)
    out, err = capsys.readouterr()
    assert out.split() == ["a", *["note"] * 40] and not err
    assert len(out.splitlines()) > 1 and max(map(len, out.splitlines())) <= show.WIDE


def test_elsewhere_it_stays_a_warning_on_stderr():
    done = subprocess.run([sys.executable, "-c", WARN], capture_output=True, text=True, check=True)
    assert not done.stdout and done.stderr.startswith("a note note")
