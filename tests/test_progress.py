"""What a learner has done survives restarts, damaged files and full disks; what passed can be loaded elsewhere."""

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import RMS_NORM, Notebook

from minids import files
from minids.lab import check, exercises, hint, keep, mine, predict, progress
from minids.lab.progress import Progress

RMS, ROPE = exercises.find("01.1"), exercises.find("01.2")
ROOT = Path(__file__).parents[1]
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def notebook():
    return Notebook()


def note(text):
    progress.update(lambda p: p.hints.update({text: 1}))


def on_disk(home):
    return json.loads((home / "progress.json").read_text())


# The folder ----------------------------------------------------------------------------------------------------------


def test_home_is_beside_the_lessons(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIDS_HOME")
    for folder in ("course/lessons/deep", "empty", "kept/.minids", "kept/lessons/in"):
        (tmp_path / folder).mkdir(parents=True)
    places = {"course": "course", "course/lessons": "course", "course/lessons/deep": "course"}
    for here, there in {**places, "empty": "empty", "kept": "kept", "kept/lessons/in": "kept"}.items():
        monkeypatch.chdir(tmp_path / here)
        assert progress.home() == tmp_path / there / ".minids"


def test_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDS_HOME", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert progress.home() == tmp_path / "elsewhere"


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the current folder")
def test_a_folder_that_was_removed_is_no_trouble(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIDS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert progress.home() == tmp_path / ".minids"


# The file ------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_there_is_something(home):
    assert progress.load() == Progress()
    assert not home.exists()


def test_it_survives_a_restart(home, notebook):
    check(notebook.cell(RMS_NORM))
    hint("01.2")
    predict("How many?", 3, "apples")
    code = "from minids.lab import progress; p = progress.load(); print(list(p.passed), p.hints, p.predictions)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['01.1'] {'01.2': 1} {'How many?': 3}"
    content = on_disk(home)
    assert set(content) == {"version", "passed", "hints", "predictions"} and content["version"] == 1
    assert set(content["passed"]["01.1"]) == {"name", "when"}
    assert [path.name for path in home.iterdir() if path.is_file()] == ["progress.json"]


DAMAGE = {
    "not JSON": "{'version': 1}",
    "half": '{"version": 1, "passed": {"01.1"',
    "empty": "",
    "binary": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "newer": '{"version": 2, "passed": {}}',
    "no table": '{"version": 1, "passed": ["01.1"]}',
    "passed": '{"version": 1, "passed": {"01.1": true}}',
    "hints": '{"version": 1, "hints": {"01.1": "two"}}',
    "predictions": '{"version": 1, "predictions": {"How?": [1]}}',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_kept_aside(kind, home, capsys):
    content = DAMAGE[kind] if isinstance(DAMAGE[kind], bytes) else DAMAGE[kind].encode()
    home.mkdir()
    (home / "passed").mkdir()
    (home / "progress.json").write_bytes(content)
    (home / "progress.json.damaged-1").write_text("older")
    hint("01.1")
    said = capsys.readouterr()
    assert said.out.startswith("01.1 rms_norm, hint 1 of 3\n")
    assert len(said.err.splitlines()) == 1 and len(said.err) < 400
    assert (
        "cannot be used (" in said.err and "it is kept as progress.json.damaged-2, and a fresh one begins" in said.err
    )
    assert (home / "progress.json.damaged-1").read_text() == "older"
    assert (home / "progress.json.damaged-2").read_bytes() == content
    assert on_disk(home)["hints"] == {"01.1": 1} and (home / "passed").is_dir()
    hint("01.1")
    assert capsys.readouterr().err == ""


def test_a_folder_in_the_place_of_the_file_is_kept_aside(home, capsys):
    (home / "progress.json" / "inside").mkdir(parents=True)
    note("01.1")
    assert (home / "progress.json.damaged-1" / "inside").is_dir() and on_disk(home)["hints"] == {"01.1": 1}


def test_keys_that_are_not_known_are_kept(home):
    home.mkdir()
    (home / "progress.json").write_text('{"version": 1, "passed": {"77.7": {}}, "badges": [1, {"a": null}]}')
    note("01.1")
    content = on_disk(home)
    assert (
        content["badges"] == [1, {"a": None}] and content["passed"] == {"77.7": {}} and content["hints"] == {"01.1": 1}
    )
    assert set(content) == {"version", "passed", "hints", "predictions", "badges"}


def test_a_write_that_fails_leaves_the_old_file(home, monkeypatch, capsys):
    note("one")
    before = (home / "progress.json").read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", fail)
        note("two")
        note("three")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"progress cannot be kept in {home} (") and said.endswith("the lesson goes on without it")
    assert (home / "progress.json").read_bytes() == before
    assert [path.name for path in home.iterdir()] == ["progress.json"]
    assert progress.load().hints == {"one": 1, "two": 1, "three": 1}
    note("four")  # there is room again: nothing is lost
    assert on_disk(home)["hints"] == {"one": 1, "two": 1, "three": 1, "four": 1}


@pytest.fixture
def locked(home, monkeypatch):
    """A home that cannot be written; root may write anywhere, so for root the system calls are what refuses."""
    home.mkdir()
    (home / "progress.json").write_text('{"version": 1, "hints": {"01.2": 1}}')

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "sync", refuse)
    return home


def test_a_folder_that_cannot_be_written_is_said_once(locked, notebook, capsys):
    rms_norm = notebook.cell(RMS_NORM)
    assert check(rms_norm) is rms_norm
    hint("01.1")
    hint("01.1")
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "the lesson goes on without it" in said.err
    assert said.out.splitlines()[0] == "01.1 rms_norm: PASS"
    assert "01.1 rms_norm, hint 2 of 3" in said.out
    assert progress.load().hints == {"01.1": 2, "01.2": 1}
    assert (locked / "progress.json").read_text() == '{"version": 1, "hints": {"01.2": 1}}'


def test_a_damaged_file_that_cannot_be_renamed_is_left(locked, monkeypatch, capsys):
    (locked / "progress.json").write_text("damaged")
    hint("01.1")
    monkeypatch.undo()
    monkeypatch.setenv("MINIDS_HOME", str(locked))
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (locked / "progress.json").read_text() == "damaged"


@pytest.mark.skipif(AS_ROOT or os.name == "nt", reason="root may write anywhere")
def test_a_read_only_folder(home, capsys):
    home.mkdir()
    home.chmod(0o500)
    try:
        note("01.1")
        assert len(capsys.readouterr().err.splitlines()) == 1
    finally:
        home.chmod(0o700)


def test_a_file_where_the_folder_should_be(home, capsys, notebook):
    home.write_text("a file")
    rms_norm = notebook.cell(RMS_NORM)
    assert check(rms_norm) is rms_norm and mine("01.1")
    assert len(capsys.readouterr().err.splitlines()) == 1 and home.read_text() == "a file"


# Functions as source -------------------------------------------------------------------------------------------------

KEPT = {
    "plain": RMS_NORM,
    "module aliases": """
import torch as tt
import numpy as np

def rms_norm(x, weight, eps):
    assert np.pi > 3
    return tt.nn.functional.rms_norm(x, weight.shape, eps=eps) * weight
""",
    "helpers": """
def mean(z):
    return square(z).mean(-1, keepdim=True)

def square(z):
    return z * z

def rms_norm(x, weight, eps):
    return x * torch.rsqrt(mean(x) + eps) * weight
""",
    "two names of one helper": """
def mean(z):
    return z.square().mean(-1, keepdim=True)

m = n = mean

def rms_norm(x, weight, eps):
    assert m is n is mean
    return x * torch.rsqrt(m(x) + eps) * weight
""",
    "recursion": """
def rms_norm(x, weight, eps, deep=3):
    if deep:
        return rms_norm(x, weight, eps, deep - 1)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
""",
    "mutual recursion": """
def one(x, n):
    return two(x, n - 1) if n else x

def two(x, n):
    return one(x, n)

def rms_norm(x, weight, eps):
    x = one(x, 3)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
""",
    "constants": """
A, B, C = 2, -1, float("inf")
D = (1, "a", [None, True])
E = 1e-30

def rms_norm(x, weight, eps):
    assert C == math.inf and D[2][1] and E
    return x * torch.rsqrt((x**A).mean(B, keepdim=True) + eps) * weight
""",
    "dtypes": """
WIDE = torch.float64
CPU = torch.device("cpu")

def rms_norm(x, weight, eps):
    kind, x = x.dtype, x.to(CPU, WIDE)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(kind)
""",
    "from-imports": """
from torch import rsqrt, einsum
from math import sqrt as root
from torch.nn.functional import silu

def rms_norm(x, weight, eps):
    assert root(4) == 2 and silu and einsum
    return x * rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
""",
    "annotations": """
from torch import Tensor

def rms_norm(x: Tensor, weight: "Tensor", eps: float = 1e-6) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
""",
    "defaults": """
DEEP = -1

def rms_norm(x, weight, eps, *, dim=DEEP):
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps) * weight
""",
    "decorators": """
import functools

def twice(fn):
    @functools.wraps(fn)
    def inner(*args):
        fn(*args)
        return fn(*args)
    return inner

@twice
def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
""",
    "a cached helper": """
import functools

@functools.lru_cache
def two(n):
    return 2

def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x ** two(1)).mean(-1, keepdim=True) + eps) * weight
""",
    "attributes named as globals": "mean = torch.ones(3)\nrsqrt = object()\n" + RMS_NORM,
    "locals named as globals": """
y = torch.ones(3)

def rms_norm(x, weight, eps):
    y = x
    assert [y for y in (1, 2)]
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
""",
    "builtins that are covered": """
def abs(z):
    return z.square()

def rms_norm(x, weight, eps):
    return x * torch.rsqrt(abs(x).mean(-1, keepdim=True) + eps) * weight
""",
    "nested functions": """
def rms_norm(x, weight, eps):
    def mean(z):
        return z.square().mean(-1, keepdim=True)
    return (lambda y: y * torch.rsqrt(mean(y) + eps) * weight)(x)
""",
    "a lambda with a name": """
rms_norm = lambda x, weight, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
""",
    "a docstring at the margin": """
def rms_norm(x, weight, eps):
    '''One line.

Another line.
    '''
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
""",
    "letters of another alphabet": """
def rms_norm(x, weight, eps):
    ε = eps  # größer als 0
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + ε) * weight
""",
}
WITHOUT_WRAPS = """
def twice(fn):
    def inner(*args):
        return fn(*args)
    return inner

@twice
def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
"""


def same(one, other):
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    return torch.allclose(one(x, weight, 1e-3), other(x, weight, 1e-3), atol=1e-6)


@pytest.mark.parametrize("kind", KEPT)
def test_a_kept_function_does_the_same(kind, notebook, capsys):
    rms_norm = notebook.cell(KEPT[kind], "rms_norm")
    assert check(rms_norm, "01.1") is rms_norm
    said = capsys.readouterr()
    assert said.out.startswith("01.1 rms_norm: PASS") and said.err == ""
    kept = progress.kept(RMS)
    assert kept is not rms_norm and same(kept, rms_norm)
    assert check(kept, "01.1") is kept  # and it can be kept again
    assert capsys.readouterr().err == "" and same(progress.kept(RMS), rms_norm)


def test_kept_functions_run_in_another_process(home, notebook):
    check(notebook.cell(KEPT["helpers"], "rms_norm"))
    code = (
        "import sys, torch; from minids.lab import mine; torch.manual_seed(3)\n"
        "f = mine('rms_norm'); print(f(torch.randn(2, 4), torch.ones(4), 0.1).tolist(), f.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    torch.manual_seed(3)
    expected = RMS.reference(torch.randn(2, 4), torch.ones(4), 0.1)
    first, values = done.stdout.splitlines()
    assert first == "01.1 rms_norm: yours" and values.endswith(" rms_norm")
    assert torch.allclose(torch.tensor(json.loads(values.removesuffix(" rms_norm"))), expected)


def test_a_function_in_a_file_is_kept(tmp_path, monkeypatch):
    (tmp_path / "my_answers.py").write_text("import torch\nTWO = 2\n\n\n" + RMS_NORM.replace("x.square()", "(x**TWO)"))
    monkeypatch.syspath_prepend(tmp_path)
    import my_answers

    check(my_answers.rms_norm)
    assert "TWO = 2" in progress.kept_path(RMS).read_text() and same(progress.kept(RMS), RMS.reference)


def test_a_reference_that_it_uses_comes_along(notebook):
    notebook.scope["my_norm"] = exercises.reference("01.1")
    fn = notebook.cell("def rms_norm(x, weight, eps):\n    return my_norm(x, weight, eps)\n")
    check(fn)
    assert "_reference('01.1')" in progress.kept_path(RMS).read_text() and same(progress.kept(RMS), fn)


def test_a_kept_function_that_it_uses_comes_along(notebook):
    check(notebook.cell(KEPT["constants"], "rms_norm"))
    notebook.scope["mine_before"] = progress.kept(RMS)
    fn = notebook.cell("def another(x, weight, eps):\n    return mine_before(x, weight, eps)\n")
    check(fn, "01.1")
    source = progress.kept_path(RMS).read_text()
    assert "minids_passed" not in source and source.endswith("\n\nrms_norm = another\n")
    assert same(progress.kept(RMS), fn)


def test_a_function_of_another_name_is_kept_under_the_exercises(notebook):
    check(notebook.cell(RMS_NORM.replace("rms_norm", "attempt_3")), "01.1")
    assert progress.kept_path(RMS).read_text().endswith("\n\nrms_norm = attempt_3\n")
    assert same(progress.kept(RMS), RMS.reference)


def test_a_decorator_without_wraps_is_kept(notebook):
    fn = notebook.cell(WITHOUT_WRAPS, "rms_norm")
    assert check(fn, "01.1") is fn
    assert same(progress.kept(RMS), fn)


class Method:
    def rms_norm(self, x, weight, eps):
        return RMS.reference(x, weight, eps)


CANNOT = {
    "a tensor": ("TWO = torch.tensor(2.0)", "x**TWO", "the global TWO (Tensor); pass it as an argument"),
    "a class": ("class Two:\n    n = 2", "x**Two.n", "the class Two of the notebook; put what it needs into the"),
    "an object": ("import types\nbox = types.SimpleNamespace(n=2)", "x**box.n", "the global box (SimpleNamespace)"),
    "two of one name": (
        "def square(z):\n    return z * z\nold = square\ndef square(z):\n    return old(z)",
        "square(x)",
        "two different things called square; give one another name",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_kept_is_said(kind, notebook, capsys, home):
    before, squares, reason = CANNOT[kind]
    notebook.cell(before)
    rms_norm = notebook.cell(RMS_NORM.replace("x.square()", f"({squares})"))
    assert check(rms_norm) is rms_norm
    said = capsys.readouterr()
    assert said.out.startswith("01.1 rms_norm: PASS")
    (line,) = said.err.splitlines()
    assert line.startswith("passed, but your function cannot be kept for later lessons: ") and reason in line
    assert "01.1" in progress.load().passed and mine("01.1") is exercises.reference("01.1")


def without_source():
    scope = {"torch": torch}
    exec(RMS_NORM, scope)
    return scope["rms_norm"]


OTHERS = {
    "a method": (lambda n: Method().rms_norm, "it is a method; write it as a plain function, with def"),
    "a lambda": (lambda n: [lambda x, w, e: RMS.reference(x, w, e)][0], "it is a lambda without a name"),
    "partial": (lambda n: functools.partial(RMS.reference), "it is of the type partial"),
    "no source": (lambda n: without_source(), "the source of rms_norm cannot be found"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_has_no_plain_source_is_said(kind, notebook, capsys):
    make, reason = OTHERS[kind]
    check(make(notebook), "01.1")
    said = capsys.readouterr()
    assert said.out.startswith("01.1 rms_norm: PASS") and reason in said.err and len(said.err.splitlines()) == 1


def test_source_that_does_not_do_the_same_is_not_kept(notebook, capsys, monkeypatch):
    monkeypatch.setattr(keep, "source_of", lambda fn, name: "def rms_norm(x, weight, eps):\n    return x\n")
    check(notebook.cell(RMS_NORM))
    assert "its source alone does not do the same" in capsys.readouterr().err
    monkeypatch.setattr(keep, "source_of", lambda fn, name: "nonsense")
    check(notebook.cell(RMS_NORM))
    assert "its source alone does not run (NameError: " in capsys.readouterr().err
    assert not progress.kept_path(RMS).exists()


NONSENSE = {
    "no Python": "def rms_norm(:\n",
    "empty": "",
    "another name": "def norm(x):\n    return x\n",
    "a number": "rms_norm = 5\n",
    "raises": "raise ValueError('edited')\n",
    "exits": "import sys\nsys.exit()\n",
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_kept_file_edited_into_nonsense_gives_the_reference(kind, notebook, capsys):
    check(notebook.cell(RMS_NORM))
    content = NONSENSE[kind]
    progress.kept_path(RMS).write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    assert mine("01.1") is exercises.reference("01.1")
    said = capsys.readouterr()
    assert said.out == "01.1 rms_norm: the reference\n"
    assert len(said.err.splitlines()) == 1 and "the reference stands in" in said.err


def test_an_edited_file_is_read_again(notebook):
    check(notebook.cell(RMS_NORM))
    progress.kept_path(RMS).write_text("def rms_norm(x, weight, eps):\n    return x\n")
    assert same(mine("01.1"), lambda x, weight, eps: x)


def test_an_error_in_a_kept_function_shows_its_line(notebook, capsys):
    path = progress.kept_path(RMS)
    path.parent.mkdir(parents=True)
    path.write_text("def rms_norm(x, weight, eps):\n    return x.nonsense\n")
    check(mine("01.1"))
    assert "in line 2 of rms_norm: return x.nonsense" in capsys.readouterr().out
