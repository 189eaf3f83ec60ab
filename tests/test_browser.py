"""Every lesson in a real JupyterLab and chromium, as `make lab` starts it: opened, run, its sliders moved, solved.

MINIDS_SCREENSHOTS=DIR keeps the pictures of each lesson in the light and the dark theme.
"""

import os
import shutil
import subprocess
from pathlib import Path

import lab_driver as driver
import nbformat
import pytest

from minids.lab import landing, outputs, plots, portrait, rules
from minids.lab.exercises import by_lesson
from minids.lab.source import ROOT, read_all

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")]
LESSONS = read_all()
WORD_BREAK = "element => getComputedStyle(element).wordBreak"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, token) of a JupyterLab whose root is a copy of lessons/ and solutions/."""
    folder = tmp_path_factory.mktemp("browser") / "root"
    for name in ("lessons", "solutions"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with pytest.MonkeyPatch.context() as patch, open(folder.parent / "lab.log", "w") as log:
        patch.setenv("MINIDS_HOME", str(folder / ".minids"))
        landing.write(folder)
        server, address, token = driver.start(folder, log)
        yield address, token
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=driver.FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    context = chromium.new_context(viewport={"width": 1300, "height": 1000})
    tab = driver.Tab(context.new_page())
    tab.page.set_default_timeout(60_000)
    context.route("**/*", tab.route)
    tab.page.on("console", tab.hear)
    tab.page.on("pageerror", lambda error: tab.problems.append(str(error)))
    yield tab
    context.close()


@pytest.fixture
def pictures(tmp_path):
    return Path(os.environ.get("MINIDS_SCREENSHOTS") or tmp_path)


def test_jupyterlab_opens_at_the_landing_page(lab, tab, pictures):
    address, token = lab
    tab.page.goto(f"{address}/?token={token}")
    tab.page.wait_for_selector(".jp-MarkdownViewer h1")
    assert tab.page.locator(".jp-MarkdownViewer h1").inner_text().startswith("Welcome to minids")
    assert tab.page.locator(".jp-MarkdownViewer table a").count() == len(LESSONS)
    driver.photograph(tab.page, pictures, "START")
    assert not tab.problems and not tab.outside


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.slug)
def test_a_lesson_runs_in_jupyterlab_and_judges_answers(lesson, lab, tab, pictures):
    page = tab.page
    driver.open_landing_page(page, lab)
    driver.open_lesson(page, lesson)
    page.set_default_timeout(driver.SECONDS * 1000)
    page.evaluate(driver.RUN_ALL)
    page.wait_for_function(driver.IDLE)
    made = driver.notebook(page)
    assert not driver.errors(made) and outputs.was_run(made)
    assert driver.move_sliders(page) or not any("explore(" in cell.source for cell in outputs.code_cells(made))
    if lesson.number in by_lesson():
        exercise = driver.first_exercise(made)
        assert exercise, "no stub `def name(…)` with a check of its name after it"
        at, _, title = exercise
        wrong = made.cells[at].source.replace(rules.STUB, "return 0")
        right = nbformat.read(ROOT / "solutions" / f"{lesson.slug}.ipynb", as_version=4).cells[at].source
        assert driver.verdict(page, *exercise, wrong).startswith(f"{title}: FAIL")
        assert driver.verdict(page, *exercise, right).startswith(f"{title}: PASS")
    assert not driver.errors(driver.notebook(page))
    driver.photograph(page, pictures, lesson.slug)
    assert not tab.problems and not tab.outside
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def test_an_explorer_is_there_when_its_notebook_is_opened_again(lab, chromium):
    lesson, shown = LESSONS[0], f"{driver.PANEL} img.widget-image"
    for first in (True, False):
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        driver.open_landing_page(page, lab)
        driver.open_lesson(page, lesson)
        if first:
            page.evaluate(driver.RUN_ALL)
            page.wait_for_function(driver.IDLE)
            assert page.locator(shown).count() == 1
            assert page.locator(".jp-OutputArea-output pre").first.evaluate(WORD_BREAK) == "normal", "no custom.css"
            page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")
        page.wait_for_selector(shown)
        assert not page.get_by_text("Error displaying widget").count()
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        page.close()


def test_the_page_of_the_model_fits_a_narrow_screen(chromium, tmp_path):
    row = ("12.5 linear_backward_of_everything", "decoding with MLA", "reference", "1,234,567", "1234.56", "it raises")
    sections = [("A figure", plots.figure(9, 3)[0]), ("Text", "x" * 200), ("A table", [row] * 3)]
    portrait.write_page(tmp_path / "page.html", "Mine", sections)
    page = chromium.new_page(viewport={"width": 420, "height": 800})
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.close()
