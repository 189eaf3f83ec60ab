"""Results as text: one suite's in full, and several in one table."""

import importlib

from minids.bench import SUITES


def table(outcome):
    """A result of any suite as text, by the suite's own `table` where it has one."""
    suite = importlib.import_module(SUITES[outcome["suite"]]) if outcome["suite"] in SUITES else None
    return getattr(suite, "table", plain_table)(outcome)


def plain_table(outcome):
    """A result as text: per case, the best form of each side with its spread, and minids' ratio to the best other."""
    rows = gpu_rows(outcome) if any(case["unit"] == "µs" for case in outcome["cases"]) else rate_rows(outcome)
    lines = columns(rows)
    lines += [f"{case['case']}: {case['note']}" for case in outcome["cases"] if case.get("note")]
    for case in outcome["cases"]:
        lines += [f"{case['case']}: skipped {side}: {reason}" for side, reason in case.get("skipped", {}).items()]
    lines += [f"skipped {side}: {reason}" for side, reason in outcome["skipped"].items()]
    if not outcome.get("complete", True):
        lines.append("the run did not get to all of its cases")
    return "\n".join([*lines, where(outcome)])


def where(outcome):
    """On what a result was measured, of which commit, and when."""
    facts = outcome["provenance"]
    place = f"{facts['cpu']}, {facts['threads']} of {facts['cores']} threads, torch {facts['torch']}"
    if "gpu" in facts:
        versions = f"driver {facts.get('driver')}, CUDA {facts['cuda']}, triton {facts.get('triton')}"
        place = f"{facts['gpu']}, {versions}, {place}"
    return f"{place}, commit {facts['commit']}, {facts['date']}"


def overview(outcomes):
    """One table of several suites' results {suite: outcome}: a row for each case, and what was skipped below it."""
    rows, notes = [("suite", "", "minids", "beside it", "ratio", "of roofline")], []
    for suite, outcome in outcomes.items():
        rows += [(suite, *overview_row(case)) for case in outcome["cases"]]
        notes += [f"{suite}: skipped {what}: {reason}" for what, reason in outcome["skipped"].items()]
    return "\n".join(columns(rows) + notes)


def overview_row(case):
    """(case, minids' best form, the best other's, ratio, share of the roofline), "-" where there is none."""
    if "best" not in case:
        return (case["case"], case.get("summary", "-"), "-", "-", "-")
    timed = {side: form for side, form in case["best"].items() if form["median"] is not None}
    own, sign = timed.pop("minids", None), 1 if case["unit"] == "µs" else -1
    other = min(timed.values(), key=lambda form: sign * form["median"], default=None)
    ratio = f"{case['ratio']:.2f}×" if case["ratio"] else "-"
    share = f"{own['of_roofline']:.0%}" if own and own.get("of_roofline") else "-"
    peer = f"{other['side']} {cell(other)}" if other else "-"
    return (f"{case['case']}, {case['unit']}", cell(own) if own else "ran, not timed", peer, ratio, share)


def columns(rows):
    """The rows as lines, every column as wide as its widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def rate_rows(outcome):
    """A row per case: minids' rate, the best other's, the ratio, and minids' share of the roofline."""
    rows = [("", "minids", "beside it", "ratio", "of roofline")]
    for case in outcome["cases"]:
        others = sorted((f for s, f in case["best"].items() if s != "minids"), key=lambda form: -form["median"])
        peer = f"{others[0]['side']} {cell(others[0])}" if others else "-"
        ratio = f"{case['ratio']:.2f}×" if case["ratio"] else "-"
        own = cell(case["best"]["minids"]) if "minids" in case["best"] else "-"
        share = case["best"].get("minids", {}).get("of_roofline")
        rows.append((f"{case['case']}, {case['unit']}", own, peer, ratio, f"{share:.0%}" if share else "-"))
    return rows


def cell(form):
    low, high = (f"{form[key]:,.0f}" for key in ("min", "max"))
    return f"{form['median']:,.0f} ({low}-{high}) {form['form']}"


def gpu_rows(outcome):
    """A row per case and side, minids first: its best form's time, what it reaches, and its time over minids'."""
    rows = [("", "side", "µs (min-max)", "GB/s", "TFLOP/s", "of copy", "of matmul", "of roofline", "time/minids'")]
    for case in outcome["cases"]:
        own = case["best"].get("minids", {}).get("median")
        name = case["case"]
        for side, form in sorted(case["best"].items(), key=lambda pair: (pair[0] != "minids", pair[1]["median"] or 0)):
            spread = "ran, not timed"
            if form["median"] is not None:
                median, low, high = (f"{form[key]:,.1f}" for key in ("median", "min", "max"))
                spread = f"{median} ({low}-{high})"
            reached = [f"{form[key]:,.0f}" if form.get(key) else "-" for key in ("GB/s", "TFLOP/s")]
            shares = [f"{form[key]:.0%}" if form.get(key) else "-" for key in ("of_copy", "of_matmul", "of_roofline")]
            ratio = f"{form['median'] / own:.2f}×" if own and side != "minids" else "-"
            rows.append((name, f"{side} {form['form']}".rstrip(), spread, *reached, *shares, ratio))
            name = ""
    return rows
