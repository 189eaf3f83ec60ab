"""What is measured, beside whom, and the recorded results: `python -m minids.bench` (see harness.py for the rules).

A suite is a module with `run(quick=False, save=None, until=None) -> dict`, the result that `harness.result` makes; its
first docstring line is its description, and `table(outcome)`, where it has one, shows a result. A record is one result
of a suite on one device, with its provenance, in records/NAME-DEVICE.json; what a run that did not get to all cases has
measured, in records/NAME-DEVICE.partial.json. Where another machine's record of such a device has that name,
the machine's own sign is added to it: no machine takes the place of another.
"""

import json
from pathlib import Path

SUITES = {
    "mla": "minids.bench.mla",
    "moe": "minids.bench.moe",
    "fp8": "minids.bench.fp8",
    "train": "minids.bench.train",
    "attention": "minids.bench.attention",
    "layers": "minids.bench.layers",
    "cpu": "minids.bench.cpu",
    "ladder": "minids.bench.ladder",
}
GPU_SUITES = ("mla", "moe", "fp8", "train", "attention", "layers")
RECORDS = Path(__file__).with_name("records")


def record(name, device=None):
    """The recorded result of suite `name` on `device` ("NVIDIA H200"), or the newest; None where nothing is recorded.

    What a run has measured that did not get to all cases is given where none was finished; "complete" is False then.
    """
    from minids.bench.harness import slug

    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob(f"{name}-*.json"))]
    found = [one for one in found if device is None or slug(one["device"]) == slug(device)]
    return max(found, key=lambda one: (one["complete"], one["provenance"]["date"]), default=None)


def record_path(outcome):
    """The file of the record that `outcome` is, or of what an interrupted run leaves."""
    from minids.bench.harness import slug

    name, own = f"{outcome['suite']}-{slug(outcome['device'])}", outcome["provenance"]["machine"]
    kind = ".json" if outcome["complete"] else ".partial.json"
    for place in (f"{name}.json", f"{name}.partial.json"):
        path = RECORDS / place
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["provenance"].get("machine") != own:
            return RECORDS / f"{name}-{own}{kind}"
    return RECORDS / f"{name}{kind}"


def refusal(name, quick=False):
    """Why suite `name` cannot run on this machine, in one sentence; None where it can."""
    from minids import triton_env

    how = triton_env.mode() if name in GPU_SUITES else "gpu"
    if how == "interpreter" and quick:
        fault = triton_env.interpreter_fault()
        return fault and f"suite {name} needs Triton's interpreter here, but {fault}"
    if how == "gpu":
        return None
    if not triton_env.installed():
        return f"suite {name} needs Triton, which is not installed here (pip install triton), and a CUDA GPU"
    instead = "--quick runs tiny sizes through Triton's interpreter, without figures"
    return f"suite {name} needs a CUDA GPU on which Triton compiles, and there is none here; {instead}"
