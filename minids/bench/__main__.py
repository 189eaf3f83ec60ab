"""The command of the benchmarks.

    python -m minids.bench [NAME ...] [--json FILE] [--record] [--quick]

Without a NAME it lists the suites and runs them all. An unknown NAME, or a FILE that cannot be written, is told in one
sentence with exit status 2, before anything is measured.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from minids.bench import RECORDS, SUITES, harness
from minids.files import write_json


def main(arguments=None):
    """Run the suites that `arguments` name; exits with 2 after one sentence where they cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m minids.bench", description="Measure minids beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"suites: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, one key per suite")
    parser.add_argument("--record", action="store_true", help="make the results minids' records (bench/records)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: no figures to quote")
    options = parser.parse_args(arguments)
    check(parser, options)
    names = list(dict.fromkeys(options.names)) or list(SUITES)
    if not options.names:
        print("suites:", *(f"  {name}: {describe(name)}" for name in SUITES), sep="\n")
    outcomes = {}
    for name in names:
        outcomes[name] = run(name, options)
        if options.json:  # after each suite: a later one that fails loses nothing
            write_json(options.json, outcomes)
        if options.record:
            RECORDS.mkdir(exist_ok=True)
            write_json(RECORDS / f"{name}.json", outcomes[name])


def check(parser, options):
    unknown = [name for name in options.names if name not in SUITES]
    if unknown:
        stop(parser, f"there is no suite {unknown[0]!r}; the suites are {', '.join(SUITES)}")
    if options.record and options.quick:
        stop(parser, "--quick gives no figures to record; leave out --quick or --record")
    for folder in [options.json.parent] if options.json else []:
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            stop(parser, f"{options.json} cannot be written; give --json a file in a folder that exists")


def stop(parser, sentence):
    parser.exit(2, f"minids.bench: {sentence}\n")


def describe(name):
    return (importlib.import_module(SUITES[name]).__doc__ or name).splitlines()[0]


def run(name, options):
    """The result of one suite, printed as a table, with the command and the machine's load before it."""
    load = harness.load_average()
    print(f"\n{describe(name)}", flush=True)
    outcome = importlib.import_module(SUITES[name]).run(quick=options.quick)
    flags = [flag for flag in ("record", "quick") if getattr(options, flag)]
    command = " ".join(["python -m minids.bench", name, *(f"--{flag}" for flag in flags)])
    outcome["provenance"] |= {"command": command, "load_before": load}
    print(harness.table(outcome), flush=True)
    if load is not None and load > 0.5:
        print(f"the machine was busy before this run (load {load}): measure again when it is idle")
    return outcome


if __name__ == "__main__":
    try:
        main()
    except harness.BenchError as error:
        sys.exit(f"minids.bench: {error}")
    except KeyboardInterrupt:
        sys.exit("minids.bench: stopped; what was not finished is not written")
