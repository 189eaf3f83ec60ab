"""The rules of the house: what may import what, how long things may be, and that the README's map is true."""

import ast
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest
import torch

import minids
from minids import data, lab, optim

ROOT = Path(__file__).parents[1]
CODE_LINES, KERNEL_FILES_LINES = 3000, 1000  # of the core without its files of Triton kernels, and of those
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 300, 40, 90

# A module imports what stands above it: never one of its own row, never one below. A folder counts as one module.
ORDER = [
    ["presets", "numerics", "functions", "files", "triton_env"],
    ["config", "layer_kernels", "grouped_kernels", "loss_kernels"],
    ["layers"],
    ["gqa", "mla", "moe", "fp8"],
    ["decode"],
    ["model"],
    ["accounting", "hub", "corpus", "optim", "checkpoint", "report"],
    ["data", "generate"],
    ["run"],
    ["train"],
    ["bench"],
    ["lab"],
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
TECHNIQUES = set(ORDER[3])
UPWARD = {  # (module, what it imports inside a function): why
    ("model", "hub"): "from_pretrained and save_pretrained are Transformer's methods, and hub.py builds a Transformer",
}
DRAWS = {"matplotlib", "ipywidgets"}
MAY_DRAW = {"report.py": "it draws a run's curve, inside the function, and says so where matplotlib is not installed"}
OPTIONAL = ["triton", "matplotlib", "ipywidgets", "transformers", "huggingface_hub", "safetensors", "tokenizers"]
OPTIONAL += ["tqdm", "datasets"]

FILES = sorted((ROOT / "minids").rglob("*.py"))
SOURCES = {path.relative_to(ROOT / "minids").as_posix(): path.read_text(encoding="utf-8") for path in FILES}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
CORE = [name for name in SOURCES if not name.startswith(("bench/", "lab/"))]
each_file = pytest.mark.parametrize("name", SOURCES)
each_core_file = pytest.mark.parametrize("name", CORE)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports(name):
    """(dotted name, line, whether inside a function) of every import; `from a import b` counts as a.b."""
    inside = {id(node) for function in functions(TREES[name]) for node in ast.walk(function)}
    package = ["minids", *name.split("/")[:-1]]
    for node in ast.walk(TREES[name]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join(filter(None, [*base, node.module, alias.name])) for alias in node.names]
        yield from ((dotted, node.lineno, id(node) in inside) for dotted in names)


def own_imports(name):
    """(module of minids, line, whether inside a function); the module is "" for the package itself."""
    for dotted, line, inside in imports(name):
        first, _, rest = dotted.partition(".")
        if first == "minids":
            module = rest.partition(".")[0]
            known = f"{module}.py" in SOURCES or f"{module}/__init__.py" in SOURCES
            yield (module if known else ""), line, inside


def docstring_lines(tree):
    """The line numbers of all docstrings in `tree`."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(text):
    """How many lines of `text` are code: not blank, not a comment, not a docstring."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in empty]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstring_lines(ast.parse(text)))


# Imports ---------------------------------------------------------------------------------------------------------


@each_file
def test_imports_point_one_way(name):
    module = name.split("/")[0].removesuffix(".py")
    if module == "__init__":
        return  # the package's front gathers what is public
    assert module in RANK, f"minids/{name} has no place: put {module!r} into ORDER of tests/test_house.py"
    for other, line, inside in own_imports(name):
        if other == module or RANK[module] >= RANK["bench"] > RANK.get(other, -1):
            continue
        where = f"minids/{name}:{line} imports {other or 'the package minids itself'}"
        assert other, f"{where}; import the module that has what you need"
        if (module, other) in UPWARD:
            assert inside, f"{where} at the top; it may only inside a function, because {UPWARD[module, other]}"
            continue
        assert RANK[other] < RANK[module], (
            f"{where}, which is not above {module} in ORDER (tests/test_house.py): move what both need into a module "
            "above them (layers.py for techniques)"
        )


def test_every_upward_import_is_still_there():
    found = {(name.removesuffix(".py"), other) for name in SOURCES for other, _, _ in own_imports(name)}
    unused = UPWARD.keys() - found
    assert not unused, f"nobody imports so any more; take {unused} out of UPWARD in tests/test_house.py"


@pytest.mark.parametrize("name", [name for name in SOURCES if name.endswith(("/reference.py", "/kernels.py"))])
def test_equations_and_kernels_stand_alone(name):
    for other, line, _ in own_imports(name):
        assert other not in TECHNIQUES, (
            f"minids/{name}:{line} imports from {other}/; reference.py and kernels.py import neither each other nor "
            "layer.py: pass what is needed as an argument, or move it into layers.py"
        )


@each_core_file
def test_only_lab_and_bench_draw(name):
    for dotted, line, inside in imports(name):
        if dotted.partition(".")[0] in DRAWS:
            where = f"minids/{name}:{line} imports {dotted}"
            assert name in MAY_DRAW, f"{where}; figures and widgets belong into minids/lab or minids/bench"
            assert inside, f"{where} at the top; move it into the function: {MAY_DRAW[name]}"


HIDE = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hidden, sys.meta_path)
import minids
minids.Transformer(minids.ModelConfig.preset("tiny"))
"""
COUNT = """
import sys, torch
for name in OPTIONAL:  # torch itself may have imported some
    sys.modules.pop(name, None)
import minids
sys.exit(", ".join(name for name in OPTIONAL if name in sys.modules) or 0)
"""


def run(code):
    """What Python says on stderr, "" where it ends well."""
    code = f"OPTIONAL = {OPTIONAL}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stderr.strip() if done.returncode else ""


def test_import_works_where_only_torch_is_installed():
    error = run(HIDE)
    assert not error, f"`import minids` needs a package that may be absent; import it where it is used:\n{error}"


def test_import_leaves_other_packages_alone():
    names = run(COUNT)
    assert not names, f"`import minids` imports {names}; import it inside the function that needs it"


def test_tab_completion_shows_what_is_public_and_all_of_it_is_there():
    for package in (minids, minids.mla, minids.moe, minids.fp8):
        names = set(dir(package))
        lazy = names - set(package.__all__)
        assert set(package.__all__) <= names and all("kernels" in name for name in lazy)
        assert all(hasattr(package, name) for name in package.__all__)


def test_the_loop_in_the_docstring_of_minids_runs():
    block = re.search(r"\n    corpus = .*", minids.__doc__, re.DOTALL)[0].replace("stdlib", str(ROOT / "tests"))
    torch.manual_seed(0)
    names = {"data": data, "optim": optim, "B": 2, "T": 16, "model": minids.Transformer(minids.ModelConfig())}
    exec(textwrap.dedent(block).replace("range(100)", "range(2)"), names)
    assert 0 < names["nats_per_token"] < 10 and names["step"] == 1


def test_modules_load_when_they_are_first_used():
    late = "import minids, sys; assert 'minids.data' not in sys.modules; minids.data.load_corpus"
    subprocess.run([sys.executable, "-c", late], check=True)
    for module, known in ((minids, "accounting"), (minids.moe, "dispatch_kernels")):
        with pytest.raises(AttributeError, match=f"no 'nothing'; it has .*{known}"):
            _ = module.nothing
        assert known in dir(module) and not any(name.startswith("_") for name in dir(module))


def test_a_notebook_gets_the_same_from_lab_in_any_order():
    alone = [f"from minids.lab import {name}; assert {name} is lab.{name}, {name}" for name in reversed(lab.__all__)]
    modules = "; ".join(f"import minids.lab.{home or name}" for name, home in lab.HOMES.items())
    same = "; ".join(f"assert callable(lab.{name}), {name!r}" for name, home in lab.HOMES.items() if home)
    script = "\n".join([modules, "from minids import lab", *alone, same])
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_wheel_has_every_file_of_the_package():
    patterns = re.search(r"package-data\]\nminids = (.*)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    packed = {path for pattern in ast.literal_eval(patterns) for path in (ROOT / "minids").glob(pattern)}
    packed |= {path for path in FILES if (path.parent / "__init__.py").exists()}
    ours = {path for path in (ROOT / "minids").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    left = sorted(str(path) for path in ours - packed if not path.name.endswith((".partial.json", ".tmp")))
    assert not left, f"a wheel lacks {left}: name them in package-data of pyproject.toml"


# Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "limit"), [("core", CODE_LINES), ("kernels", KERNEL_FILES_LINES)])
def test_the_core_is_small(what, limit):
    counts = {name: code_lines(SOURCES[name]) for name in CORE if name.endswith("kernels.py") == (what == "kernels")}
    largest = ", ".join(f"{name} {counts[name]}" for name in sorted(counts, key=counts.get)[:-6:-1])
    total = sum(counts.values())
    assert total < limit, f"the {what} has {total} lines of code; take out {total - limit + 1}. Most: {largest}"


def test_code_lines_leave_out_blank_lines_comments_and_docstrings():
    text = '"""Doc\nof two lines."""\n\n# why\nx = """a\nb"""  # three\n\n\ndef f():\n    "doc"\n    return (\n1)\n'
    assert code_lines(text) == 5


@each_file
def test_files_are_short(name):
    if name.startswith("lab/exercises/"):
        return  # a lesson's exercises with all their wrong answers belong together
    lines = SOURCES[name].count("\n")
    assert lines < FILE_LINES, f"minids/{name} has {lines} lines; split it, or say it shorter, below {FILE_LINES}"


@each_file
def test_functions_are_short(name):
    for function in functions(TREES[name]):
        kernel = any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        limit, what = (KERNEL_LINES, "kernel") if kernel else (FUNCTION_LINES, "function")
        lines = function.end_lineno - function.lineno + 1 - len(docstring_lines(function))
        assert lines < limit, (
            f"minids/{name}:{function.lineno}: the {what} {function.name} has {lines} lines without its docstring; "
            f"give a part of it a name of its own, below {limit}"
        )


# Words -----------------------------------------------------------------------------------------------------------


@each_core_file
def test_public_functions_and_classes_have_a_docstring(name):
    def public(body):
        defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        return [node for node in defined if not node.name.startswith("_")]

    nodes = public(TREES[name].body)
    nodes += [method for node in nodes if isinstance(node, ast.ClassDef) for method in public(node.body)]
    for node in nodes:
        if node.name not in ("forward", "backward"):  # the class says what they take and give
            where = f"minids/{name}:{node.lineno}: {node.name} has no docstring"
            assert ast.get_docstring(node), f"{where}; say in one sentence what it gives, or start its name with _"


def test_the_map_of_the_readme_is_true():
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no map (a ```text block, one file or folder a line)"
    entries = [line.split()[0] for line in block[1].splitlines()]
    for entry in entries:
        path = ROOT / entry
        assert path.exists(), f"the README's map has {entry}, which is not there; take it out"
        assert entry.endswith("/") == path.is_dir(), f"the README's map has {entry}; a folder ends with /, a file not"
        assert entries.count(entry) == 1, f"the README's map has {entry} twice"
    for name in SOURCES:
        folder, _, rest = name.partition("/")
        entry = f"minids/{folder}/" if rest else f"minids/{name}"
        assert entry in entries or name == "__init__.py", f"the README's map lacks {entry}; add a line for it"
