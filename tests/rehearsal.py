"""A launch rehearsal: the kernels compiled just as they would be launched on a GPU that is not here, and not launched.

    python tests/rehearsal.py ARCH [CASE ...]        90 is Hopper; rehearsal_cases.py has the cases

The tests interpret kernels, or compile them from signatures written by hand. Neither takes the way of a launch: there
Triton looks at the values (1 becomes a constant, what 16 divides is known to be), binds what the wrapper passes, and
compiles for that. Here the modules, the wrappers and the suites of minids.bench run as they are, in full size, under
two stand-ins:

- for the GPU's memory, torch's fake tensors: shapes, strides, dtypes and addresses, without numbers. So a layer of
  DeepSeek-V3 takes no time and no memory, and whoever looks at a number, for which a GPU would be waited for, raises.
  They say that they are on a GPU, and lie on the processor for which torch was built: see `pretend`.
- for the GPU, a driver of Triton's whose launcher counts, and refuses what a real one would.

Printed is JSON, a line for each case: what was compiled for it that was not before, by what it was launched.
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # nothing comes from a cache: the log of ptxas is wanted
    FOLDER = tempfile.TemporaryDirectory()
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": FOLDER.name}
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from rehearsal_cases import CASES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minids import functions, loss_kernels, triton_env
from minids.fp8.kernels import OLDEST
from minids.lab import compiled
from minids.moe import layer as moe_layer

PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}  # of A100, RTX 3090, 4090, H100, B200, RTX 5090


# The stand-ins ---------------------------------------------------------------------------------------------------


class Driver:
    """Triton's driver for a GPU sm_`arch` that is not here: what is compiled is noted, what is launched is counted."""

    def __init__(self, arch):
        from triton import knobs
        from triton.backends.compiler import GPUTarget

        self.target, self.utils, self.launcher_cls = GPUTarget("cuda", arch, 32), self, self.launcher
        self.log, self.found, self.launches, self.source = io.StringIO(), [], collections.Counter(), None
        knobs.runtime.kernel_load_end_hook = self.loaded

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 1024 * compiled.SHARED_KIB[self.target.arch]}

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024

    def loaded(self, module, function, name, files, hash):
        """Note what was compiled, from the files of Triton's cache and what ptxas has said."""
        read = {path.rpartition(".")[2]: path for path in files.values()}
        with open(read["json"]) as metadata, open(read["ptx"]) as ptx:
            metadata, ptx = json.load(metadata), ptx.read()
        facts = compiled.facts_from(name, self.target.arch, metadata, self.log.getvalue(), ptx)
        self.log.seek(self.log.truncate(0))
        del facts["ptx"]
        self.found.append({**facts, "given": given(self.source)})

    def launcher(self, source, metadata):
        """A launch(...) that checks its grid and its arguments against the signature, and counts."""
        name, types, self.source = metadata.name, list(source.signature.values()), source

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
                raise ValueError(f"{name} is launched with the grid {x, y, z}")
            for kind, value in zip(types, arguments, strict=True):
                if not takes(kind, value):
                    raise TypeError(f"{name} is given {value!r} as {kind}")
            self.launches[name] += 1

        return launch


def given(source):
    """{argument: its value where it is a constant, else its type, with /16 where that divides it}."""
    names, found = list(source.signature), dict(source.signature)
    for (index, *_), value in source.constants.items():
        found[names[index]] = str(value)
    for (index, *_), attributes in source.attrs.items():
        found[names[index]] += "/16" if ["tt.divisibility", 16] in [list(one) for one in attributes] else ""
    return found


def takes(kind, value):
    """Whether a launcher takes `value` for an argument of this type."""
    if kind == "constexpr":
        return True
    if kind.startswith("*"):
        return isinstance(value, torch.Tensor)
    if kind.startswith("fp"):
        return isinstance(value, float)
    bits = int(kind[1:]) - (kind[0] == "i")
    return isinstance(value, int) and -(2**bits) <= value < 2**bits


def address(tensor):
    """Where a fake tensor's first number would lie: torch gives out pieces that begin at multiples of 512."""
    return 512 + tensor.storage_offset() * tensor.itemsize


@contextlib.contextmanager
def pretend(arch):
    """The stand-ins for sm_`arch`, and gives the Driver; what minids does for a processor alone is taken out."""
    from triton.runtime.driver import driver

    there = Driver(arch)
    driver.set_active(there)
    patches = [
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch.object(FakeTensor, "data_ptr", address, create=True),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True),
        mock.patch.object(triton_env, "mode", lambda: "gpu"),
        mock.patch.object(triton_env, "compiles", lambda: True),
        mock.patch.object(triton_env, "gpu", lambda where: (arch, PROCESSORS[arch])),
        mock.patch.object(torch.cuda, "get_device_capability", lambda where=None: divmod(arch, 10)),
        mock.patch.object(functions.BlockAttention, "ROOM", 0),
        mock.patch.object(moe_layer, "check", lambda *given: None),
        mock.patch.object(sys.modules["minids.model"], "check_vocabulary", lambda tokens, cfg: None),
        mock.patch.object(sys.modules["minids.generate"], "check_vocabulary", lambda tokens, cfg: None),
        mock.patch.object(sys.modules["minids.model"], "find_step", lambda *given, **kinds: None),
        # fake tensors of torch 2.11 take out_dtype of addmm for beta (pytorch#163880); a GPU does not
        mock.patch.object(loss_kernels, "ADDS_TO_FP32", torch.__version__ >= (2, 13)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        logging.getLogger("torch._subclasses.fake_tensor").disabled = True
        stack.enter_context(FakeTensorMode())
        stack.enter_context(contextlib.redirect_stdout(there.log))
        yield there


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arch", type=int, choices=PROCESSORS)
    parser.add_argument("cases", nargs="*", help="default: all that run there")
    options = parser.parse_args()
    out = sys.stdout

    def tell(**facts):
        print(json.dumps(facts), file=out, flush=True)

    with pretend(options.arch) as there:
        of_fp8 = {name for name in CASES if "fp8" in name or "quantisers" in name}
        for name in options.cases or [name for name in CASES if options.arch >= OLDEST or name not in of_fp8]:
            began, part = time.perf_counter(), None
            try:
                for part in CASES[name]():
                    facts = {"launches": dict(there.launches), "compiled": there.found}
                    tell(case=name, part=part, seconds=round(time.perf_counter() - began, 2), **facts)
                    there.launches.clear()
                    there.found.clear()
                    began = time.perf_counter()
            except Exception:
                tell(case=name, after=part, error=traceback.format_exc(limit=12))


if __name__ == "__main__":
    main()
