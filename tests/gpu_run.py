"""A run on a GPU: the tests that need one, then the benchmarks, recorded; what matters most comes first.

    make gpu                     or, where torch and Triton are and this package's environment is not:
    python3 tests/gpu_run.py [PART ...] [--minutes N] [--out DIR] [--quick]

PART is tests, a suite of minids.bench, or tune (its --tune); without one all of them run. Each is a process by itself,
ended after its time: a kernel that hangs, or that reads where no memory is, takes its process along and nothing else.
What a part prints is shown and kept in DIR (runs/gpu), as PART.log, with PART.json of a suite and a copy of the records
that are written into minids/bench/records. --minutes shares the time among the parts; a suite begins no case after its
own. --quick is tiny, and runs without a GPU: it shows that all parts begin and end, and records nothing.

Exit status: 0, 1 where a part failed, 2 without a GPU.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "minids" / "bench" / "records"
PARTS = {"tests": 4.0, "mla": 2.5, "moe": 2.5, "fp8": 2.5, "train": 4.0, "attention": 1.5, "layers": 1.5}  # minutes
PARTS |= {"ladder": 5.0, "tune": 3.5}  # the ladder first reads all Python packages that are installed
BEGINS = 0.75  # of its time in which a suite begins cases; the rest is for the last one
HANGS = 180  # seconds after which a test is ended, and the others go on


def main(arguments=None):
    parser = argparse.ArgumentParser("tests/gpu_run.py", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, metavar="N", help="for all parts together")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="DIR", help="default: runs/gpu")
    parser.add_argument("--quick", action="store_true", help="tiny, without figures; needs no GPU")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if refused := refusal(options.quick):
        parser.exit(2, f"make gpu: {refused}\n")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    print(here(), flush=True)
    parts, began, ends = list(dict.fromkeys(options.parts)) or list(PARTS), time.time(), {}
    until = time.monotonic() + 60 * (options.minutes or sum(PARTS[part] for part in parts))
    for index, part in enumerate(parts):
        share = PARTS[part] / sum(PARTS[later] for later in parts[index:])
        ends[part] = run(part, share * (until - time.monotonic()) / 60, options)
        keep_records(options.out, began)
    print("\n" + "\n".join(f"{part}: {how}" for part, how in ends.items()), f"kept in {options.out}", sep="\n")
    return int(any(how != "done" for how in ends.values()))


def refusal(quick):
    """Why nothing can run here, in one sentence, or None."""
    for name in ("torch", "triton", "numpy"):
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}; call it by the Python that has"
    import torch

    if not (quick or torch.cuda.is_available()):
        return "torch finds no CUDA GPU here"
    return None


def here():
    """What runs the parts, in a line; and what records will lack."""
    import torch
    import triton

    sys.path.insert(0, str(ROOT))
    from minids.bench import harness

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    python = f"{sys.executable} {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}"
    commit = harness.commit() or "unknown: set MINIDS_COMMIT to its first 12 digits, for the records"
    return f"{name}, {python}, commit {commit}"


def run(part, minutes, options):
    """Run a part for so many minutes at most; how it ended, in a few words."""
    if part == "tests" and (lacking := [n for n in ("pytest", "hypothesis") if importlib.util.find_spec(n) is None]):
        return f"not run: {', '.join(lacking)} not installed"
    ends, until = [], time.monotonic() + 60 * minutes
    with open(options.out / f"{part}.log", "wb") as log:
        for command in commands(part, minutes, options):
            print(f"\n{part}: {' '.join(command[1:])}", flush=True)
            ends.append(watched(command, log, until - time.monotonic()))
    return next((how for how in ends if how != "done"), "done")


def commands(part, minutes, options):
    """The commands of a part."""
    python = [sys.executable, "-m"]
    if part != "tests":
        flags = ["--quick"] if options.quick else ["--record", "--minutes", f"{BEGINS * minutes:.2f}"]
        what = "--tune" if part == "tune" else part
        return [[*python, "minids.bench", what, *flags, "--json", str(options.out / f"{part}.json")]]
    marks = re.compile(r"mark\.gpu|kernel_mode")
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if marks.search(path.read_text("utf-8"))]
    timed = [str(path.relative_to(ROOT)) for path in marked if "bench" in path.name]  # alone on the GPU
    others = [str(path.relative_to(ROOT)) for path in marked if "bench" not in path.name]
    pytest = [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    limits, beside = [], []
    if importlib.util.find_spec("pytest_timeout"):
        limits = ["--timeout", str(HANGS), "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist"):  # to compile takes most of the time; a worker that dies is replaced
        beside = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    return [[*pytest, *limits, *timed], [*pytest, *limits, *beside, *others]]


def watched(command, log, seconds):
    """Run a command for `seconds` at most, its output shown and logged; how it ended."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)

    def show():
        for line in process.stdout:
            log.write(line)
            log.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    how = "done"
    try:
        process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        how = f"ended after {seconds / 60:.1f} minutes"
    finally:
        end(process)
    reader.join(5)
    if how == "done" and process.returncode not in (0, 5):  # 5: of pytest, no test
        how = f"failed, exit status {process.returncode}"
    return how


def end(process):
    """End a process and all that it has started: asked first, for it may have something to write."""
    for sign, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def keep_records(folder, began):
    """Copy what was written into the records since `began` to the folder."""
    for path in RECORDS.glob("*.json"):
        if path.stat().st_mtime >= began:
            (folder / "records").mkdir(exist_ok=True)
            shutil.copy2(path, folder / "records" / path.name)


if __name__ == "__main__":
    sys.exit(main())
