"""What Triton's interpreter lets pass in a kernel, and its compiler refuses, told before the kernel is tried.

The interpreter runs a kernel as Python, so there a sum may begin as a number and become a block, a helper may be any
function, and a global any number. On a GPU none of that compiles. Nothing is compiled here: the text is read.
"""

import ast
import inspect
import textwrap
import types

from minids.lab import tiles

REFUSED = ast.Break | ast.Continue | ast.Try | ast.Import | ast.ImportFrom | ast.Global | ast.Lambda | ast.Yield
WORDS = {"ImportFrom": "import"}


def problem(kernel):
    """A sentence where a compiler would refuse a kernel; "" where nothing is found, or there is no text to read."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    for found, why in (construct(definition), from_outside(definition, kernel.fn), grows(definition)):
        if found is not None:
            line = found.lineno - definition.lineno + 1
            return f"line {line} of {definition.name}: {why} (Triton's interpreter lets it pass, its compiler does not)"
    return ""


def construct(definition):
    """(node, sentence) of a part of Python that kernels have not; (None, "") where there is none."""
    for node in ast.walk(definition):
        if isinstance(node, REFUSED):
            kind = type(node).__name__
            return node, f"a kernel has no `{WORDS.get(kind, kind.lower())}`"
        if isinstance(node, ast.For | ast.While) and any(isinstance(one, ast.Return) for one in ast.walk(node)):
            return node, "a kernel has no `return` inside of a loop"
    return None, ""


def from_outside(definition, fn):
    """(node, sentence) of a number or a function that the kernel finds among the notebook's names."""
    own = set(fn.__code__.co_varnames)
    for node in (one for line in definition.body for one in ast.walk(line)):
        if not isinstance(node, ast.Name) or node.id in own or node.id not in fn.__globals__:
            continue
        value = fn.__globals__[node.id]
        if isinstance(value, bool | int | float):
            return node, (
                f"{node.id} is a number from outside of the kernel, which sees its own arguments alone: is one of them "
                "meant? A constant is written into the kernel"
            )
        ours = getattr(value, "__module__", "") or ""
        if isinstance(value, types.FunctionType) and not ours.startswith("triton") and not tiles.is_kernel(value):
            return node, f"{node.id} is a plain function: a helper of a kernel needs @triton.jit, too"
    return None, ""


def grows(definition):
    """(node, sentence) of a name that is a number before a loop and in it the block that tl.dot gives."""
    numbers = {}
    for line in definition.body:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            numbers[line.targets[0].id] = is_number(line.value)
        unrolled = isinstance(line, ast.For) and "static_range" in ast.unparse(line.iter)
        if not isinstance(line, ast.For | ast.While) or unrolled:
            continue
        for node in (one for one in ast.walk(line) if isinstance(one, ast.Assign | ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = target.id if isinstance(target, ast.Name) else ""
            if numbers.get(name) and is_product(node.value):
                return node, (
                    f"{name} is a number before the loop and a block in it; what a loop carries "
                    "must keep its shape: begin with a block, tl.zeros((rows, columns), tl.float32)"
                )
    return None, ""


def is_number(value):
    value = value.operand if isinstance(value, ast.UnaryOp) else value
    return isinstance(value, ast.Constant) and isinstance(value.value, int | float)


def is_product(value):
    """Whether an expression is a tl.dot, or one with something added, multiplied or converted."""
    if isinstance(value, ast.BinOp):
        return is_product(value.left) or is_product(value.right)
    if not isinstance(value, ast.Call):
        return False
    name = ast.unparse(value.func)
    return name == "tl.dot" or (name.endswith(".to") and is_product(value.func.value))
