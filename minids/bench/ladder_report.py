"""What a result of suite ladder says: as a table with a verdict on each rung, and as a figure."""

import itertools
import statistics

from minids.bench import tables

LITTLE = 0.05  # of a size: less than that is no change worth a word
BETTER_IS_LESS = ("loss at equal time", "loss at equal FLOPs", "peak memory", "cache")


def table(outcome):
    """The ladder as text: a row for each rung, then what each rung bought, then where it was measured."""
    contexts = outcome["settings"]["contexts"]
    head = ["", "parameters", "active", "bits/byte, equal time", "equal FLOPs", "training, tokens/s"]
    head += [*(f"decode at {context}" for context in contexts), "peak memory", "cache/token"]
    rows = [head]
    for case in outcome["cases"]:
        row = [case["case"], f"{case['parameters']:,}", f"{case['active']:,}"]
        row += [bits(case.get(kind)) for kind in ("equal_time", "equal_flops")]
        row += [rate(case.get("train_tokens_per_s"))]
        row += [rate(case.get("decode_tokens_per_s", {}).get(str(context))) for context in contexts]
        row += [megabytes(case.get("peak_bytes")), f"{case['cache_bytes_per_token']:,} B"]
        rows.append(row)
    lines = [*tables.columns(rows), "", *verdicts(outcome)]
    lines += [f"skipped {what}: {reason}" for what, reason in outcome["skipped"].items()]
    if not outcome["complete"]:
        lines.append("the run did not get to its end")
    return "\n".join([*lines, conditions(outcome), tables.where(outcome)])


def conditions(outcome):
    """Under which conditions the losses were reached, in a sentence."""
    settings = outcome["settings"]
    seeds = "one seed" if settings["seeds"] == 1 else f"mean of {settings['seeds']} seeds (smallest-largest)"
    held = f"{settings['heldout_bytes'] / 1e3:,.0f} kB held out"
    each = f"{settings['seconds_each']:,.0f} s" if "seconds_each" in settings else "?"
    speed = "" if settings["device"] == "cuda" else "; FP8 is emulated here, so its speed (hollow) says nothing"
    return f"preset {settings['preset']} on {settings['corpus']}, {held}; {seeds}; equal time is {each}{speed}"


def bits(end):
    """The losses of the seeds as text."""
    values = end["bits_per_byte"] if end else []
    if not values:
        return "-"
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f}-{max(values):.3f})"


def rate(figures):
    return "{median:,.0f} ({min:,.0f}-{max:,.0f})".format(**figures) if figures else "-"


def megabytes(size):
    return f"{size / 1e6:,.0f} MB" if size else "-"


# What each rung bought ---------------------------------------------------------------------------------------------


def verdicts(outcome, brief=False):
    """A sentence for each rung after the first: what is better than one rung below, what is worse, what is neither.

    Better means: by more than the spread. A loss must be lower with every seed, a speed's range must lie above. FP8's
    speeds are left out where it is emulated; `brief` leaves out what changes little.
    """
    cases = [case for case in outcome["cases"] if case.get("equal_flops", {}).get("bits_per_byte")]
    lines = []
    for below, case in itertools.pairwise(cases):
        found = {"pays in": [], "costs": [], "changes little in": []}
        for name, (low, high, text) in comparisons(below, case, outcome["settings"]).items():
            if case["emulated"] and ("speed" in name or "decoding" in name):
                continue
            sign = -1 if name in BETTER_IS_LESS else 1
            kind = "pays in" if min(sign * low, sign * high) > 0 else "costs"
            kind = kind if low * high > 0 else "changes little in"
            found[kind].append(f"{name} {text}")
        if brief:
            del found["changes little in"]
        said = "; ".join(f"{kind} {', '.join(texts)}" for kind, texts in found.items() if texts)
        lines.append(f"{case['case']} after {below['case']}: {said or 'changes little'}")
    return lines


def comparisons(below, case, settings):
    """{what: (smallest, largest difference, text)} of a rung and the one below."""
    found = {}
    for kind, name in (("equal_time", "equal time"), ("equal_flops", "equal FLOPs")):
        pairs = zip(below[kind]["bits_per_byte"], case[kind]["bits_per_byte"], strict=False)
        gaps = [after - before for before, after in pairs]
        if not gaps:  # an emulated rung has no loss at equal time
            continue
        text = f"{statistics.mean(gaps):+.3f} bits/byte" + (
            f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
        )
        found[f"loss at {name}"] = (min(gaps), max(gaps), text)
    speeds = {"training speed": (below["train_tokens_per_s"], case["train_tokens_per_s"])}
    for context in settings["contexts"]:
        speeds[f"decoding at {context}"] = tuple(one["decode_tokens_per_s"][str(context)] for one in (below, case))
    for name, (before, after) in speeds.items():
        if not (before and after):  # one of the two did not fit into the memory
            continue
        span = after["min"] - before["max"], after["max"] - before["min"]
        found[name] = (*span, f"{after['median'] / before['median']:.2f}×")
    for key, name in (("peak_bytes", "peak memory"), ("cache_bytes_per_token", "cache")):
        if not (case.get(key) and below.get(key)):
            continue
        ratio = case[key] / below[key]
        gap = ratio - 1 if abs(ratio - 1) > LITTLE else 0
        found[name] = (gap, gap, f"{ratio:.2f}×")
    return found


# The figure ------------------------------------------------------------------------------------------------------


def draw(outcome, columns=6):
    """The ladder as a matplotlib Figure: a row for each rung, panels for what was measured, `columns` side by side."""
    from matplotlib.figure import Figure

    cases = outcome["cases"]
    longest = str(outcome["settings"]["contexts"][-1])
    panels = {
        "bits per byte,\nequal time": [(case.get("equal_time") or {}).get("bits_per_byte") for case in cases],
        "bits per byte,\nequal FLOPs": [(case.get("equal_flops") or {}).get("bits_per_byte") for case in cases],
        "training,\ntokens/s": [spread(case.get("train_tokens_per_s")) for case in cases],
        f"decoding at {longest},\ntokens/s": [
            spread(case.get("decode_tokens_per_s", {}).get(longest)) for case in cases
        ],
        "peak memory of a\ntraining step, MB": [
            [case["peak_bytes"] / 1e6] * bool(case.get("peak_bytes")) for case in cases
        ],
        "cache per token,\nbytes": [[case["cache_bytes_per_token"]] for case in cases],
    }
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2 * columns if lines == 1 else 3 * columns, 1.0 + lines * (0.3 + 0.42 * len(cases))))
    figure.set_layout_engine("constrained")
    every = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, (name, values) in zip(every, panels.items(), strict=False):
        hollow = [case["emulated"] and "tokens/s" in name for case in cases]
        draw_panel(axes, name, values, hollow)
    every[0].set_yticks(range(len(cases)), [case["case"] for case in cases])
    every[0].set_ylim(len(cases) - 0.5, -0.5)
    facts = outcome["provenance"]
    figure.supxlabel(f"{conditions(outcome)}\n{outcome['device']}, {facts['date'][:10]}", fontsize=7, color="0.4")
    return figure


def spread(figures):
    return [figures["min"], figures["median"], figures["max"]] if figures else []


def draw_panel(axes, name, rows, hollow):
    """One panel: the middle of each row's values as a point with its number, their range as a line."""
    from matplotlib.ticker import MaxNLocator

    loss = name.startswith("bits")
    for row, values in enumerate(rows):
        if values:
            middle = statistics.mean(values) if loss else statistics.median(values)
            axes.plot([min(values), max(values)], [row, row], color="C0", lw=3, alpha=0.4, solid_capstyle="butt")
            axes.plot(middle, row, "o", color="C0", ms=5, mfc="white" if hollow[row] else "C0")
            text = f"{middle:.3f}" if loss else f"{middle:,.0f}"
            axes.annotate(text, (middle, row), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.set_title(name, fontsize=9)
    axes.margins(x=0.25)
    if not loss:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
