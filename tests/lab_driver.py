"""JupyterLab as `make lab` starts it, and the steps that a person takes in it, in chromium by Playwright."""

import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from minids.lab import outputs, rules
from minids.lab.source import ROOT

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-background-networking"]
FLAGS += ["--disable-dev-shm-usage", "--disable-component-update", "--disable-sync"]
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
SECONDS = 300
PIECE = 1500  # pixels in height of one picture of a long page

IDLE = """() => { const panel = window.jupyterapp.shell.currentWidget;
    return panel?.sessionContext?.isReady && panel.sessionContext.session?.kernel?.status === 'idle'; }"""
RUN_ALL = """async () => { const app = window.jupyterapp, panel = app.shell.currentWidget;
    await app.commands.execute('notebook:run-all-cells');
    await panel.sessionContext.session.kernel.requestExecute({code: '', silent: true}).done; }"""
NOTEBOOK = "() => window.jupyterapp.shell.currentWidget.content.model.toJSON()"
PICTURE = """async handle => { const image = handle.closest('.jp-OutputArea').querySelector('img.widget-image');
    const bytes = await (await fetch(image.src)).arrayBuffer();
    return Array.from(new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))).join(); }"""
COUNT = "at => window.jupyterapp.shell.currentWidget.content.model.cells.get(at).executionCount"
ACTIVATE = """async at => { const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = at; await notebook.scrollToItem(at, 'center'); }"""
BOTTOM = f"""() => {{ const all = [...document.querySelectorAll('{PANEL} .jp-Cell')].map(
    cell => cell.getBoundingClientRect());
    return all.length ? all[all.length - 1].bottom - all[0].top : 0; }}"""


def settings(folder):
    """JupyterLab's user settings for these tests: every cell is in the page, however long the notebook."""
    path = folder / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    path.parent.mkdir(parents=True)
    path.write_text('{"windowingMode": "none"}')
    return folder


def start(folder, log):
    """(process, address, token) of a JupyterLab as `make lab` starts it, its root at `folder`, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, own = secrets.token_hex(16), folder.parent / "jupyter"
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    env = os.environ | {name: str(own / name.lower()) for name in names}
    env |= {"JUPYTER_CONFIG_PATH": str(ROOT / "minids/lab/jupyter_conf"), "MINIDS_FAST": "1"}
    options = [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--no-browser"]
    options += [
        f"--LabApp.workspaces_dir={own / 'workspaces'}",
        f"--LabApp.user_settings_dir={settings(own / 'settings')}",
    ]
    command = [sys.executable, "-m", "jupyterlab", *options, "--expose-app-in-browser"]
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address, began = f"http://127.0.0.1:{port}", time.monotonic()
    while server.poll() is None and time.monotonic() - began < 120:
        try:
            urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2).close()
            return server, address, token
        except OSError:
            time.sleep(0.2)
    server.kill()
    raise RuntimeError(f"JupyterLab did not start:\n{Path(log.name).read_text()[-3000:]}")


@dataclass
class Tab:
    """A page, what it wrote to the console as an error, and what it asked of other hosts."""

    page: object
    problems: list = field(default_factory=list)
    outside: list = field(default_factory=list)

    def route(self, route):
        if route.request.url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")):
            return route.continue_()
        self.outside.append(route.request.url)
        return route.abort()

    def hear(self, message):
        if message.type == "error":
            self.problems.append(f"{message.text} ({message.location.get('url', '')})")


def open_landing_page(page, lab):
    """Open the landing page, rendered, in a workspace of its own, so that no other tab is restored."""
    address, token = lab
    page.goto(f"{address}/lab/workspaces/{secrets.token_hex(4)}/tree/lessons/START.md?token={token}")
    page.wait_for_selector(".jp-MarkdownViewer h1")


def open_lesson(page, lesson):
    """Click the lesson's link on the landing page, and wait for its kernel."""
    page.locator(".jp-MarkdownViewer table").get_by_role("link", name=f"{lesson.number} {lesson.title}").click()
    page.wait_for_selector(f"{PANEL} .jp-Notebook .jp-Cell")
    page.wait_for_function(IDLE)
    assert page.evaluate("() => window.jupyterapp.shell.currentWidget.context.path") == f"lessons/{lesson.slug}.ipynb"


def notebook(page):
    """The notebook in the page, as it would be saved."""
    return nbformat.from_dict(page.evaluate(NOTEBOOK))


def errors(made):
    return [f"{out.ename}: {out.evalue}" for c in outputs.code_cells(made) for out in c.outputs if "ename" in out]


def move_sliders(page):
    """Move every slider by one key, and assert that the picture beside it becomes another; returns how many."""
    sliders = page.locator(f"{PANEL} .jp-OutputArea .widget-slider [role=slider]").element_handles()
    for slider in sliders:
        slider.scroll_into_view_if_needed()
        before, value = slider.evaluate(PICTURE), slider.get_attribute("aria-valuenow")
        slider.focus()
        at_end = float(value) >= float(slider.get_attribute("aria-valuemax"))
        page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        until(lambda slider=slider, before=before: slider.evaluate(PICTURE) != before, "the slider changes no picture")
        page.wait_for_function(IDLE)
    return len(sliders)


def until(holds, problem, seconds=30):
    """Wait until `holds()`; fails with `problem` after some seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, problem
        time.sleep(0.1)


def run_cell(page, at):
    """Run one cell by the keyboard, and wait for its end."""
    before = page.evaluate(COUNT, at)
    page.keyboard.press("Control+Enter")
    until(lambda: page.evaluate(COUNT, at) not in (None, before), f"cell {at} does not run", SECONDS)
    page.wait_for_function(IDLE)


def answer(page, at, text):
    """Type `text` over the code of the cell at index `at`, and run it."""
    page.evaluate(ACTIVATE, at)
    page.locator(f"{PANEL} .jp-Notebook .jp-Cell").nth(at).locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)
    assert notebook(page).cells[at].source == text
    run_cell(page, at)


def first_exercise(made):
    """(index of the stub, index of the cell with its verdict, its name) in a notebook that was run, else None."""
    for at, cell in enumerate(made.cells):
        found = re.search(r"^def (\w+)\(", cell.source, re.MULTILINE)
        if cell.cell_type != "code" or not found or f"    {rules.STUB}" not in cell.source:
            continue
        for checked, later in enumerate(made.cells[at:], at):
            part = {"cells": [later]}
            for line in outputs.verdicts(nbformat.from_dict(part)):
                if line.split(":")[0].endswith(f" {found[1]}"):
                    return at, checked, line.split(":")[0]
    return None


def verdict(page, at, checked, title, text):
    """What the check says of an answer that is typed in."""
    answer(page, at, text)
    if checked != at:
        page.evaluate(ACTIVATE, checked)
        page.locator(f"{PANEL} .jp-Notebook .jp-Cell").nth(checked).locator(".cm-content").click()
        run_cell(page, checked)
    lines = outputs.verdicts(nbformat.from_dict({"cells": [notebook(page).cells[checked]]}))
    return next(line for line in lines if line.startswith(f"{title}:"))


def photograph(page, folder, name):
    """Pictures of what is open from top to bottom, in both themes: name_light_1.png, name_light_2.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    if page.locator(PANEL).count():
        page.evaluate(ACTIVATE, 0)
    height = min(max(1000, int(page.evaluate(BOTTOM)) + 200), 15_000)  # chromium ends at 16384
    page.set_viewport_size({"width": 1300, "height": height})
    for theme, title in THEMES.items():
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", title)
        page.wait_for_selector(f"body[data-jp-theme-name='{title}']", state="attached")
        page.wait_for_timeout(500)
        for number, top in enumerate(range(0, height, PIECE), 1):
            clip = {"x": 0, "y": top, "width": 1300, "height": min(PIECE, height - top)}
            page.screenshot(path=folder / f"{name}_{theme}_{number}.png", clip=clip)
    page.set_viewport_size({"width": 1300, "height": 1000})
