"""The explorer: its picture follows the controls, stays behind them as a PNG, and shows what went wrong."""

import base64

import pytest

from minids.lab import explorer
from minids.lab.explorer import explore

widgets = pytest.importorskip("ipywidgets")


def draw(figure, power, scale=1.0, name="a", dots=False):
    axes = figure.subplots()
    axes.plot([1, 2, 3], [scale * x**power for x in (1, 2, 3)], ls="" if dots else "-", label=name)
    axes.set_title(name)


def test_the_picture_follows_the_controls():
    shown = explore(draw, power=(0, 4), scale=(0.0, 1.0), name=["a", "b"], dots=False, size=(3, 2))
    assert shown.values == {"power": 2, "scale": 0.5, "name": "a", "dots": False}
    seen = {shown.image.value}
    for index, value in enumerate((3, 0.75, "b", True)):
        shown.children[index].value = value
        assert shown.image.value not in seen and bytes(shown.image.value[:4]) == b"\x89PNG"
        seen.add(shown.image.value)
    assert len(shown.figure.axes) == 1
    assert shown.image.layout.max_width == "300px" and shown.image.layout.width == "100%"


def test_a_tooltip_on_the_image_stays_away():
    """ipywidgets 8.1.9 in JupyterLab fails to show an Image that has one (seen in a browser)."""
    assert explore(draw, power=(0, 4), size=(3, 2)).image.tooltip is None


def test_the_forms_of_a_control():
    ready = widgets.IntText(7)
    ranges = {"context_length": (128, 1024, 128), "lr": (0.0, 0.01), "heads": [1, 8, 128]}
    others = {"mode": ["expanded", "absorbed"], "causal": True, "steps": ready}
    shown = explore(lambda figure, **_: figure.subplots(), size=(2, 1), **ranges, **others)
    kinds = [type(child).__name__ for child in shown.children[:-2]]
    assert kinds == ["IntSlider", "FloatSlider", "SelectionSlider", "Dropdown", "Checkbox", "IntText"]
    assert [child.description for child in shown.children[:3]] == ["context length", "lr", "heads"]
    assert shown.values["context_length"] == 512 and shown.values["steps"] == 7 and ready.description == "steps"
    assert shown.children[1].readout_format == ".4f"


@pytest.mark.parametrize(("given", "digits"), [((0.25, 3.75, 0.25), 2), ((1.0, 9.0, 0.2), 1), ((0.05, 1.05, 0.5), 2)])
def test_a_slider_reads_as_exactly_as_it_steps(given, digits):
    shown = explore(lambda figure, **_: figure.subplots(), size=(2, 1), price=given)
    assert shown.children[0].readout_format == f".{digits}f"


@pytest.mark.parametrize("wrong", [(1,), (3, 1), [], "abc", (0, 1, 0), ("a", "b")])
def test_another_form_is_refused(wrong):
    with pytest.raises(ValueError, match=r"depth=.* is no control; give"):
        explore(draw, depth=wrong)


def test_the_picture_stands_behind_the_controls():
    shown = explore(draw, alt="A power of x", power=(0, 4), size=(3, 2))
    data, metadata = shown._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == shown.image.value
    assert data["text/plain"].startswith("A power of x") and 'aria-label="A power of x"' in shown.line.value
    assert "application/vnd.jupyter.widget-view+json" in data
    assert metadata["image/png"] == {"width": 300, "height": 200, "alt": data["text/plain"]}


def test_an_exception_is_one_line_and_goes_away():
    def sometimes(figure, n):
        if n == 0:
            raise ZeroDivisionError("division\nby zero")
        figure.subplots().plot([1, n])

    shown = explore(sometimes, n=(-2, 2), size=(3, 2))
    assert shown.error == "ZeroDivisionError: division by zero"
    assert shown.line.value.endswith(shown.error) and shown.image.layout.display == "none"
    data, _ = shown._repr_mimebundle_()
    assert "image/png" not in data and shown.error in data["text/plain"]
    shown.children[0].value = 1
    assert shown.error == "" and "ZeroDivisionError" not in shown.line.value
    assert shown.image.layout.display is None and bytes(shown.image.value[:4]) == b"\x89PNG"


def test_without_ipywidgets_a_static_picture_and_a_sentence(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(explorer, "widgets", None)
    monkeypatch.setattr(explorer.plots, "show", lambda figure, alt: calls.append(alt))
    assert explore(draw, alt="A power", power=(0, 4), name=["a", "b"]) is None
    assert calls == ["A power"] and "pip install ipywidgets" in capsys.readouterr().out
