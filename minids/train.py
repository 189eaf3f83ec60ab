"""Training: one command from a preset to a model that was trained on real text.

    python -m minids.train --preset tiny --minutes 5 --out DIR
    python -m minids.train --resume DIR

DIR holds run.json (the arguments, the corpus' hash, the number of steps), checkpoints/, model/ (the hub's layout and
tokenizer.json), log.jsonl and loss.png.
"""

import argparse
import contextlib
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

from minids import accounting, data, report
from minids.checkpoint import CheckpointError
from minids.config import ConfigError, ModelConfig
from minids.files import disk_is_full, write_json
from minids.generate import generate
from minids.numerics import device_fault
from minids.run import BALANCE, BALANCE_ALPHA, PRECISIONS, TrainError, begin, resume

DEFAULTS = {  # per preset: what the command line leaves out
    "tiny": {"batch_size": 16, "seq_len": 256, "lr": 0.01},
    "small": {"batch_size": 32, "seq_len": 1024, "lr": 0.003},
    "base": {"batch_size": 64, "seq_len": 2048, "lr": 0.001},
}
CALIBRATION_STEPS = 13  # the first 3 warm up
END_OF_TEXT = 0


def build_parser():
    """The arguments of the command; what is not given is None."""
    parser = argparse.ArgumentParser("python -m minids.train", description="Train a model; DIR keeps all of the run.")
    add = parser.add_argument
    add("--preset", help=f"{', '.join(DEFAULTS)} (default tiny)")
    add("--minutes", type=float, metavar="M", help="time to use; a short calibration settles the steps (default 5)")
    add("--steps", type=int, metavar="N", help="train N steps, however long they take")
    add("--out", metavar="DIR", help="a new folder for the run")
    add("--resume", metavar="DIR", help="continue the run in DIR, with its own arguments")
    add("--data", help="stdlib, installed, a file, a folder or hf:NAME (default stdlib)")
    add("--batch-size", type=int, metavar="B", help="sequences a step (default: the preset's)")
    add("--seq-len", type=int, metavar="T", help="tokens a sequence (default: the preset's)")
    add("--lr", type=float, help="peak learning rate (default: the preset's)")
    loss = f"loss (auxiliary, alpha {BALANCE_ALPHA:g}, which balances `tiny`)"
    add("--balance", metavar="HOW", help=f"the experts: bias (default; DeepSeek-V3's way), {loss}, both or none")
    add("--precision", metavar="P", help="of products: bf16, fp32 or fp8 (default: bf16 where it is fast, else fp32)")
    add("--mtp", type=int, metavar="N", help="modules of multi-token prediction (default: the preset's)")
    add("--seed", type=int, help="of weights and batches (default 0)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--checkpoint-every", type=float, metavar="SECONDS", help="0: whenever it costs little (default 30)")
    return parser


def complete_arguments(given):
    """The arguments of a new run, with the defaults of its preset; raises TrainError and ConfigError."""
    if given.keys() >= {"steps", "minutes"}:
        raise TrainError("both --steps and --minutes are given; a run has one measure of its length")
    preset = given.get("preset", "tiny")
    cfg = ModelConfig.preset(preset)
    if preset not in DEFAULTS:
        raise TrainError(f"preset {preset!r} is a published model, too large to train here; give {', '.join(DEFAULTS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = {"preset": preset, "data": "stdlib", "seed": 0, "device": device, "checkpoint_every": 30.0}
    args |= {"balance": "bias", "mtp": cfg.num_nextn_predict_layers}
    args |= {**DEFAULTS[preset], **({} if "steps" in given else {"minutes": 5.0}), **given}
    for name in ("minutes", "steps", "batch_size", "seq_len", "lr"):
        if name in args and not 0 < args[name] < float("inf"):
            raise TrainError(f"--{name.replace('_', '-')} is {args[name]}; it must be positive")
    if args["seq_len"] > cfg.max_position_embeddings:
        raise TrainError(f"--seq-len is {args['seq_len']}; preset {preset} has {cfg.max_position_embeddings} positions")
    if not 0 <= args["mtp"] < args["seq_len"]:
        raise TrainError(f"--mtp is {args['mtp']}; give 0 or more modules, fewer than --seq-len {args['seq_len']}")
    for name, known in (("balance", BALANCE), ("precision", PRECISIONS)):
        if args.get(name) not in (None, *known):
            raise TrainError(f"--{name} is {args[name]!r}; it must be one of {', '.join(known)}")
    if not -(2**63) <= args["seed"] < 2**64:
        raise TrainError(f"--seed is {args['seed']}; give a whole number of 64 bits")
    if fault := device_fault(args["device"]):
        raise TrainError(f"--device is {args['device']}, which torch cannot use here ({fault}); leave it out")
    if Path(args["data"]).exists():
        args["data"] = str(Path(args["data"]).resolve())
    return args


def settle_steps(run, seconds):
    """The number of steps that fit into `seconds` together with the evaluation, from a few steps that are undone."""
    times = []
    for _ in range(CALIBRATION_STEPS):
        times.append(timed(lambda: run.train_step(10**6)[0]))
        if len(times) > 1 and sum(times) > 0.1 * seconds:
            break
    with torch.no_grad(), run.precision():
        forward = statistics.median(timed(lambda: run.model.loss(*run.batch(0))[1]) for _ in range(3))
    run.build()
    bytes_per_batch = run.args["batch_size"] * run.args["seq_len"] * run.bytes_per_token
    evaluation = 2 * forward * sum(map(len, run.corpus.heldout)) / bytes_per_batch  # its windows overlap by half
    left = max(seconds - sum(times) - 1.1 * evaluation - 4, 0.3 * seconds)  # 4 s: gzip, xz, a sample
    usual = statistics.median(times[3:] or times[1:])  # not the mean: for a moment others may use the machine too
    return max(1, int(left / usual))


def timed(compute):
    """Seconds until `compute()` has its 0-dim result, a GPU waited for."""
    began = time.perf_counter()
    float(compute())
    return time.perf_counter() - began


def train(run, stop):
    """Train `run` to its last step, with checkpoints; raises KeyboardInterrupt, after one, when asked to stop."""
    steps, tokens_per_step = run.record["steps"], run.args["batch_size"] * run.args["seq_len"]
    log = run.folder / "log.jsonl"
    stop.patient = True
    with report.Progress(log, steps, run.step, tokens_per_step, run.bytes_per_token) as progress:
        run.model.train()
        while run.step < steps:
            measured = run.train_step(steps)
            progress.add(run.step, *measured)
            if stop.asked or run.step == steps or run.checkpoint_due():
                progress.flush()
                run.save_checkpoint()
            if stop.asked:
                raise KeyboardInterrupt
    stop.patient = False


def finish(run):
    """Write the trained model, measure it on the held-out files, and show a sample and the curve."""
    run.model.eval().save_pretrained(run.folder / "model")
    ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    write_json(run.folder / "model" / "generation_config.json", ends)
    with run.precision():
        sizes = run.args["seq_len"], run.args["batch_size"]
        bits = data.heldout_bits_per_byte(run.model, run.tokenizer, run.corpus, *sizes)
        guessed = data.heldout_acceptance(run.model, run.tokenizer, run.corpus, sizes[0])
        prompt = torch.tensor([run.tokenizer.encode("def ").ids])
        out = generate(run.model, prompt, 120, 0.8, 0.95, seed=run.args["seed"], stop_token=END_OF_TEXT)
    result = {"bits_per_byte": bits, "gzip": run.corpus.gzip_bpb, "xz": run.corpus.xz_bpb}
    if run.model.moe_layers():
        result["max_vio"] = report.last_max_vio(run.folder)
    if guessed:
        result["mtp_acceptance"] = guessed
    run.record["result"] = result
    run.write_record()
    print(report.result_line(result))
    for k, share in enumerate(guessed, 1):
        print(f"MTP guesses the token {k + 1} ahead as the main head then does: {share:.1%} of held-out positions")
    if "max_vio" in result:
        print(f"MaxVio at the end: {result['max_vio']:.2f} (--balance {run.args['balance']}; 0 is perfect balance)")
    print(f"a sample:\n{run.tokenizer.decode(out[0].tolist())}\n")
    report.plot(run.folder, result)
    print(f"more of it: python -m minids.generate {run.folder} --prompt 'def '")


class Stop:
    """Ctrl-C and SIGTERM: they interrupt at once, but while it is `patient` the first one only sets `asked`."""

    asked = patient = False

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.before = {kind: signal.signal(kind, self.handle) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def handle(self, *_):
        """What a signal calls; the second one interrupts in any case."""
        if self.asked or not self.patient:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def deterministic():
    """Ask torch for the same bits each time (where it can: a GPU's sums may differ)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def run_command(given, stop):
    """Begin or resume as `given` says, train and finish; raises what bad input raises."""
    began = time.monotonic()
    if "resume" in given:
        own = sorted(given.keys() - {"resume", "checkpoint_every"})
        if own:
            raise TrainError(f"a resumed run keeps its arguments; leave out --{own[0].replace('_', '-')}")
        run = resume(Path(given.pop("resume")), **given)
    else:
        if "out" not in given:
            raise TrainError("give --out DIR, a new folder for the run (or --resume DIR)")
        run = begin(folder=Path(given.pop("out")), args=complete_arguments(given))
    precision = run.args.get("precision") or ("bf16" if run.record["bf16"] else "fp32")
    (total, active), mtp = accounting.parameters(run.model.cfg), accounting.mtp_parameters(run.model.cfg).total
    and_mtp = f" and {mtp / 1e6:.1f}M of MTP" if mtp else ""
    print(
        f"{run.args['preset']}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active{and_mtp}; {run.corpus.name}: "
        f"{len(run.tokens) / 1e6:.1f}M tokens; {precision} on {run.args['device']}"
    )
    with deterministic() if run.args["device"] == "cpu" else contextlib.nullcontext():
        if run.record["steps"] is None:
            run.record["steps"] = settle_steps(run, run.args["minutes"] * 60 - (time.monotonic() - began))
            run.write_record()
        train(run, stop)
        finish(run)


def main(argv=None):
    """Train as the command line says; the exit code is 0, 2 for bad input and 130 for Ctrl-C."""
    given = {name: value for name, value in vars(build_parser().parse_args(argv)).items() if value is not None}
    folder = given.get("resume") or given.get("out")
    again = f"python -m minids.train --resume {folder}"
    try:
        with Stop() as stop:
            run_command(given, stop)
    except KeyboardInterrupt:
        print(f"stopped; continue with: {again}" if Path(folder, "run.json").exists() else "stopped", file=sys.stderr)
        return 130
    except (TrainError, ConfigError, data.DataError, CheckpointError, report.Diverged) as error:
        print(f"minids.train: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        what = f"cannot use {folder} ({error}); give another folder"
        if disk_is_full(error):
            what = f"the disk of {folder} is full; make room, then continue with: {again}"
        elif not isinstance(error, OSError):
            raise
        print(f"minids.train: {what}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
