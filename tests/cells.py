"""Code as a notebook runs it: cells that share a namespace, whose source is known to inspect by a name of its own."""

import ast
import itertools
import linecache

NUMBERS = itertools.count(1)
IMPORTS = "import math\nimport torch\nimport torch.nn.functional as F\n"
RMS_NORM = """
def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
"""


class Notebook:
    """A namespace like that of a kernel, `scope`; cell(text) runs a text in it."""

    def __init__(self):
        self.scope = {"__name__": "__main__"}
        self.cell(IMPORTS)

    def cell(self, text, want=None):
        """Run `text`; gives the value of its name `want`, or the function that it defines last."""
        name, text = f"/tmp/ipykernel_0/{next(NUMBERS)}.py", text.lstrip("\n")
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), self.scope)
        defined = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        return self.scope.get(want or (defined or [None])[-1])
