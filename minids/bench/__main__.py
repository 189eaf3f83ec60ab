"""The command of the benchmarks.

    python -m minids.bench [NAME ...] [--json FILE] [--record] [--quick] [--minutes N] [--tune]

Without a NAME it lists the suites and runs those that this machine can run; at the end stands one table of them all.
With --tune other configurations of the kernels of mla, moe, fp8 and layers are timed beside the shipped ones (tune.py).
With --minutes no case begins after that time, and suite ladder (10 minutes without) trains for as long as it leaves.
An unknown NAME, one that this machine cannot run, or a FILE that cannot be written, is told in one sentence with exit
status 2, before anything is measured. A case or a suite that fails is told, and the others go on; the exit status is 1.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from minids.bench import SUITES, harness, record_path, refusal, tables
from minids.files import write_json

TUNED = ("mla", "moe", "fp8", "layers")


def main(arguments=None):
    """Run the suites that `arguments` name; exits with 2 after one sentence where they cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m minids.bench", description="Measure minids beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"suites: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, one key per suite")
    parser.add_argument("--record", action="store_true", help="make the results minids' records (bench/records)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: no figures to quote")
    parser.add_argument("--minutes", type=float, metavar="N", help="the time to take: no case begins after it")
    parser.add_argument("--tune", action="store_true", help="try other configurations of the kernels")
    options = parser.parse_args(arguments)
    options.names = options.names or (list(TUNED) if options.tune else [])
    names = list(dict.fromkeys(options.names)) or [name for name in SUITES if not refusal(name, options.quick)]
    check(parser, options)
    if not options.names:
        print("suites:", *(f"  {describe(name)}" for name in SUITES), sep="\n")
        print(*(f"not run: {refusal(name, options.quick)}\n" for name in SUITES if name not in names), sep="", end="")
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    outcomes, failed = {}, []
    for name in names:
        try:
            run(name, options, outcomes, until)
        except Exception as error:  # one suite's; the others are measured all the same
            failed.append(name)
            if not isinstance(error, harness.BenchError):
                traceback.print_exc()
            if begun := outcomes.get(key(name, options)):
                print(tables.table(begun), flush=True)
            print(f"minids.bench: {name}: {error}", file=sys.stderr, flush=True)
    if len(outcomes) > 1:
        print("", tables.overview(outcomes), sep="\n")
    if failed:
        parser.exit(1, f"minids.bench: failed: {', '.join(failed)}\n")


def check(parser, options):
    unknown = [name for name in options.names if name not in SUITES]
    if unknown:
        stop(parser, f"there is no suite {unknown[0]!r}; the suites are {', '.join(SUITES)}")
    if options.record and options.quick:
        stop(parser, "--quick gives no figures to record; leave out --quick or --record")
    for folder in [options.json.parent] if options.json else []:
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            stop(parser, f"{options.json} cannot be written; give --json a file in a folder that exists")
    if options.tune and (others := [name for name in options.names if name not in TUNED]):
        stop(parser, f"suite {others[0]} has no kernels to tune; --tune takes {', '.join(TUNED)}")
    for reason in filter(None, (refusal(name, options.quick) for name in options.names)):
        stop(parser, reason)


def stop(parser, sentence):
    parser.exit(2, f"minids.bench: {sentence}\n")


def describe(name):
    return (importlib.import_module(SUITES[name]).__doc__ or name).splitlines()[0]


def key(name, options):
    """Where the result of a suite stands among the others."""
    return f"tune-{name}" if options.tune else name


def run(name, options, outcomes, until):
    """Run one suite: its result is written after each case, and printed as a table."""
    load = harness.load_average()
    print(f"\n{f'{name}: other configurations' if options.tune else describe(name)}", flush=True)
    flags = [flag for flag in ("tune", "record", "quick") if getattr(options, flag)]
    flags += [] if options.minutes is None else [f"minutes {options.minutes:g}"]
    command = " ".join(["python -m minids.bench", name, *(f"--{flag}" for flag in flags)])

    def save(outcome):
        outcome["provenance"] |= {"command": command, "load_before": load}
        outcomes[key(name, options)] = outcome
        if options.json:
            write_json(options.json, outcomes)
        if options.record and outcome["cases"]:
            path = record_path(outcome)
            path.parent.mkdir(exist_ok=True)
            write_json(path, outcome)
            if outcome["complete"]:
                path.with_suffix(".partial.json").unlink(missing_ok=True)

    suite = importlib.import_module("minids.bench.tune" if options.tune else SUITES[name])
    outcome = (partial(suite.run, name) if options.tune else suite.run)(quick=options.quick, save=save, until=until)
    save(outcome)
    print(tables.table(outcome), flush=True)
    if load is not None and load > 0.5 and not options.quick:
        print(f"the machine was busy before this run (load {load}): measure again when it is idle")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("minids.bench: stopped; the cases that were finished are written where --json or --record say")
