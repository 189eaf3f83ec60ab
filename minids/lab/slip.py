"""A function written once more with a slip: a known wrong answer is then the change, and nothing else.

    DECODE.slip("not_divided", "The output is not divided by the sum.", ("acc / total[:, None]", "acc"))

The wrong function has source lines of its own, which Triton compiles and tracebacks show.
"""

import inspect
import linecache
import textwrap


def slip(fn, name, *changes):
    """`fn`, or a Triton kernel, as `name`, after each change (old, new) was made in all lines of its source with `old`.

    What follows a line break in `new` is indented as the changed line. Raises ValueError where no line has `old`.
    """
    fn = getattr(fn, "fn", fn)
    source = textwrap.dedent(inspect.getsource(fn)).replace(f"def {fn.__name__}(", f"def {name}(", 1)
    for old, new in changes:
        lines = source.splitlines(keepends=True)
        if not any(old in line for line in lines):
            raise ValueError(f"{name}: no line of {fn.__name__} has {old!r}; give a part of a line as it stands there")
        source = "".join(line.replace(old, new.replace("\n", "\n" + indent_of(line))) for line in lines)
    path, made = f"<{name}, a slip in {fn.__name__}>", {}
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    exec(compile(source, path, "exec"), fn.__globals__, made)
    return made[name]


def indent_of(line):
    return line[: len(line) - len(line.lstrip())]
