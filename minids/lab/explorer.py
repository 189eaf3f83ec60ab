"""One figure with controls: a slider moves, the same figure is drawn again into the same picture, without a flicker.

    def draw(figure, context, heads, absorbed):
        axes = figure.subplots()
        ...
    explore(draw, alt="Cache bytes over context", context=(128, 4096, 128), heads=[1, 8, 128], absorbed=True)

What is displayed carries the picture as a PNG beside the live controls: a web view and nbconvert show that. JupyterLab
shows the controls as they were saved with the notebook (saveState in jupyter_conf) until the cell is run again. Without
ipywidgets the static picture is shown, with a sentence.
"""

import html
import math
from numbers import Real

from minids.lab import plots

try:
    import ipywidgets as widgets
except ImportError:
    widgets = None

BOX = widgets.VBox if widgets else object


def explore(draw, alt="figure", size=(7, 4), **controls):
    """An Explorer that calls `draw(figure, **values)` at once, and again whenever a control moves.

    Each control is named by its argument and given as (low, high) or (low, high, step): a slider from its middle; a
    list: a choice, the first at the start; True or False: a box to tick; or a widget. `alt` says in a sentence what the
    picture shows; `size` is in inches. Raises ValueError for a control of another form; an exception of `draw` is shown
    in place of the picture. Without ipywidgets it shows the picture at the controls' first values and returns None.
    """
    if widgets is not None:
        return Explorer(draw, alt, size, {name: _control(name, given) for name, given in controls.items()})
    figure = plots.blank(*size)
    with plots.style():
        draw(figure, **{name: _first(name, given) for name, given in controls.items()})
    print("Without ipywidgets the controls are missing (pip install ipywidgets); this is the picture at their start.")
    plots.show(figure, alt)
    return None


class Explorer(BOX):
    """Controls above a picture; `values` are the controls', `image.value` is the PNG, `error` the line or ""."""

    def __init__(self, draw, alt, size, controls):
        self.figure, self.alt, self.error = plots.blank(*size), alt, ""
        self._draw, self._controls = draw, controls
        wide = f"{round(size[0] * plots.CSS_DPI)}px"
        self.image = widgets.Image(format="png", layout={"width": "100%", "max_width": wide})
        self.line = widgets.HTML(layout={"margin": "0", "overflow": "hidden"})
        for control in controls.values():
            control.observe(lambda _: self.redraw(), "value")
        super().__init__([*controls.values(), self.image, self.line])
        self.redraw()

    @property
    def values(self):
        """{name: value} of the controls."""
        return {name: control.value for name, control in self._controls.items()}

    def redraw(self):
        """Draw the figure with the controls' values; show the exception's line where `draw` raises one."""
        self.figure.clear()
        try:
            with plots.style():
                self._draw(self.figure, **self.values)
            self.image.value, self.error = plots.png(self.figure), ""
        except Exception as error:
            self.error = " ".join(f"{type(error).__name__}: {error}".split())
        words = html.escape(self._sentence())
        self.line.value = words if self.error else f'<span role="img" aria-label="{words}"></span>'
        self.line.layout.height = "auto" if self.error else "0px"  # the picture's words are for who hears the page
        self.image.layout.display = "none" if self.error else None

    def _sentence(self):
        return f"The figure could not be drawn. {self.error}" if self.error else self.alt

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs) or {}
        if self.error:
            return {**data, "text/plain": self._sentence()}, {}
        still, metadata = plots.bundle(self.image.value, self.figure, f"{self.alt} (run the cell for the controls)")
        return {**data, **still}, metadata


def _control(name, given):
    """The widget of a control in its short form."""
    label = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(given, widgets.Widget):
        given.description = given.description or label["description"]
        return given
    start = _first(name, given)
    if isinstance(given, bool):
        return widgets.Checkbox(start, indent=False, **label)
    if isinstance(given, list):
        numbers = all(isinstance(value, Real) for value in given)
        choice = widgets.SelectionSlider if numbers else widgets.Dropdown
        return choice(options=given, value=start, **label)
    low, high, step = _range(given)
    if isinstance(start, int):
        return widgets.IntSlider(start, low, high, step, **label)
    digits = next((n for n in range(6) if all(math.isclose(round(x, n), x) for x in (low, step))), 6)
    return widgets.FloatSlider(start, min=low, max=high, step=step, readout_format=f".{digits}f", **label)


def _first(name, given):
    """The value that a control starts with; raises ValueError for a form that is none of the known."""
    if isinstance(given, bool):
        return given
    if isinstance(given, list) and given:
        return given[0]
    if isinstance(given, tuple) and len(given) in (2, 3) and all(isinstance(value, Real) for value in given):
        low, high, step = _range(given)
        if low < high and step > 0:
            steps = int((high - low) / step / 2)
            return low + steps * step
    raise ValueError(f"{name}={given!r} is no control; give (low, high), (low, high, step), a list, a bool or a widget")


def _range(given):
    """(low, high, step); a step that is not given is 1, or a hundredth of the way between floats."""
    if len(given) == 3:
        return given
    low, high = given
    return low, high, 1 if isinstance(low, int) and isinstance(high, int) else (high - low) / 100
