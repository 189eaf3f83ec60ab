"""A function as source that can run again elsewhere: with the imports, helpers and constants that it uses.

Which names those are comes from Python's own symbol table of the source: the globals of its body, and what its
decorators, default values and annotations need. Names of an enclosing function count as globals. What cannot be
written down (a tensor, an open file, a class of the notebook) raises CannotKeep, whose message names it.
"""

import ast
import builtins
import inspect
import linecache
import math
import symtable
import sys
import textwrap
import types

import torch

GIVEN = "from minids.lab.exercises import reference as _reference\n{name} = _reference({id!r})"


class CannotKeep(ValueError):
    """A function that uses something which cannot be written down; the message names it."""


def source_of(fn, name=None):
    """Python source that defines `fn`, as `name`, and before it whatever of its module it uses; raises CannotKeep."""
    fn = plain(fn)
    name = name or fn.__name__
    parts, done = [], {}
    own = collect(fn, parts, done)
    parts += [] if own == name else [f"{name} = {own}"]
    return "\n\n".join(dict.fromkeys(parts)) + "\n"


def plain(fn):
    """The function behind torch.compile, functools.wraps and a Triton kernel; raises CannotKeep where there is none."""
    found = inspect.unwrap(getattr(fn, "fn", fn))
    if not isinstance(found, types.FunctionType):
        kind = "a method" if inspect.ismethod(found) else f"of the type {type(found).__name__}"
        raise CannotKeep(f"it is {kind}; write it as a plain function, with def")
    return found


def collect(fn, parts, done):
    """Append to `parts` what `fn` needs, and its source; gives the name that this source defines."""
    text, own = definition_of(fn)
    if done.setdefault(own, fn) is not fn:
        raise CannotKeep(f"it uses two different things called {own}; give one another name")
    scope = {**vars(builtins), **fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
    for name in names_in(text):
        value = scope.get(name)
        if name not in scope or value is vars(builtins).get(name, scope):
            continue
        if name in done:
            if name != own and not same(value, done[name]):
                raise CannotKeep(f"it uses two different things called {name}; give one another name")
        elif is_local(value, fn):
            inner = plain(value)
            known = next((key for key, other in done.items() if other is inner), None)
            other = known or collect(inner, parts, done)
            if other != name:
                done[name] = value
                parts.append(f"{name} = {other}")
        else:
            done[name] = value
            parts.append(line_for(name, value, fn))
    parts.append(text)
    return own


def same(one, other):
    """Whether two globals are one thing, decorated or not."""
    return one is other or (callable(one) and callable(other) and inspect.unwrap(one) is inspect.unwrap(other))


def definition_of(fn):
    """(source, name) of the statement that defines `fn`: a def, or a lambda that is given a name."""
    try:
        text = textwrap.dedent(inspect.getsource(fn)).rstrip()
        (statement,) = ast.parse(text).body
    except (OSError, TypeError, SyntaxError, ValueError):
        statement = None
    if isinstance(statement, ast.FunctionDef):
        return text, statement.name
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Lambda):
        return text, ast.unparse(statement.targets[0])
    if fn.__name__ == "<lambda>":
        raise CannotKeep("it is a lambda without a name; write it with def")
    raise CannotKeep(f"the source of {fn.__name__} cannot be found; write it with def, in a cell or a file")


def names_in(text):
    """The names that `text` needs from outside, in order."""
    names, tables = [], [symtable.symtable(text, "<kept>", "exec")]
    while tables:
        table = tables.pop(0)
        names += [s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()]
        tables += table.get_children()
    return sorted(set(names))


def is_local(value, fn):
    """Whether `value` is a function that must come along as source: of the notebook, or of another kept function."""
    value = inspect.unwrap(value) if callable(value) and not hasattr(value, "minids_exercise") else value
    value = getattr(value, "fn", value)
    if not isinstance(value, types.FunctionType) or hasattr(value, "minids_exercise"):
        return False
    module = sys.modules.get(value.__module__)
    return value.__module__ in (fn.__module__, "__main__") or getattr(module, value.__name__, None) is None


def line_for(name, value, fn):
    """The line that gives `name` its `value`: an import or a constant."""
    if hasattr(value, "minids_exercise"):
        return GIVEN.format(name=name, id=value.minids_exercise)
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__}" + alias(value.__name__, name)
    if isinstance(value, torch.dtype | torch.device):
        return f"import torch\n{name} = torch.{repr(value).removeprefix('torch.')}"
    if (text := constant(value)) is not None:
        return f"{name} = {text}"
    if isinstance(value, type) and value.__module__ in (fn.__module__, "__main__"):
        raise CannotKeep(f"it uses the class {name} of the notebook; put what it needs into the function")
    if found := origin(value):
        return f"from {found[0]} import {found[1]}" + alias(found[1], name)
    raise CannotKeep(f"it uses the global {name} ({type(value).__name__}); pass it as an argument")


def alias(name, wanted):
    return "" if name == wanted else f" as {wanted}"


def constant(value):
    """The expression of a number, text or a collection of them; None where `value` is something else."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    try:
        text = repr(value)
        same = ast.literal_eval(text)
    except Exception:
        return None
    return text if type(same) is type(value) and same == value else None


def origin(value):
    """(module, name) under which `value` can be imported, as what it calls itself or as one of a module's names."""
    wanted = str(getattr(value, "__qualname__", "")).rpartition(".")[2]  # torch.relu: _VariableFunctionsClass.relu
    for place in ("torch", "torch.nn.functional", getattr(value, "__module__", None)):
        if place != "__main__" and getattr(sys.modules.get(place), wanted or "?", None) is value:
            return place, wanted
    return None


def function_of(source, name, path):
    """The function `name` that `source` defines, raises CannotKeep without one; tracebacks show its lines."""
    namespace = {"__name__": f"minids_passed_{name}"}
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    exec(compile(source, str(path), "exec"), namespace)
    if not callable(namespace.get(name)):
        raise CannotKeep(f"it defines no function {name}")
    return namespace[name]
