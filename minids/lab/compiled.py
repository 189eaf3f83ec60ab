"""What the compiler makes of a Triton kernel for a GPU that need not be here: registers, spills, shared memory, and
which instructions multiply.

    found = facts(add_kernel, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256}, arch=90)
    found.registers, found.spills, found.shared

A signature gives the type of each argument that is no tl.constexpr: "*bf16" is a pointer, then i32, i64, fp32 and so
on. At a launch Triton looks at the values too, and compiles anew for those divisible by 16: that is what makes loads
wide and asynchronous. Here pointers count as divisible, as torch allocates them; other arguments where `aligned` names
them.

A process that interprets kernels cannot compile them, so another one does: it imports the kernel from minids, or gets
the source of one from elsewhere, such as a notebook (see keep.py).
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from minids import triton_env

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}  # a program's at most
INSTRUCTIONS = {"wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma"}


class DoesNotCompile(ValueError):
    """The compiler refuses a kernel; the message is the compiler's."""


@dataclass(frozen=True)
class CompiledFacts:
    """One kernel, compiled: `registers` a thread, `spills` (bytes a thread stores for lack of them), `shared` bytes a
    program, and how many of its instructions multiply tiles: wgmma (Hopper), mma (Ampere, Ada; a fallback elsewhere),
    tcgen05 (Blackwell). `ptx` is the code itself.
    """

    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    tcgen05: int
    ptx: str = field(repr=False)

    @property
    def fits(self):
        """Whether the shared memory is there on such a GPU."""
        return self.shared <= SHARED_KIB[self.arch] * 1024

    def __str__(self):
        shared = f"{self.shared / 1024:.1f} of {SHARED_KIB[self.arch]} KiB shared"
        kinds = ", ".join(f"{n} {name}" for name in INSTRUCTIONS if (n := getattr(self, name))) or "no tensor cores"
        size = f"{self.num_warps} warps, {self.num_stages} stages: {self.registers} registers"
        return f"{self.kernel} for sm_{self.arch}, {size}, {self.spills} B spilled, {shared}, {kinds}"


def facts(kernel, signature, constexprs, arch=90, num_warps=4, num_stages=3, aligned=()):
    """CompiledFacts of one kernel. Raises DoesNotCompile, ValueError for a wrong signature, TritonUnavailable."""
    (found,) = facts_of_all([request(kernel, signature, constexprs, arch, num_warps, num_stages, aligned)])
    if isinstance(found, Exception):
        raise found
    return found


def request(kernel, signature, constexprs, arch=90, num_warps=4, num_stages=3, aligned=()):
    """What `facts` takes, as the dict that facts_of_all takes; raises ValueError, keep.CannotKeep."""
    from minids.lab import keep

    if arch not in SHARED_KIB:
        raise ValueError(f"arch is {arch!r}; give one of {', '.join(map(str, SHARED_KIB))} (90 for sm_90)")
    names = list(kernel.arg_names)
    for what, given in (
        ("unknown", {*signature, *constexprs} - {*names}),
        ("no", {*names} - {*signature, *constexprs}),
    ):
        if given:
            raise ValueError(f"{what} argument {', '.join(sorted(given))}; {kernel.__name__} takes {', '.join(names)}")
    types = {name: signature.get(name, "constexpr") for name in names}
    even = [i for i, name in enumerate(names) if types[name].startswith("*") or name in aligned]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    name, home = kernel.__name__, kernel.fn.__module__
    source = f"from {home} import {name}" if home.startswith("minids.") else keep.source_of(kernel)
    wanted = {"name": name, "source": source, "arch": arch, "options": options}
    return {**wanted, "types": types, "values": constexprs, "even": even}


def facts_of_all(requests):
    """A CompiledFacts, or the DoesNotCompile, for each of `requests`; one process compiles them all."""
    if not triton_env.installed():
        triton_env.require("the compiler")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": folder}
        command, environment = [sys.executable, "-m", "minids.lab.compiled", folder], {**os.environ, **settings}
        given = json.dumps(list(requests))
        done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the compiling process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [DoesNotCompile(one["error"]) if "error" in one else CompiledFacts(**one) for one in found]


# The process that compiles ---------------------------------------------------------------------------------------


def compile_one(wanted, path):
    """The fields of CompiledFacts of one request, whose source goes to the file `path`; or {"error": its message}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    path.write_text(wanted["source"], encoding="utf-8")
    namespace = {"__name__": path.stem}
    exec(compile(wanted["source"], str(path), "exec"), namespace)  # Triton reads the text of a kernel from its file
    even = {(i,): [["tt.divisibility", 16]] for i in wanted["even"]}
    source = ASTSource(namespace[wanted["name"]], wanted["types"], wanted["values"], even)
    target, log = GPUTarget("cuda", wanted["arch"], 32), io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            done = triton.compile(source, target=target, options=wanted["options"])
    except Exception as error:
        because = f"\n{error.__cause__}" if error.__cause__ else ""
        return {"error": f"{type(error).__name__}: {error}{because}"}
    return facts_from(wanted["name"], wanted["arch"], done.metadata._asdict(), log.getvalue(), done.asm["ptx"])


def facts_from(name, arch, metadata, log, ptx):
    """The fields of CompiledFacts, from what Triton (`metadata`) and ptxas (`log`) say of one compilation."""
    return {
        "kernel": name,
        "arch": arch,
        **{key: metadata[key] for key in ("num_warps", "num_stages", "shared")},
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        **{name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        "ptx": ptx,
    }


def main(folder):
    """Read requests as JSON from stdin, print their facts as JSON."""
    requests = json.load(sys.stdin)
    found = {}  # the same request again would come from Triton's cache, without the log that has the registers
    for i, wanted in enumerate(requests):
        if (key := json.dumps(wanted)) not in found:
            found[key] = compile_one(wanted, Path(folder) / f"kernel_{i}.py")
    print("\n" + json.dumps([found[json.dumps(wanted)] for wanted in requests]))


if __name__ == "__main__":
    main(sys.argv[1])
