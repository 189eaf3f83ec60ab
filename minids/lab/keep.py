"""A function as source that can run again elsewhere: with the imports, helpers and constants that it uses."""

import builtins
import inspect
import linecache
import textwrap
import types

CONSTANTS = (int, float, str, bool, tuple, type(None))


class CannotKeep(ValueError):
    """A function that uses something which cannot be written down; the message names it."""


def source_of(fn):
    """Python source that defines `fn` and, before it, whatever of its module or notebook it uses; raises CannotKeep."""
    parts, done = [], set()
    collect(fn, parts, done)
    return "\n\n".join(dict.fromkeys(parts)) + "\n"


def collect(fn, parts, done):
    done.add(fn.__name__)
    for name in names_in(fn.__code__):
        if name in done or name in vars(builtins) or name not in fn.__globals__:
            continue
        done.add(name)
        parts += definition(name, fn.__globals__[name], fn, parts, done)
    try:
        parts.append(textwrap.dedent(inspect.getsource(fn)).rstrip())
    except (OSError, TypeError):
        raise CannotKeep(f"the source of {fn.__name__} cannot be found; define it in a cell or a file") from None


def definition(name, value, fn, parts, done):
    """The lines that define the global `name` of `fn`; a helper of the same notebook comes with its own needs."""
    if hasattr(value, "minids_exercise"):
        return [
            f"from minids.lab.exercises import reference as _reference\n{name} = _reference({value.minids_exercise!r})"
        ]
    if isinstance(value, types.ModuleType):
        return [f"import {value.__name__} as {name}"]
    home = getattr(value, "__module__", None)
    if isinstance(value, types.FunctionType) and home == fn.__module__:
        collect(value, parts, done)
        return [] if value.__name__ == name else [f"{name} = {value.__name__}"]
    if isinstance(value, type) and home == fn.__module__:
        raise CannotKeep(f"it uses the class {name} of the notebook; put what it needs into the function")
    if home and getattr(value, "__qualname__", "").isidentifier():
        return [f"from {home} import {value.__qualname__} as {name}"]
    if isinstance(value, CONSTANTS):
        return [f"{name} = {value!r}"]
    raise CannotKeep(f"it uses the global {name} ({type(value).__name__}); pass it as an argument")


def names_in(code):
    """Global names that a code object and those inside it may use."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += names_in(constant)
    return list(dict.fromkeys(names))


def function_of(source, name, path):
    """The function `name` that `source` defines; its lines show in tracebacks as those of `path`."""
    namespace = {"__name__": f"minids_passed_{name}"}
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    exec(compile(source, str(path), "exec"), namespace)
    return namespace[name]
