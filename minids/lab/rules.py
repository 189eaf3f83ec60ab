"""What a lesson's cells must keep to: markers that cannot leak, and the limits of length.

A region between `# BEGIN SOLUTION` and `# END SOLUTION`, each alone on its line, is the learner's part. In a code cell
the lesson has a stub in its place, in a text cell (where the `#` may be left out) a line that asks for an answer.
Anything that looks like a marker and is not exactly one raises BuildError, so that a typo never shows a solution.

The limits: a text cell has fewer than 150 words of prose. Words in table rows, formulas, fenced code, HTML tags and
`<details>` (answers, which stay folded) are not counted. A code cell has fewer than 25 lines in the solution; blank
lines and markers are not counted. Its lines have at most 100 columns, so that a screen shows them whole.
"""

import ast
import difflib
import re

from minids.lab.source import BuildError

STUB = "raise NotImplementedError  # your code here"
ANSWER = "*Your answer here.*"
WORDS, LINES, COLUMNS, LEAK = 150, 25, 100, 20
MARKER = {"code": r"(\s*)# {} SOLUTION\s*", "markdown": r"(\s*)(?:# )?{} SOLUTION\s*", "raw": r"(\s*)# {} SOLUTION\s*"}
ALMOST = re.compile(r"(begin|end)[\W_]*solution", re.IGNORECASE)
SHOUTED = re.compile(r"\s*#+\s*(BEGIN|END)\b")
NOT_PROSE = [
    r"(?s)<details\b.*?</details>",
    r"(?s)<!--.*?-->",
    r"(?ms)^\s*```.*?^\s*```\s*$",
    r"(?s)\$\$.*?\$\$",
    r"\$[^$\n]+\$",
    r"(?m)^\s*\|.*$",
    r"<[^<>\n]+>",
    r"(?<=\])\([^()\n]*\)",  # the address of a link or picture
]

NEXT_QUESTION = re.compile(r"(?m)^(<details\b.*</details>)\n+(?=(?:\*\*)?\d+\.(?:\*\*)? )")


def apart(text):
    """A text cell in which a question stands apart from the answers of the one before, and begins a paragraph."""
    return NEXT_QUESTION.sub(r"\1\n\n<p><br></p>\n\n", text)


def markers(cell, place):
    """Pairs (line, role), the role begin, end, inside or outside; raises BuildError for markers that do not pair."""
    begin, end = (re.compile(MARKER[cell.cell_type].format(word)) for word in ("BEGIN", "END"))
    pairs, inside = [], False
    for line in cell.source.splitlines():
        begins, ends = begin.fullmatch(line), end.fullmatch(line)
        if (begins and inside) or (ends and not inside):
            raise BuildError(f"{place}: {line.strip()!r} does not match the marker before it; pair BEGIN and END")
        if not (begins or ends) and looks_like_marker(line):
            raise BuildError(
                f"{place}: {line.strip()!r}; write `# BEGIN SOLUTION` or `# END SOLUTION` alone on its line"
            )
        if ends and pairs[-1][1] == "begin":
            raise BuildError(f"{place}: nothing stands between BEGIN SOLUTION and END SOLUTION; write the solution")
        pairs.append((line, "begin" if begins else "end" if ends else "inside" if inside else "outside"))
        inside = bool(begins) or (inside and not ends)
    if inside:
        raise BuildError(f"{place}: BEGIN SOLUTION without END SOLUTION; write `# END SOLUTION` after the solution")
    return pairs


def looks_like_marker(line):
    """Whether a line that is no marker was probably meant as one: other case, spaces or signs, a typo, another word."""
    if ALMOST.search(line) or SHOUTED.match(line):
        return True
    pair = re.fullmatch(r"\W*([^\W\d_]+)[\W_]+([^\W\d_]+)\W*", line)
    return bool(pair) and near(pair[1], "begin", "end", "start", "stop") and near(pair[2], "solution")


def near(word, *candidates):
    """Whether a word is one of `candidates` but for a letter or two."""
    return any(difflib.SequenceMatcher(None, word.lower(), c).ratio() >= 0.75 for c in candidates)


def blank(cell, place):
    """(text for the lesson, lines of the solution) of a cell; raises BuildError for bad markers."""
    stub, shown, hidden = ANSWER if cell.cell_type == "markdown" else STUB, [], []
    for line, role in markers(cell, place):
        if role == "begin":
            shown.append(line[: len(line) - len(line.lstrip())] + stub)
        elif role == "outside":
            shown.append(line)
        elif role == "inside":
            hidden.append(line.strip())
    return "\n".join(shown), hidden


def unmark(cell, place):
    """The text of a cell for the solution: without its markers."""
    return "\n".join(line for line, role in markers(cell, place) if role in ("inside", "outside"))


def check_leaks(texts, hidden, name):
    """Raise BuildError where a hidden line (of 20 characters and more) stands in one of the lesson's texts."""
    shown = "\n".join(texts)
    for secret in sorted({line for line in hidden if len(line) >= LEAK}):
        if secret in shown:
            raise BuildError(f"{name}: the solution's line {secret!r} stands in the lesson too; reword one of them")


def words(text):
    """How many words of prose a text cell has."""
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text)
    return sum(any(c.isalnum() for c in word) for word in text.split())


def check_limits(cell, place):
    """Raise BuildError where a cell, markers removed, is too long or has a title of its own."""
    if cell.cell_type == "markdown":
        if words(cell.source) >= WORDS:
            raise BuildError(
                f"{place}: {words(cell.source)} words; fewer than {WORDS} fit in a text cell: split or cut it"
            )
        if re.search(r"(?m)^# ", re.sub(NOT_PROSE[2], "", cell.source)):
            raise BuildError(
                f"{place}: a heading of the first level; the title comes from the front matter, begin at ##"
            )
        check_html(cell.source, place)
    lines = sum(bool(line.strip()) for line in cell.source.splitlines())
    if cell.cell_type == "code" and lines >= LINES:
        raise BuildError(f"{place}: {lines} lines; fewer than {LINES} fit in a code cell: split it")
    longest = max(cell.source.splitlines(), key=len, default="")
    if cell.cell_type == "code" and len(longest) > COLUMNS:
        raise BuildError(
            f"{place}: a line of {len(longest)} columns, {longest.strip()[:40]!r}…; {COLUMNS} fit on a screen"
        )


def check_html(text, place):
    """Raise BuildError where Markdown stands in a block of HTML, which is shown as it is: from `<details` to a gap."""
    for pattern, remedy in (
        (r"(?m)^<details\b.*`.*", "there ` is shown as it is: write <code>…</code>"),
        (r"(?m)^<details\b.*</details>\n(?!<details\b|\s*$)", "the line after it too: leave one empty between them"),
    ):
        if found := re.search(pattern, text):
            raise BuildError(f"{place}: {found[0][:40]!r}… is HTML, {remedy}")


def check_syntax(text, place):
    """Raise BuildError where the code of a cell (IPython's magics allowed) does not parse."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        compile(
            TransformerManager().transform_cell(text), place, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
    except SyntaxError as error:
        raise BuildError(f"{place}, line {error.lineno}: {error.msg}; mark whole statements as a solution") from None
