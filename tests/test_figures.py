"""No measured figure is typed by hand: texts, code and records, by the rule of figures.py, and the rule itself."""

import json
import math
import re
import subprocess
from datetime import datetime, timezone

import figures
import pytest
import torch

from minids import ModelConfig, accounting, bench
from minids.bench import harness
from minids.files import write_json
from minids.lab import front
from minids.lab.source import ROOT, read_cells, read_lesson

LESSONS = [path.stem for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))]
MODULES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "minids").rglob("*.py"))]
PAGES = [name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()]

# Figures that a text may state without a source beside them. An expression gives what the figure rounds. -------------

ARITHMETIC = {
    "00_start_here": {
        "1.5 times as fast": "3 / 2",
        "15 times slower": "peak('H200', bfloat16) / peak('H200', float32)",
        "28 µs": "1e6 * seconds(2 * 8192**2, 2 * 8192**2 + 2 * 2 * 8192, 'H200')",
        "40 µs": "1e6 * seconds(2 * 8192**2, 2 * 8192**2 + 2 * 2 * 8192, 'H100')",
        "66 µs": "1e6 * seconds(2 * 8192**2, 2 * 8192**2 + 2 * 2 * 8192, 'A100')",
        "133 µs": "1e6 * seconds(2 * 8192**2, 2 * 8192**2 + 2 * 2 * 8192, 'RTX 4090')",
        "524 µs": "1e6 * seconds(2 * 8192**2, 2 * 8192**2 + 2 * 2 * 8192, 'RTX 4060 Laptop')",
        "1.43 times slower": "GPUS['H200'].bandwidth / GPUS['H100'].bandwidth",
        "4.8 TB/s": "GPUS['H200'].bandwidth / 1e12",
        "7.6 ms": "1e3 * parameters(v3).active / GPUS['H200'].bandwidth",
        "131 tokens per second": "GPUS['H200'].bandwidth / parameters(v3).active",
    },
    "02_kv_cache": {
        "4.6 times": "parameters(v3).total / (2 * 72.7e9)",  # Qwen2.5-72B's parameters, two bytes each
        "4.7 times smaller": "2 * 80 * 8 * 128 * 2 / cache(v3)",
    },
    "05_triton": {"1.5 times the bytes": "(1 + 1 + 1) / 2", "3 times as long": "7 // 2"},
    "06_mla_kernel": {
        "1.9 ms": "1e3 * 131072 * cache(v3) / GPUS['H200'].bandwidth",
        "521 tokens a second": "GPUS['H200'].bandwidth / (131072 * cache(v3))",
    },
    "10_fp8_formats": {"0 dB": "10 * log10(1)", "6 dB": "20 * log10(2)", "20 dB": "10 * log10(100)"},
    "minids/fp8/reference.py": {"6%": "1 / 16"},
    "minids/lab/exercises/l01.py": {"0.693 nats": "log(2)"},
    "minids/loss_kernels.py": {"9.4%": "1536 / 16384"},
    "minids/mla/kernels.py": {"4.6 times the bytes": "64 * ((512 + 64) * 2 + 2 * 512 * 4) / (64 * (512 + 64) * 2)"},
}
# Figures that say how something is set: the file, and the code in it that has the number. ---------------------------
SETTINGS = {
    "01_transformer": {
        "five minutes": ("solutions/01_transformer.py", "minutes(5)"),
        "Five minutes": ("solutions/01_transformer.py", "minutes(5)"),
    },
    "03_mla": {"99%": ("solutions/03_mla.py", "share=0.99")},
    "10_fp8_formats": {"3 dB": ("solutions/10_fp8_formats.py", "best - 3")},
    "11_fp8_gemm": {"error of 1e-3": ("minids/lab/exercises/l11.py", "tolerance=100,  # 1e-3")},
    "12_fp8_training": {"10%": ("solutions/12_fp8_training.py", "error > 0.1")},
    "13_mini_deepseek": {"40 seconds": ("solutions/13_mini_deepseek.py", "minutes(40 / 60)")},
    "README.md": {"five minutes": ("Makefile", "--minutes 5")},
    "minids/bench/__main__.py": {"10 minutes": ("minids/bench/ladder.py", "MINUTES = 10.0")},
    "minids/bench/fp8.py": {"1%": ("minids/bench/fp8.py", "< 0.01")},
    "minids/bench/ladder.py": {"30%": ("minids/bench/ladder_rungs.py", "DECAY = 0.3")},
    "minids/corpus.py": {"10%": ("minids/corpus.py", "% 10")},
    "minids/train.py": {"4 s": ("minids/train.py", "- 4,")},
}
NAMES = {
    "bfloat16": torch.bfloat16,
    "cache": accounting.kv_bytes_per_token,
    "float32": torch.float32,
    "GPUS": accounting.GPUS,
    "log": math.log,
    "log10": math.log10,
    "parameters": accounting.parameters,
    "peak": accounting.peak,
    "seconds": accounting.roofline_seconds,
    "v3": ModelConfig.preset("deepseek-v3"),
}
WHAT_TO_DO = (
    "typed by hand: let the code that measures it print it, or say it without the number; if it is published, name "
    "the source in its sentence; if it is arithmetic, write `a / b = 1.5 %`, or add it to ARITHMETIC or SETTINGS of "
    "tests/test_figures.py"
)


def pairs(listed):
    return [(place, figure, given) for place, each in listed.items() for figure, given in each.items()]


def excused(place):
    return ARITHMETIC.get(place, {}).keys() | SETTINGS.get(place, {}).keys()


def found(place):
    """[(cell or "", figure, its sentence)] of what a lesson, a module or a page says without a source."""
    if place in LESSONS:
        return [*found_in_lesson(read_lesson(ROOT / "solutions" / f"{place}.py"))]
    text = (ROOT / place).read_text(encoding="utf-8")
    if place.endswith(".md"):
        return [("", *pair) for pair in figures.unfounded(text)]
    comments = not place.startswith("minids/lab/exercises/")  # there they say which cases are, and nobody sees them
    return [("", *pair) for pair in figures.unfounded_in_code(text, comments=comments)]


def found_in_lesson(lesson):
    front = "\n\n".join([lesson.title, lesson.promise, *lesson.objectives])
    yield from (("front matter", *pair) for pair in figures.unfounded(front))
    cells = read_cells(lesson)
    texts = [cell for cell in cells if cell.cell_type == "markdown"]
    known = set().union(*(figures.published(cell.source) for cell in texts))
    before = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            before = cell.source
            yield from ((cell.id, *pair) for pair in figures.unfounded(cell.source))
            continue
        code = re.sub(r"(?m)^[%!].*$", "", cell.source)
        yield from ((cell.id, *pair) for pair in figures.unfounded_in_code(code, known))
        if not figures.SOURCE.search(before):  # the text above a cell says whose figures it shows
            yield from ((cell.id, f"{name} {unit}", "a typed number, shown") for name, unit in figures.typed(code))


@pytest.mark.parametrize("place", LESSONS + MODULES + PAGES)
def test_no_measured_figure_is_typed(place):
    left = [f"{cell}: {one!r} in {text!r}" for cell, one, text in found(place) if one not in excused(place)]
    assert not left, f"{place}, {WHAT_TO_DO}:\n" + "\n".join(left)


def test_pages_have_no_other_blocks_than_those_that_are_made():
    for name in PAGES:
        names = re.findall(r"<!-- /(\w+) -->", (ROOT / name).read_text(encoding="utf-8"))
        assert set(names) <= {"lessons", "ladder"}, f"{name}: blocks {names}; figures.py looks into all but two of them"


# The exceptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "figure", "expression"), pairs(ARITHMETIC))
def test_an_arithmetic_figure_is_what_its_expression_gives(place, figure, expression):
    exact = eval(expression, {"__builtins__": {}}, NAMES)
    assert figures.agrees(exact, figure), f"{place}: {figure!r}, but {expression} is {exact:.6g}"


@pytest.mark.parametrize(("place", "figure", "where"), pairs(SETTINGS))
def test_a_setting_is_what_the_code_has(place, figure, where):
    file, code = where
    assert code in (ROOT / file).read_text(encoding="utf-8"), f"{place}: {figure!r}, but {file} has no {code!r}"
    numbers = [float(number.rstrip(".,").replace(",", "")) for number in re.findall(figures.DIGITS, code)]
    assert figures.number(figure) in [*numbers, *(1 / number for number in numbers)], (
        f"{code!r} does not say {figure!r}"
    )


@pytest.mark.parametrize("place", sorted(ARITHMETIC.keys() | SETTINGS.keys()))
def test_every_exception_is_needed(place):
    unused = excused(place) - {figure for _, figure, _ in found(place)}
    assert not unused, f"{place} does not say {sorted(unused)} any more; take it out of tests/test_figures.py"


# The rule --------------------------------------------------------------------------------------------------------

TYPED = [
    "The kernel is 2.3 times faster.",
    "The kernel is **2.3×** faster: 2.3×.",
    "It takes 1.6 times as long.",
    "The grouped product takes half the time.",
    "Ours is twice as fast as theirs.",
    "It runs ten times faster on a GPU.",
    "On two cores it takes 10 to 20 seconds.",
    "The cell takes five minutes. Wait.",
    "Reading takes half a minute.",
    "It reached 1,234.5 tokens/s.",
    "It reaches 610 GB/s.",
    "The product runs at 355 TFLOP/s.",
    "FP8 is off by 3.7%.",
    r"FP8 is off by $3.7\,\%$.",
    "FP8 is 3 to 4 percent off.",
    "The loss falls to 1.45 bits per byte.",
    "MaxVio is 0.26 at the end.",
    "A loss of 2.06 was reached, and an error of 3e-4.",
    "Three bits are worth 31 dB.",
    "The card drew 650 W.",
    "We report 2.3 times faster decoding.",
    "Our report: 2.3 times faster.",
    "- a list\n- 80 ms a step",
    "| rung | speed |\n|---|---|\n| MLA | 812 tokens/s |",
    "What is it? It is 2.3 times faster.",
    "<details><summary>Answer</summary>\n\nIt takes 30 µs.</details>",
    "The V3 report has a claim.\n\nOur run was 12% slower.",
    "The V3 report has a claim. It is short. Ours is 12% slower.",
    "By arithmetic: 3 / 2 = 1.6 times.",
    "By arithmetic, 4/128 = 3.1%, and the clock says 4.2%.",
    "<!-- measured -->\nIt takes 30 µs.\n<!-- /measured -->",
]
FOUNDED = [
    "FlashMLA's README reports 3,000 GB/s.",
    "A cache 93.3% smaller (2405.04434, abstract).",
    "See [the log](https://example.org/LOG.md): 17% at depth 26.",
    "The table is in the paper (section 4). It is 12% slower there.",
    "From the V3 report:\n\n- 2% at K = 4096\n- 14 bits",
    "Scales cost 4/128 = 3.1%.",
    r"Scales cost $4/128 = 3.1\,\%$.",
    "Two reads and a write: 3 / 2 = 1.5 times.",
    "How far is it off, 2% or 20%?",
    "**2.** FP8 is 0.05% worse with three seeds. What does that show?\n<details><summary>5%</summary>No.</details>",
    "*8 minutes · difficulty ●●○○○*",
    "A tile of 1×128, eight times, 16 times the heads, 7168 × 2048, 4W.",
    "One bit is $\\ln 2$ nats; the loss is in bits per byte.",
    "An hour has 3600 seconds.",
    "<!-- ladder -->\nMLA: 812 tokens/s\n<!-- /ladder -->",
]


@pytest.mark.parametrize("text", TYPED)
def test_a_typed_measurement_is_caught(text):
    assert list(figures.unfounded(text))


@pytest.mark.parametrize("text", FOUNDED)
def test_what_is_published_computed_or_asked_is_none(text):
    assert list(figures.unfounded(text)) == []


def test_all_figures_of_a_sentence_are_found():
    text = "It takes 3 ms instead of 9.5 ms, at 40% of 610 GB/s."
    assert [figure for figure, _ in figures.unfounded(text)] == ["3 ms", "9.5 ms", "40%", "610 GB/s"]


@pytest.mark.parametrize(
    ("figure", "exact", "good"),
    [
        ("1.43 times", 1.4328, True),
        ("1.43 times", 1.4372, False),
        ("28 µs", 27.97, True),
        ("28 µs", 28.6, False),
        ("6%", 1 / 16, True),
        ("3.1%", 4 / 128, True),
        ("3.2%", 4 / 128, False),
        ("3 times as long", 3.6, False),
    ],
)
def test_a_figure_agrees_with_what_it_rounds(figure, exact, good):
    assert figures.agrees(exact, figure) == good


@pytest.mark.parametrize(
    "code",
    [
        'print("the kernel is 2.3 times faster")',
        'print(f"{name}: 12.5 ms")',
        'print(f"{name}: {1e3 * t:.1f} ms, 1.6 times as fast")',
        "x = 1  # 12 ms on two cores",
        'def f():\n    """Sort; takes 30 µs."""',
        'axes.set(title="MLA, 812 tokens/s")',
    ],
)
def test_a_measurement_in_a_string_is_caught(code):
    assert list(figures.unfounded_in_code(code))


@pytest.mark.parametrize(
    "code",
    [
        'print(f"{name:12s} {1e3 * t:6.1f} ms, {a / b:.2f} times as fast, {share:4.0%} of it")',
        'axes.set_yticks([0.1, 1], ["10%", "100%"])',
        'print(f"H800: {3000e9 / peak:.0%} of its peak")',
        'print("seconds", "bits per byte", "4W")',
        'STYLE = "img { max-width: 100%; height: auto; }"',
    ],
)
def test_what_code_puts_in_is_none(code):
    assert list(figures.unfounded_in_code(code)) == []


def test_a_source_in_the_lesson_covers_its_figure_in_code():
    known = figures.published("Its README reports 3,000 GB/s.")
    assert list(figures.unfounded_in_code('print("3000 GB/s are much")', known)) == []
    assert list(figures.unfounded_in_code('print("2900 GB/s are much")', known))


def test_a_typed_number_with_a_name_is_caught():
    shown = 'print(f"{name}: {speed} tokens/s")'
    assert list(figures.typed(f"speed = 812.5\n{shown}")) == [("speed", "tokens/s")]
    loop = 'for name, speed in {"MLA": 812, "MHA": 640}.items():\n    '
    assert list(figures.typed(loop + shown)) == [("speed", "tokens/s")]
    assert list(figures.typed(f"speed = tokens / seconds\n{shown}")) == []
    assert list(figures.typed('M, N = 64, 128\nprint(f"{M} × {N}, {M} rows")')) == []


# Records: what README and lessons may show -------------------------------------------------------------------------

FACTS = ("date", "commit", "command", "load_before", "cpu", "cores", "threads", "machine", "system", "python", "torch")
GPU_FACTS = ("gpu", "cuda", "driver", "triton")


def faults(path):
    """What is wrong with a record, as sentences: it must be whole, say where it is from, and have its spread."""
    outcome = json.loads(path.read_text(encoding="utf-8"))
    lacking = {"suite", "device", "quick", "complete", "settings", "cases", "skipped", "provenance"} - outcome.keys()
    if lacking:
        return [f"it lacks {sorted(lacking)}"]
    facts = outcome["provenance"]
    needed = FACTS + (GPU_FACTS if "gpu" in facts else ())
    wrong = [f"its provenance lacks {name}" for name in needed if name not in facts]
    if wrong:
        return wrong
    name, kind = f"{outcome['suite']}-{harness.slug(outcome['device'])}", "" if outcome["complete"] else ".partial"
    names = [f"{name}{own}{kind}.json" for own in ("", f"-{facts['machine']}")]
    suite, tuned = outcome["suite"].removeprefix("tune-"), outcome["suite"].startswith("tune-")
    when, command = datetime.fromisoformat(facts["date"]), f"python -m minids.bench {suite} {'--tune ' * tuned}"
    rules = {
        f"there is no suite {outcome['suite']!r}": suite in bench.SUITES,
        f"it should be called {names[0]}": path.name in names,
        "its device is not where it was measured": outcome["device"] in (facts["cpu"], facts.get("gpu")),
        "--quick gives no figures": outcome["quick"] is False,
        "what was tuned is no suite's result": tuned or "--tune" not in facts["command"],
        "it has no cases": bool(outcome["cases"]),
        "no command with --record made it": f"{facts['command']} ".startswith(command)
        and "--record" in facts["command"],
        "its date is to come": when < datetime.now(timezone.utc),
        f"{facts['commit']!r} is no commit": bool(re.fullmatch(r"[0-9a-f]{12}(\+changes)?", facts["commit"] or "")),
    }
    return [rule for rule, good in rules.items() if not good] + [*spreads(outcome)]


def spreads(outcome):
    """What is wrong with the figures of a record's cases."""
    for case in outcome["cases"]:
        measured = [*dicts(case)]
        medians = [one for one in measured if one.get("median") is not None]
        losses = [one["bits_per_byte"] for one in measured if "bits_per_byte" in one]
        if not medians and not any(losses):
            yield f"case {case['case']} has no figure with its spread"
        for one in medians:
            if not 0 < one.get("min", math.inf) <= one["median"] <= one.get("max", -math.inf) < math.inf:
                yield f"case {case['case']}: {one} has no spread around its median"
        for values in losses:
            if len(values) > outcome["settings"]["seeds"] or not all(0 < value < 16 for value in values):
                yield f"case {case['case']}: {values} are not one loss for each seed"


def dicts(value):
    """All dicts in a value, itself among them."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dicts(inner)


@pytest.mark.parametrize("path", sorted(bench.RECORDS.glob("*.json")), ids=lambda path: path.name)
def test_a_record_says_where_it_is_from(path):
    assert not faults(path), f"{path.name}: {faults(path)}; measure again with --record"


def test_the_readme_shows_its_record_and_nothing_else():
    text, shown = (ROOT / "README.md").read_text(encoding="utf-8"), front.shown()
    assert front.OPEN in text and front.fill(text, shown) == text, "README's ladder is not the record's: make lessons"
    others = {path for path in bench.RECORDS.glob("*") if path.suffix != ".json"}
    assert others <= {ROOT / front.FIGURE}, f"{others} are no records"
    assert not others or front.is_of(ROOT / front.FIGURE, shown), "README's figure is of another record: make lessons"


def test_a_records_commit_is_in_the_history():
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(bench.RECORDS.glob("*.json"))]
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("no whole history of git here")
    for one in records:
        name = (one["provenance"]["commit"] or "").partition("+")[0]
        known = subprocess.run(["git", "cat-file", "-e", f"{name}^{{commit}}"], cwd=ROOT, capture_output=True)
        assert known.returncode == 0, f"{one['suite']} on {one['device']}: commit {name} is not in the history"


def good_record():
    form = {"side": "minids", "form": "bf16", "median": 2.0, "min": 1.0, "max": 3.0, "rounds": 5}
    case = {"case": "work", "unit": "µs", "forms": [form], "best": {"minids": form}, "ratio": None}
    outcome = harness.result("mla", [case], {}, {}, device="A GPU")
    command = "python -m minids.bench mla --record"
    gpu = {"gpu": "A GPU", "cuda": "13.0", "driver": "580.1", "triton": "3.7.1"}
    outcome["provenance"] |= {"command": command, "load_before": 0.1, "commit": "0123456789ab", **gpu}
    return outcome


def broken(how):
    """A good record with one thing wrong."""
    outcome = good_record()
    facts, case = outcome["provenance"], outcome["cases"][0]
    form = case["forms"][0]
    {
        "no command": lambda: facts.pop("command"),
        "typed": lambda: facts.update(command="by hand"),
        "not recorded": lambda: facts.update(command="python -m minids.bench mla"),
        "another suite's command": lambda: facts.update(command="python -m minids.bench moe --record"),
        "no commit": lambda: facts.update(commit=None),
        "no driver": lambda: facts.pop("driver"),
        "no date": lambda: facts.pop("date"),
        "to come": lambda: facts.update(date="2999-01-01T00:00:00+00:00"),
        "quick": lambda: outcome.update(quick=True),
        "no flag": lambda: outcome.pop("complete"),
        "incomplete": lambda: outcome.update(complete=False),
        "no cases": lambda: outcome.update(cases=[]),
        "no figures": lambda: case.update(forms=[], best={}),
        "no spread": lambda: [form.pop(key) for key in ("min", "max")],
        "outside its spread": lambda: form.update(median=9.0),
        "another device": lambda: outcome.update(device="Another GPU"),
        "another suite": lambda: outcome.update(suite="pretend"),
        "tuned": lambda: facts.update(command="python -m minids.bench mla --tune --record"),
        "not tuned": lambda: outcome.update(suite="tune-mla"),
    }[how]()
    return outcome


BROKEN = [
    "no command",
    "typed",
    "not recorded",
    "another suite's command",
    "no commit",
    "no driver",
    "no date",
    "to come",
]
BROKEN += ["quick", "no flag", "incomplete", "no cases", "no figures", "no spread", "outside its spread"]
BROKEN += ["another device", "another suite", "tuned", "not tuned"]


def test_a_good_record_has_no_faults(tmp_path):
    write_json(tmp_path / "mla-a-gpu.json", good_record())
    assert faults(tmp_path / "mla-a-gpu.json") == []
    tuned = good_record() | {"suite": "tune-mla"}
    tuned["provenance"]["command"] = "python -m minids.bench mla --tune --record"
    write_json(tmp_path / "tune-mla-a-gpu.json", tuned)
    assert faults(tmp_path / "tune-mla-a-gpu.json") == []
    rung = {"case": "MLA", "equal_time": {"bits_per_byte": [1.9, 2.0]}}
    outcome = good_record() | {"suite": "ladder", "settings": {"seeds": 2}, "cases": [rung]}
    outcome["provenance"]["command"] = "python -m minids.bench ladder --record --minutes 9"
    write_json(tmp_path / "ladder-a-gpu.json", outcome)
    assert faults(tmp_path / "ladder-a-gpu.json") == []
    rung["equal_time"]["bits_per_byte"].append(1.95)
    write_json(tmp_path / "ladder-a-gpu.json", outcome)
    assert "not one loss for each seed" in str(faults(tmp_path / "ladder-a-gpu.json"))


@pytest.mark.parametrize("how", BROKEN)
def test_a_bad_record_is_rejected(tmp_path, how):
    outcome = broken(how)
    name = "tune-mla-a-gpu.json" if how == "not tuned" else "mla-a-gpu.json"
    write_json(tmp_path / name, outcome)
    assert faults(tmp_path / name)


READERS = ("minids/bench/", "minids/lab/front.py")  # front.py makes README's block, and the figure in it


@pytest.mark.parametrize("place", LESSONS + [name for name in MODULES if not name.startswith(READERS)])
def test_records_are_read_through_bench_alone(place):
    path = ROOT / "solutions" / f"{place}.py" if place in LESSONS else ROOT / place
    text = re.sub(r"(?m)^[%!].*$", "", path.read_text(encoding="utf-8"))
    names = re.findall(r"\b(?:RECORDS|record_path)\b", text)
    names += [text for _, text in figures.texts(text, comments=False) if re.search(r"\brecords/|\bbench/rec", text)]
    assert not names, f"{place} reads records by itself ({names}); use bench.record or machine.recorded"
