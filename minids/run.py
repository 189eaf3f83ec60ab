"""A training run on disk and in memory: run.json, data, model, optimizers and checkpoints.

A run is a function of run.json alone: the batches depend on (seed, step), the number of steps is settled once. So one
that was killed and resumed ends, on a CPU, on the same bits.
"""

import json
import tempfile
import time

import torch
from tokenizers import Tokenizer

from minids import checkpoint, data, fp8, optim
from minids.config import ModelConfig
from minids.files import replace_file, write_json
from minids.model import Transformer
from minids.numerics import device_fault, has_fast_bf16, seed_everything

WARMUP_STEPS, WEIGHT_DECAY, BIAS_RATE, CLIP = 20, 0.1, 0.001, 1.0
BALANCE_ALPHA = 0.01  # of an auxiliary loss that balances without the bias, on `tiny`
BALANCE = {  # --balance: the rate of the bias update, and what the preset's balance loss is changed to
    "bias": (BIAS_RATE, {}),
    "loss": (0.0, {"aux_loss_alpha": BALANCE_ALPHA}),
    "both": (BIAS_RATE, {"aux_loss_alpha": BALANCE_ALPHA}),
    "none": (0.0, {"aux_loss_alpha": 0.0}),
}
PRECISIONS = ("bf16", "fp32", "fp8")


class TrainError(ValueError):
    """A run that cannot begin or go on; the message says what was given, and what to do."""


class Run:
    """One run: its folder, its record (run.json), its data, and its model with optimizers after `step` steps."""

    def __init__(self, folder, record, corpus, tokenizer):
        self.folder, self.record, self.corpus, self.tokenizer = folder, record, corpus, tokenizer
        self.args = {"balance": "bias", "mtp": 0, **record["arguments"]}  # runs of older versions had no choice
        self.tokens = data.encode_files(tokenizer, corpus.train)
        self.bytes_per_token = sum(map(len, corpus.train)) / len(self.tokens)
        self.saved, self.save_seconds = time.monotonic(), 0.0
        self.build()
        self.batch(0)  # too few tokens are refused before anything is written

    def build(self):
        """Make the model and its optimizers as they are before the first step: a function of preset and seed."""
        self.step = 0
        seed_everything(self.args["seed"])
        self.bias_rate, changes = BALANCE[self.args["balance"]]
        changes = {**changes, "num_nextn_predict_layers": self.args["mtp"]}
        self.model = Transformer(ModelConfig.preset(self.args["preset"], **changes)).to(self.args["device"])
        if self.args.get("precision") == "fp8":
            fp8.convert(self.model)
        self.optimizers = optim.build_optimizers(self.model, self.args["lr"], self.args["lr"], WEIGHT_DECAY)

    def precision(self):
        """The context in which the model runs: autocast to bf16 where run.json says so."""
        return torch.autocast(self.model.embed_tokens.weight.device.type, torch.bfloat16, self.record["bf16"])

    def batch(self, step):
        """(inputs, targets) [B,T] of `step`, on the run's device."""
        sizes = self.args["batch_size"], self.args["seq_len"]
        tensors = data.batch(self.tokens, step, self.args["seed"], *sizes)
        if self.args["device"].startswith("cuda"):  # else the copy would wait for the GPU's step before it
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tuple(tensor.to(self.args["device"], non_blocking=True) for tensor in tensors)

    def train_step(self, steps):
        """Take one step of `steps`; gives the cross-entropy in nats, MaxVio (0-dim both) and the loads [layers,E]."""
        rate = self.args["lr"] * optim.schedule(self.step, steps, min(WARMUP_STEPS, steps // 2))
        with self.precision():
            loss, cross_entropy = self.model.loss(*self.batch(self.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return cross_entropy, *self.model.update_expert_bias(self.bias_rate)

    def write_record(self):
        """Put the record into run.json."""
        write_json(self.folder / "run.json", self.record)

    def checkpoint_due(self):
        """Whether `checkpoint_every` seconds have passed, and 20 times what the last one took to write."""
        return time.monotonic() - self.saved >= max(self.args["checkpoint_every"], 20 * self.save_seconds)

    def save_checkpoint(self):
        """Write the model and the optimizers as the checkpoint of this step."""
        began = time.monotonic()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= checkpoint.pack_optimizers(self.optimizers)
        checkpoint.save(self.folder, self.step, tensors, {"corpus": self.corpus.hash})
        self.saved = time.monotonic()
        self.save_seconds = self.saved - began

    def load_checkpoint(self):
        """Go to the last whole checkpoint; without one the run stays at its beginning."""
        found = checkpoint.load_latest(self.folder)
        if found:
            self.step, tensors, _ = found
            weights = {k.removeprefix("model."): tensors.pop(k) for k in list(tensors) if k.startswith("model.")}
            self.model.load_state_dict(weights)
            checkpoint.unpack_optimizers(self.optimizers, tensors)


def begin(args, folder):
    """A new run in `folder`, its tokenizer and run.json written; raises TrainError and DataError."""
    if (folder / "run.json").exists():
        raise TrainError(f"{folder} already holds a run; continue it with --resume {folder}, or give another --out")
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise TrainError(f"{folder} is not empty; give a new folder as --out")
    corpus = data.load_corpus(args["data"])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # before minutes are spent: can we write here?
        file.write(b"room?")
    tokenizer = data.load_tokenizer(corpus, ModelConfig.preset(args["preset"]).vocab_size)
    record = {"arguments": args, "steps": args.get("steps"), "corpus": {"name": corpus.name, "hash": corpus.hash}}
    bf16 = {"bf16": True, "fp32": False}.get(args.get("precision"), has_fast_bf16(args["device"]))
    record |= {"bf16": bf16, "threads": torch.get_num_threads(), "torch": torch.__version__}
    run = Run(folder, record, corpus, tokenizer)
    (folder / "model").mkdir(exist_ok=True)
    replace_file(folder / "model" / "tokenizer.json", lambda temporary: tokenizer.save(str(temporary)))
    run.write_record()
    return run


def resume(folder, **changes):
    """The run in `folder` at its last whole checkpoint, with `changes` to its arguments; raises TrainError."""
    try:
        record = json.loads((folder / "run.json").read_text())
        record["arguments"] |= changes
        corpus_hash, device = record["corpus"]["hash"], record["arguments"]["device"]
    except FileNotFoundError:
        raise TrainError(f"{folder} holds no run (there is no run.json); begin one with --out {folder}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{folder / 'run.json'} is damaged ({error}); begin a new run with another --out") from None
    if fault := device_fault(device):
        raise TrainError(f"the run's device is {device}, which torch cannot use here ({fault}); resume it where it can")
    corpus = data.load_corpus(record["arguments"]["data"])
    if corpus.hash != corpus_hash:
        hashes = f"hash {corpus_hash[:12]} then, {corpus.hash[:12]} now"
        what = f"the corpus {corpus.name} has changed since this run began ({hashes})"
        raise TrainError(f"{what}; bring its files back, or begin a new run with another --out")
    torch.set_num_threads(record["threads"])  # sums over threads depend on their number
    run = Run(folder, record, corpus, Tokenizer.from_file(str(folder / "model" / "tokenizer.json")))
    run.load_checkpoint()
    return run
