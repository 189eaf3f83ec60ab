"""One calm style for every figure of the course.

A figure is an opaque near-white card, so it reads in JupyterLab's light and dark theme alike. Lines differ in colour
(Okabe and Ito's, which hold without colour vision), in marker and in dash, so nothing is told by colour alone; names
stand at the ends of the lines. Nothing here touches matplotlib's global state, and nothing needs pyplot.

    fig, axes = figure()
    axes.plot(context, seconds, label="MLA")
    label_lines(axes)
    show(fig, alt="Seconds per token grow with context; MLA's more slowly.")
"""

import base64
import io
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minids import accounting

CARD, INK, GRID = "#fbfbf8", "#26292e", "#d9dadd"
COLORS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#26292e"]  # without the yellow: on a
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # light card it is lost
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1))]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "+++", "ooo"]
DPI, CSS_DPI = 150, 100  # rendered finer than shown, for screens that are finer

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": CARD,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS) + cycler(linestyle=DASHES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": DPI,
    "figure.facecolor": CARD,
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.dpi": "figure",
    "savefig.facecolor": "auto",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def style():
    """A context in which everything that matplotlib makes is in the style; afterwards matplotlib is as it was."""
    plain = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    return matplotlib.rc_context({**plain, **STYLE})  # reading rcParams["backend"] would import pyplot


def blank(width=7, height=4):
    """An empty Figure in the style, `width` by `height` inches."""
    with style():
        fig = Figure(figsize=(width, height))
        FigureCanvasAgg(fig)
    return fig


def figure(width=7, height=4, columns=1):
    """(figure, axes) in the style; with several `columns` side by side, axes is an array of them."""
    fig = blank(width, height)
    with style():
        return fig, fig.subplots(1, columns)


def png(fig):
    """The figure as the bytes of a PNG, titles at the left and markers thinned to about 12 on a line."""
    for axes in fig.axes:
        if title := axes.get_title():
            axes.set_title("")
            axes.set_title(title, loc="left", fontsize=STYLE["axes.titlesize"])
        for line in axes.lines:
            last, step = len(line.get_xdata()) - 1, len(line.get_xdata()) // 12
            if line.get_markevery() is None and step > 1:
                line.set_markevery((last % step, step))  # the last point keeps its marker
    buffer = io.BytesIO()
    with style():
        fig.savefig(buffer, format="png")
    return buffer.getvalue()


def bundle(data, fig, alt):
    """(data, metadata) of a notebook's output: the PNG `data` of `fig` at its size on the page, with `alt` as text."""
    width, height = (round(inches * CSS_DPI) for inches in fig.get_size_inches())
    image = base64.b64encode(data).decode()
    return {"image/png": image, "text/plain": alt}, {"image/png": {"width": width, "height": height, "alt": alt}}


def show(fig, alt="figure"):
    """Display the figure in a notebook; outside IPython do nothing. `alt` says in a sentence what it shows."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        from IPython.display import display

        data, metadata = bundle(png(fig), fig, alt)
        display(data, metadata=metadata, raw=True)


@style()
def label_lines(axes, gap=13):
    """Write each line's label at its right end, `gap` points apart at least; call it last, when the limits are set."""
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_") and _last_point(line)]
    axes.get_xlim(), axes.get_ylim()  # settles the limits
    scale = 72 / axes.figure.dpi
    own = [axes.transData.transform(_last_point(line))[1] * scale for line in lines]
    low, high = (axes.transAxes.transform((0, edge))[1] * scale for edge in (0.02, 0.98))
    for line, height, place in zip(lines, own, _spread(own, gap, low, high), strict=True):
        axes.annotate(
            line.get_label(),
            _last_point(line),
            xytext=(7, place - height),
            textcoords="offset points",
            va="center",
            color=_darker(line.get_color()),
            annotation_clip=False,
        )


@style()
def heat(axes, matrix, label="", rows=None, columns=None, xlabel="", ylabel="", numbers=None, **options):
    """Draw `matrix` (rows, columns) with a colour bar named `label`; a map that stays even in grey.

    `rows` and `columns` name the ticks; `numbers` is a format such as ".2f" that writes each value in its cell.
    `options` go to imshow: vmin, vmax, norm.
    """
    matrix = np.asarray(matrix, dtype=float)
    image = axes.imshow(matrix, **{"cmap": "cividis", "aspect": "auto", "interpolation": "nearest", **options})
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        axis.get_major_locator().set_params(integer=True)
        if names is not None:
            axis.set_ticks(range(len(names)), [str(name) for name in names])
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    bar.outline.set_visible(False)
    for (row, column), value in np.ndenumerate(matrix) if numbers else ():
        ink = "white" if image.norm(value) < 0.55 else INK
        axes.text(column, row, format(value, numbers), ha="center", va="center", color=ink, fontsize=9)
    return image


@style()
def bars(axes, values, unit="", form=",.3g"):
    """Horizontal bars from the top, each with its value and `unit` at its end.

    `values` is {name: number}, or {name: {series: number}} for several bars beside each name, which get a legend.
    """
    nested = {name: value if isinstance(value, dict) else {"": value} for name, value in values.items()}
    series = list(dict.fromkeys(key for value in nested.values() for key in value))
    thick = 0.8 / len(series)
    for place, key in enumerate(series):
        rows = [
            (row + (place - (len(series) - 1) / 2) * thick, v[key]) for row, v in enumerate(nested.values()) if key in v
        ]
        drawn = axes.barh(
            *zip(*rows, strict=True),
            height=thick * 0.9,
            color=COLORS[place % len(COLORS)],
            hatch=HATCHES[place % len(HATCHES)],
            edgecolor=CARD,
            label=key or "_",
        )
        axes.bar_label(drawn, [f"{format(value, form)} {unit}".strip() for _, value in rows], padding=4, color=INK)
    axes.set_yticks(range(len(nested)), list(nested))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.18)
    if series != [""]:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=len(series))


@style()
def roofline(axes, gpus, points, dtype=torch.bfloat16):
    """The roofs of `gpus` (names in accounting.GPUS) in `dtype`, and `points` under them: FLOP/s over FLOP per byte.

    `points` is {name: meter} or {name: (flops, bytes)}, put on the roof of the first GPU, or {name: (flops, bytes,
    seconds)} for a measured one. Raises ValueError for a point without FLOPs or bytes: it has no place here.
    """
    spots = {name: _spot(name, point, gpus[0], dtype) for name, point in points.items()}
    ridges = {gpu: accounting.ridge(gpu, dtype) for gpu in gpus}
    marks = [x for x, _, _ in spots.values()] + [*ridges.values()]
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of traffic", ylabel="FLOP/s")
    for gpu, ridge in ridges.items():
        x = np.array([min(marks) / 4, ridge, max(marks) * 4])
        roof = np.minimum(accounting.peak(gpu, dtype), x * accounting.GPUS[gpu].bandwidth)
        axes.plot(x, roof, label=gpu, marker="")
        mark_ridge(axes, ridge, roof[1])
    card = {"facecolor": CARD, "edgecolor": "none", "alpha": 0.85, "pad": 1}
    below = (1e-300, 1.0)  # the last dot whose name stands below it
    for name, (x, speed, measured) in sorted(spots.items(), key=lambda spot: spot[1][0]):
        axes.plot([x], [speed], marker="o", ls="", color=INK, mfc=INK if measured else CARD, zorder=4, label="_")
        up = x < 4 * below[0] and 1 / 2 < speed / below[1] < 2  # the name of its neighbour is in the way
        below = below if up else (x, speed)
        place = {"xytext": (8, 5), "va": "bottom"} if up else {"xytext": (8, -5), "va": "top"}
        axes.annotate(name, (x, speed), textcoords="offset points", bbox=card, zorder=3, **place)
    label_lines(axes)


@style()
def mark_ridge(axes, ridge, peak):
    """Write `ridge`, in FLOP per byte, above the corner where a slope meets its roof at `peak` FLOP/s."""
    text = f"ridge {ridge:.3g}"
    axes.margins(y=0.1)  # room for the words
    axes.annotate(text, (ridge, peak), xytext=(0, 6), textcoords="offset points", ha="center", va="bottom", fontsize=9)


def _spot(name, point, gpu, dtype):
    """(FLOP per byte, FLOP/s, whether measured) of a point of the roofline."""
    flops, traffic, *seconds = point if isinstance(point, tuple) else (point.flops, point.bytes)
    if not flops or not traffic:
        raise ValueError(f"{name} has {flops} FLOPs and {traffic} bytes; a roofline has a place for what has both")
    time = seconds[0] if seconds else accounting.roofline_seconds(flops, traffic, gpu, dtype)
    return flops / traffic, flops / time, bool(seconds)


def _last_point(line):
    """The last point of a line whose coordinates are finite, or None."""
    x, y = np.asarray(line.get_xdata(orig=False), float), np.asarray(line.get_ydata(orig=False), float)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    return (x[known[-1]], y[known[-1]]) if known.size else None


def _spread(places, gap, low, high):
    """Places in the same order between `low` and `high`, near to their own, and `gap` apart where there is room."""
    order, out = np.argsort(places, kind="stable"), np.clip(np.array(places, float), low, high)
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    for _ in range(300):
        for below, above in pairwise(order):
            short = max(0.0, gap - (out[above] - out[below]))
            out[below], out[above] = out[below] - short / 2, out[above] + short / 2
        out = np.clip(out, low, high)
    return out


def _darker(color):
    """The colour with enough ink in it to be read as text."""
    return tuple(0.6 * np.array(matplotlib.colors.to_rgb(color)))
