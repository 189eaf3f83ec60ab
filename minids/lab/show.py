"""Text to a learner: one printed line, and below it what explains it, framed in Jupyter and plain elsewhere."""

import html
import logging
import sys
import textwrap

WIDE = 100  # columns of a line of text
MARK = {"PASS": "#009e73", "FAIL": "#d55e00", "NOT ATTEMPTED": "#888888"}


def show(line, details=(), diagnosis="", verdict=""):
    """Print `line`; then details and diagnosis, as a framed block in Jupyter and as indented lines elsewhere."""
    details = [readable(detail, "utf-8") for detail in details]
    say(line)
    plain = [f"  {detail}" for detail in details]
    plain += [f"  → {diagnosis}"] if diagnosis else []
    if not plain:
        return
    if in_jupyter():
        from IPython.display import display

        display({"text/html": frame(details, diagnosis, verdict), "text/plain": "\n".join(plain)}, raw=True)
    else:
        say("\n".join(plain))


def say(text):
    """Print `text`, with ? for what the terminal cannot show."""
    print(readable(text, getattr(sys.stdout, "encoding", None) or "utf-8"))


def readable(text, encoding):
    """`text` with ? for what `encoding` lacks (half a character that a learner printed; an arrow on old consoles)."""
    return text.encode(encoding, "replace").decode(encoding)


class Lines(logging.Formatter):
    """What is logged, in lines that fit on a screen."""

    def format(self, record):
        return textwrap.fill(super().format(record), WIDE)


def print_log():
    """In a notebook print what minids logs, as any other line: in the red box of stderr a note looks like an error."""
    log = logging.getLogger("minids")
    if in_jupyter() and not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))  # the notebook's own stdout, also while a check catches it
        log.handlers[0].setFormatter(Lines())


def in_jupyter():
    """Whether a notebook's kernel runs this: then text can be framed."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")


def frame(details, diagnosis, verdict):
    """The details in a quiet block whose edge has the verdict's colour; colours that read on light and dark."""
    colour = MARK.get(verdict, "#0072b2")
    text = html.escape("\n".join(details))
    why = f'<div style="margin-top:.4em"><b>{html.escape(diagnosis)}</b></div>' if diagnosis else ""
    style = f"border-left:4px solid {colour};padding:.2em .8em;margin:.2em 0"
    return f'<div style="{style}"><pre style="white-space:pre-wrap;margin:0">{text}</pre>{why}</div>'
