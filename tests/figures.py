"""The rule that no measured figure is typed by hand: what a figure is, and what makes one that is typed a good one.

A figure is a number beside a unit of measurement: a time, a rate, a share, a ratio of speeds, a loss, an energy. Where
it is a measurement, code prints it, from its own run or from a record. A typed one must be something else, and show it:

- published: its sentence, or the one before, names the source (a paper's number or section, a report, a link);
- arithmetic: the text has it as `a · b / c = 1.5 %`, which is computed here, or it stands in a list as an expression;
- a setting: it stands in a list with the code that sets it;
- or it stands in a question (which claims nothing), or is an answer to choose in a quiz.
"""

import ast
import io
import itertools
import math
import re
import tokenize

DIGITS = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
COUNTS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORD = rf"\b(?i:half|{'|'.join(COUNTS[2:])}|fifteen|twenty|thirty|forty|fifty|hundred|thousand)\b"
NUMBER = rf"(?<![\w.,^{{-])(?:{DIGITS})(?:\s?(?:to|and|or|–|-)\s?{DIGITS})?"
PER = r"(?:/s\b| (?:per|a|each) second\b)"
THAN = (
    r" (?:as (?:fast|slow|long|quick)|faster|slower|quicker|longer|shorter|cheaper|less|fewer|smaller|better|worse)\b"
    r"| (?:the|its|their|of the) (?:time|speed|throughput|error|loss|bytes|memory|floor)\b"
)
TIME = r"(?:ns|µs|us|ms|s|sec|seconds?|milliseconds?|microseconds?|minutes?|hours?|days?)\b"
UNITS = [
    rf"[kMGTP]?(?:B|bytes|FLOPs?|MAC|tokens|rows|steps|it){PER}|[GTP]FLOPS\b",
    TIME,
    r"%|percent\b",
    rf"(?:times|×)(?:{THAN}|\s*[.;:)!]|\s*$)",
    r"(?:bits (?:per|a) byte|nats?|dB|MaxVio|perplexity)\b",
    r"(?:kWh|Wh|W|kW|MW|mJ|J|watts?|joules?)\b",
]
FIGURES = [
    re.compile(rf"{NUMBER}(?:\s|-|\*\*\s?)(?:{'|'.join(UNITS)})|{NUMBER}(?:%|×(?:{THAN}|\s*[.;:)!]|\s*$))", re.M),
    re.compile(rf"{WORD}(?:\s|-)(?:{TIME}|percent\b|times(?:{THAN}))"),
    re.compile(r"(?i)\b(?:twice|thrice|half|double) (?:as (?:fast|slow|long)|the (?:time|speed|throughput))\b"),
    re.compile(r"\bhalf an? (?:second|minute|hour)\b"),
    re.compile(
        r"(?i)\b(?:loss|error|MaxVio|perplexity|speed-?up|SNR)(?: of| is| was| about| near|:| =)* \d+(?:\.\d+|e-\d+)"
    ),
]
SOURCE = re.compile(
    r"\b\d{4}\.\d{5}\b|https?://|\b(?:section|table|appendix|eq\.) (?:\d|[A-Z]\b)|\bV[23](?:\.\d)? reports\b"
    r"|\b(?:[Tt]he|[Ii]ts|[Tt]heir|V[23](?:\.\d)?|[A-Z]\w+'s) (?:report|paper|abstract)\b"
    r"|\b(?:README|data ?sheets?|whitepaper)\b"
)
DEFINED = {"60 seconds", "3600 seconds", "3,600 seconds", "86400 seconds", "86,400 seconds", "60 minutes", "24 hours"}
EQUATION = re.compile(r"(?<![\w.])(\d[\d.,]*(?:\s*[-+·×/]\s*\d[\d.,]*)+)\s*=\s*([\d.,]*\d)\s*(%?)")
PLAIN = [
    (r"(?s)<!-- (lessons|ladder) -->.*?<!-- /\1 -->", " "),  # made from front matters and from the record
    (r"(?s)<!--.*?-->", " "),
    (r"(?ms)^\s*```.*?^\s*```\s*$", " "),
    (r"(?m)^\*\d+ minutes · difficulty .*$", " "),  # an exercise's heading
    (r"<summary>.*?</summary>", " "),  # a choice of a quiz, mostly wrong, or a word to click on
    (r"</?\w[^>]*>", "\n\n"),
    (r"\\?\b(?:ln|log_?\w*)\s*\d+", " "),
    (r"\\[,;!]", " "),
    (r"\\%", "%"),
    (r"\\cdot", "·"),
    (r"\\times", "×"),
    (r"\{,\}", ","),
    (r"\$", ""),
]
LEAD = re.compile(r":\**\s*$")
QUESTION = re.compile(r"(?s)\s*\*\*(?:\d+\.|Question:)\*\*.*\?\s*")
BLOCK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=\|)")
STYLE = re.compile(r"\{[^{}]*:[^{}]*;[^{}]*\}")  # of a page, in CSS
GAP = "\0"  # what an f-string puts in
SENTENCE = re.compile(r"(?<=[.!?])[\"*)]*\s+(?=[A-Z(*\"`\[])")


def figures(text):
    """The figures in a text, as they stand there."""
    return [found.group(0).strip(" .;:)!") for pattern in FIGURES for found in pattern.finditer(text)]


def sentences(text):
    """Pairs (sentence, what stands before it) of a text of Markdown: the sentence before, a list's introduction."""
    for pattern, instead in PLAIN:
        text = re.sub(pattern, instead, text)
    lead = ""
    for block in filter(str.strip, BLOCK.split(text)):
        if QUESTION.fullmatch(block):
            continue
        item = re.match(r"\s*(?:(?:[-*]|\d+\.) |\|)", block)
        introduction = lead if item else ""
        before = ""
        for sentence in SENTENCE.split(block[item.end() if item else 0 :]):
            if not sentence.rstrip(" )*\n").endswith("?"):
                yield " ".join(sentence.split()), introduction + before
            before = sentence
        lead = block if LEAD.search(block) else introduction


def unfounded(text):
    """Pairs (figure, sentence) of a text of Markdown: the figures that neither have a source nor are computed there."""
    for sentence, before in sentences(text):
        if not SOURCE.search(before + " " + sentence):
            typed_ones = (one for one in figures(sentence) if one not in DEFINED)
            yield from ((one, sentence) for one in typed_ones if not computed(one, sentence))


def published(text):
    """The numbers of the figures in a text of Markdown that have a source."""
    return {
        number(one)
        for sentence, before in sentences(text)
        if SOURCE.search(before + " " + sentence)
        for one in figures(sentence)
    }


def computed(figure, sentence):
    """Whether the sentence has the figure as the result of an equation that holds."""
    for left, right, percent in EQUATION.findall(sentence):
        shown = right + ("%" if percent else "")
        if number(figure) == number(shown) and agrees(value(left), shown):
            return True
    return False


def value(expression):
    """What an expression of numbers and + - · × / is."""
    expression = expression.replace(",", "").replace("·", "*").replace("×", "*")
    return eval(compile(ast.parse(expression, mode="eval"), "a text", "eval"), {"__builtins__": {}})


def number(figure):
    """The first number of a figure as a float, the percents as shares."""
    digits = re.search(DIGITS, figure)
    words = dict(zip(COUNTS, range(len(COUNTS)), strict=True)) | {"half": 0.5, "twice": 2, "double": 2, "thrice": 3}
    found = float(digits[0].replace(",", "").rstrip(".")) if digits else words.get(re.split("[ -]", figure.lower())[0])
    if found is None:
        return math.nan  # a word such as fifty: it stands for no exact number
    return found / 100 if "%" in figure or "percent" in figure else found


def agrees(exact, figure):
    """Whether a figure is `exact`, rounded to the digits that it shows."""
    digits = re.search(DIGITS, figure)
    decimals = len(digits[0].partition(".")[2]) if digits else 1
    scale = 100 if "%" in figure or "percent" in figure else 1
    return math.isclose(exact * scale, number(figure) * scale, rel_tol=0, abs_tol=0.5001 * 10.0**-decimals)


# Code ------------------------------------------------------------------------------------------------------------


def texts(code, comments=True):
    """Pairs (line, text) of the strings and comments of some code; what an f-string puts in shows as a gap."""
    tree = ast.parse(code)
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    formats = {id(node.format_spec) for one in joined for node in one.values if isinstance(node, ast.FormattedValue)}
    inside = {id(part) for node in joined for part in node.values}
    inside |= {id(part) for node in joined if id(node) in formats for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in formats:
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(code).readline) if comments else ():
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def unfounded_in_code(code, known=(), comments=True):
    """Pairs (figure, text) of some code: figures typed into strings and comments; `known` are numbers with a source.

    A string that is nothing but a share labels an axis, and claims nothing.
    """
    for _, text in texts(code, comments):
        text = STYLE.sub(" ", text)
        label = re.fullmatch(rf"{DIGITS}%", text)
        yield from (pair for pair in unfounded(text) if not label and number(pair[0]) not in known)


def typed(code):
    """Pairs (name, unit) of numbers that are typed, given a name and then shown beside a unit by an f-string."""
    tree, names = ast.parse(code), set()
    for node in ast.walk(tree):
        pairs = [(target, node.value) for target in node.targets] if isinstance(node, ast.Assign) else []
        pairs += [(node.target, node.iter)] if isinstance(node, ast.For | ast.comprehension) else []
        for target, given in pairs:
            if is_typed(given, names):
                names |= {one.id for one in ast.walk(target) if isinstance(one, ast.Name)}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
        for part, after in itertools.pairwise(node.values):
            if isinstance(part, ast.FormattedValue) and isinstance(after, ast.Constant):
                shown = isinstance(part.value, ast.Name) and part.value.id in names
                unit = next(iter(figures("1.1" + after.value + GAP)), "").removeprefix("1.1").strip()
                if shown and unit and after.value.lstrip().startswith(unit):
                    yield part.value.id, unit


def is_typed(node, names):
    """Whether an expression is a number, a collection of numbers, or a part of what has one of `names`."""
    if isinstance(node, ast.Call | ast.Subscript | ast.Attribute):
        inner = node.func if isinstance(node, ast.Call) else node.value
        return is_typed(inner, names) and not getattr(node, "args", [])
    if isinstance(node, ast.Name):
        return node.id in names
    values = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
    plain = ast.Dict | ast.List | ast.Tuple | ast.Constant | ast.Load | ast.UnaryOp | ast.USub
    return any(isinstance(one, int | float) for one in values) and all(isinstance(n, plain) for n in ast.walk(node))
