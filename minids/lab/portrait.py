"""The mini-DeepSeek as a picture and as a page: which part of it is the learner's, which is the reference.

plots.show(draw(parts, cfg), "…")
write_page(path, "My mini-DeepSeek", [("The model", figure), ("What it writes", text), ("Its parts", rows)])
"""

import base64
import html

from minids.files import replace_file
from minids.lab import plots
from minids.lab.parts import KERNELS, USED

WIDE, HIGH = 3.0, 0.62
TRUNK = {  # part: (left, bottom), in the units of the picture, along the way of a token
    "embedding": (2.2, 0.0),
    "norm 1": (2.2, 1.3),
    "decoupled_rope": (0.5, 2.4),
    "compress_kv": (3.9, 2.4),
    "attend_expanded": (0.5, 3.6),
    "attend_absorbed": (3.9, 3.6),
    "crossover": (2.2, 4.8),
    "norm 2": (2.2, 6.2),
    "swiglu": (0.5, 7.4),
    "route": (3.9, 7.4),
    "moe_forward": (3.9, 8.3),
    "block_forward": (0.2, 9.75),
    "norm 3": (2.2, 11.0),
    "head": (2.2, 12.1),
}
ASIDE = {  # (left, top): what the column is called, and the parts from above
    (8.3, 12.1): ("of the router and the balance", ["group_limit", "load_fractions", "balance_loss"]),
    (8.3, 9.0): ("after each step", ["max_violation", "update_bias"]),
    (8.3, 6.7): ("within attention", ["apply_rope", "split_heads_kv", "absorb_query", "project_values"]),
    (8.3, 2.8): ("attention of MHA, GQA", ["causal_attention", "decode_attention", "grouped_attention"]),
    (12.3, 12.1): ("with FP8: x·Wᵀ forward", ["linear_forward", "quantize_tiles", "quantize_blocks", "fprop"]),
    (12.3, 8.2): ("… its sum", ["matmul_blockscaled"]),
    (12.3, 6.7): ("… and backward", ["linear_backward", "dgrad", "wgrad"]),
}
LINES = [  # arrows, from and to
    ((3.7, 0.62), (3.7, 1.3)),
    ((3.7, 1.92), (2.0, 2.4)),
    ((3.7, 1.92), (5.4, 2.4)),
    ((2.0, 3.02), (2.0, 3.6)),
    ((2.0, 3.02), (5.4, 3.6)),
    ((5.4, 3.02), (5.4, 3.6)),
    ((5.4, 3.02), (2.0, 3.6)),
    ((3.7, 5.65), (3.7, 6.2)),
    ((3.7, 6.82), (2.0, 7.4)),
    ((3.7, 6.82), (5.4, 7.4)),
    ((5.4, 8.02), (5.4, 8.3)),
    ((3.7, 9.1), (3.7, 11.0)),
    ((3.7, 11.62), (3.7, 12.1)),
]
FRAMES = [(0.0, 1.05, 7.4, 10.6), (0.25, 2.25, 7.15, 5.6), (0.25, 7.25, 7.15, 9.1)]  # a layer, its two parts


@plots.style()
def draw(parts, cfg):
    """A Figure of the model of `cfg`: every part as a box, filled where it is the learner's, dashed where it is not."""
    fig = plots.blank(9.6, 7.6)
    axes = fig.subplots()
    axes.set(xlim=(-0.1, 15.5), ylim=(-0.2, 13.7))
    axes.axis("off")
    for left, bottom, right, top in FRAMES:
        axes.add_patch(box((left, bottom), right - left, top - bottom, facecolor="none", edgecolor="#9a9da3", lw=0.9))
    for start, end in LINES:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": plots.INK, "lw": 0.8})
    for name, place in TRUNK.items():
        draw_part(axes, place, parts.all.get("rms_norm" if name.startswith("norm") else name), name)
    for (left, top), (title, names) in ASIDE.items():
        axes.text(left, top + 0.85, title, fontsize=8.5, va="center")
        for row, name in enumerate(names):
            draw_part(axes, (left, top - 0.78 * row), parts.all[name])
    words(axes, cfg)
    return fig


def box(place, wide, high, **look):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(place, wide, high, boxstyle="round,pad=0,rounding_size=0.12", **look)


LOOKS = {  # of a box, and of its words
    "yours": ({"facecolor": plots.COLORS[0], "edgecolor": plots.COLORS[0]}, "white"),
    "reference": ({"facecolor": "white", "edgecolor": plots.COLORS[3], "linestyle": "--"}, plots.INK),
    "given": ({"facecolor": plots.GRID, "edgecolor": plots.GRID}, plots.INK),
}


def draw_part(axes, place, part, name="", owner=""):
    """One box: the learner's filled, the reference's dashed, what no exercise is about grey."""
    owner = owner or (part.owner if part else "given")
    look, ink = LOOKS[owner]
    axes.add_patch(box(place, WIDE, HIGH, lw=1.3, zorder=3, **look))
    text = ("✓ " if owner == "yours" else "") + (part.exercise.title if part else name)
    middle = place[0] + WIDE / 2, place[1] + HIGH / 2
    axes.text(*middle, text, ha="center", va="center", color=ink, fontsize=7.6, zorder=4)


def words(axes, cfg):
    """What stands beside the boxes, and the legend."""
    kinds = [cfg.is_moe_layer(index) for index in range(cfg.num_hidden_layers)]
    layers = f"{len(kinds)} layers: {kinds.count(False)} dense,\n{kinds.count(True)} with experts"
    notes = {
        (3.95, 10.06): layers,
        (0.4, 5.1): "attention",
        (0.5, 4.42): "training, prompt",
        (5.75, 4.42): "decoding",
        (5.3, 5.1): "chooses",
        (0.4, 8.6): "feed-forward",
        (0.5, 7.05): "dense",
        (6.1, 7.05): "experts",
        (3.9, 5.88): "+ what came in",
        (3.9, 9.4): "+ what came in",
    }
    for (x, y), note in notes.items():
        axes.text(x, y, note, fontsize=8, va="center", zorder=5)
    for row, (owner, name) in enumerate([("yours", "yours"), ("reference", "the reference"), ("given", "given")]):
        draw_part(axes, (12.3, 2.8 - 0.78 * row), None, name, owner)


def rows(parts):
    """[(exercise, where it works, whose, calls, ms a call, why not yours)] of all parts of the model, then kernels."""
    found = []
    for place, numbers in USED.items():
        for part in (part for part in parts.all.values() if part.exercise.id in numbers):
            calls, seconds = part.calls[part.owner], part.seconds[part.owner]
            each = f"{1e3 * seconds / calls:.2f}" if calls else ""
            found.append((part.exercise.title, place, part.owner, f"{calls:,}", each, part.trouble))
    return found


def kernels():
    """[(exercise, whose part's work it would do, whether the learner's passed)] of the kernels."""
    from minids.lab import exercises, progress

    passed = progress.load().passed
    return [
        (exercises.find(number).title, work, "yours" if number in passed else "reference")
        for number, work in KERNELS.items()
    ]


# The page --------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: light-dark(#26292e, #e8e8e4); background: light-dark(#fbfbf8, #1b1d21); }
img { max-width: 100%; height: auto; border-radius: 6px; background: #fbfbf8; }
pre { overflow-x: auto; padding: .8rem 1rem; border-radius: 6px; background: light-dark(#efefec, #26292e); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
td { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid light-dark(#d9dadd, #3a3d44); }
.yours { font-weight: 600; }
"""


def write_page(path, title, sections):
    """Write one HTML file that needs nothing else, whole or not at all: `sections` of (heading, Figure, text, rows)."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, content in sections:
        parts += [f"<h2>{html.escape(heading)}</h2>", in_html(heading, content)]
    page = '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    page += f"<title>{html.escape(title)}</title>\n"
    page += f"<style>{CSS}</style>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def in_html(heading, content):
    """A figure as a picture within the page, rows as a table, text as it is."""
    if hasattr(content, "savefig"):
        picture = base64.b64encode(plots.png(content)).decode()
        return f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{picture}">'
    if isinstance(content, str):
        return f"<pre>{html.escape(content)}</pre>"
    lines = []
    for row in content:
        mine = ' class="yours"' if "yours" in row else ""
        lines.append(f"<tr{mine}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>")
    return '<div class="table"><table>' + "\n".join(lines) + "</table></div>"
