"""The style of the figures: labels that do not collide, nothing global, nothing lost without colour."""

import struct
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from minids import accounting
from minids.lab import plots

matplotlib = pytest.importorskip("matplotlib")


def boxes(figure, texts):
    figure.canvas.draw()
    return [text.get_window_extent() for text in texts]


def test_neither_pyplot_nor_global_state():
    code = """if True:
        import sys, matplotlib
        def state(): return {k: v for k, v in dict.items(matplotlib.rcParams) if not k.startswith("backend")}
        before = state()
        from minids.lab import plots
        figure, axes = plots.figure()
        axes.plot([1, 2], label="a")
        plots.label_lines(axes)
        plots.heat(axes, [[1, 2]])
        plots.show(figure)
        assert len(plots.png(figure)) > 1000
        assert state() == before
        assert "matplotlib.pyplot" not in sys.modules and "IPython" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_users_settings_do_not_reach_the_figure():
    want = plots.png(plots.figure(3, 2)[0])
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert plots.png(plots.figure(3, 2)[0]) == want
    assert struct.unpack(">II", want[16:24]) == (3 * plots.DPI, 2 * plots.DPI)


def test_the_card_is_opaque_and_lines_differ_without_colour():
    figure, axes = plots.figure(columns=2)
    assert axes.shape == (2,) and figure.get_facecolor()[3] == 1.0
    lines = [axes[0].plot([1, 2])[0] for _ in plots.COLORS]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(lines)
    assert len({str(dash) for dash in plots.DASHES}) == len(lines)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_labels_stand_apart_inside_the_axes(offset):
    figure, axes = plots.figure()
    for run in range(7):
        axes.plot([0, 1, 2], [0.5, 0.2, offset + run * 1e-3], label=f"run {run}")
    axes.plot([0, 2], [0, 0.5], label="ends early").pop().set_ydata([0, np.nan])
    axes.plot([0, 2], [np.nan, np.nan], label="nothing")
    plots.label_lines(axes)
    assert [text.get_text() for text in axes.texts] == [f"run {run}" for run in range(7)] + ["ends early"]
    found = boxes(figure, axes.texts[:7])
    assert all(upper.y0 >= lower.y1 - 1 for lower, upper in pairwise(found))
    inside = axes.get_window_extent()
    assert all(inside.y0 - 10 <= box.y0 and box.y1 <= inside.y1 + 10 for box in found)
    assert all(box.x1 <= figure.bbox.x1 for box in found)


def test_heat_bars_and_roofline():
    figure, axes = plots.figure(10, 4, columns=3)
    image = plots.heat(
        axes[0], np.arange(6).reshape(2, 3), "tokens", ["a", "b"], ["x", "y", "z"], numbers=".0f", vmax=9
    )
    assert image.get_clim() == (0, 9) and [text.get_text() for text in axes[0].texts] == list("012345")
    plots.bars(axes[1], {"MHA": {"cache": 10, "weights": 4}, "MLA": {"cache": 1.234}}, unit="MB")
    assert [text.get_text() for text in axes[1].texts] == ["10 MB", "1.23 MB", "4 MB"]
    points = {"decode": (30e9, 1e9), "measured": (1e15, 1e12, 2.0)}
    plots.roofline(axes[2], ["H200", "A100"], points, torch.bfloat16)
    ridges = {"ridge 206", "ridge 153"}
    assert {text.get_text() for text in axes[2].texts} == {"decode", "measured", "H200", "A100"} | ridges
    spots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes[2].lines if len(line.get_xdata()) == 1]
    assert spots == [(30, pytest.approx(30 * accounting.GPUS["H200"].bandwidth)), (1000, 5e14)]
    assert len(plots.png(figure)) > 1000
    with pytest.raises(ValueError, match="copy has 0 FLOPs"):
        plots.roofline(axes[2], ["H200"], {"copy": (0, 10)})


@pytest.mark.parametrize("order", [1, -1])
def test_names_of_neighbours_under_a_roof_do_not_collide(order):
    speeds = {"scale": (0.03, 4e8), "8 rows": (4, 26e9), "16 rows": (8, 26.3e9), "1024 rows": (800, 60e9)}
    points = {name: (1e9, 1e9 / at, 1e9 / speed) for name, (at, speed) in list(speeds.items())[::order]}
    figure, axes = plots.figure(7.5, 4.2)
    plots.roofline(axes, ["H200"], points, torch.float32)
    names = [text for text in axes.texts if text.get_text() in points]
    found = boxes(figure, names)
    assert len(found) == 4 and not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])


def test_long_lines_get_few_markers_and_titles_go_left():
    figure, axes = plots.figure()
    line, short = axes.plot(range(1000))[0], axes.plot(range(20))[0]
    axes.set_title("loss")
    plots.png(figure)
    assert (line.get_markevery(), short.get_markevery()) == ((3, 83), None)
    assert (axes.get_title("left"), axes.get_title()) == ("loss", "")


def test_show_in_ipython_gives_a_png_with_its_words(monkeypatch):
    ipython = pytest.importorskip("IPython")
    shown = []
    figure, _ = plots.figure(3, 2)
    plots.show(figure, alt="an empty pair of axes")
    monkeypatch.setattr(ipython, "get_ipython", object)
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append((data, options)))
    plots.show(figure, alt="an empty pair of axes")
    ((data, options),) = shown
    assert data["text/plain"] == "an empty pair of axes" and set(data) == {"image/png", "text/plain"}
    assert options["metadata"]["image/png"] == {"width": 300, "height": 200, "alt": "an empty pair of axes"}
