"""The rungs of suite ladder: five models with about the same active parameters, and how each is trained."""

import copy
import itertools
from functools import partial
from typing import NamedTuple

import torch

from minids import accounting, corpus, data, fp8, optim
from minids.bench import harness
from minids.config import ModelConfig
from minids.model import Transformer
from minids.numerics import has_fast_bf16, seed_everything
from minids.run import BIAS_RATE, CLIP, WARMUP_STEPS, WEIGHT_DECAY

DECAY = 0.3  # of the steps, over which the rate falls to zero
WIDTH = 16  # a dense SwiGLU is as wide as a multiple of this


class Rung(NamedTuple):
    """One model of the ladder: its configuration, and whether its Linears multiply in FP8."""

    cfg: ModelConfig
    fp8: bool = False


def rungs(preset, max_position_embeddings=None):
    """{name: Rung} of a preset with MLA and experts, the dense rungs with about its active parameters."""
    full = ModelConfig.preset(preset)
    positions = {"max_position_embeddings": max_position_embeddings or full.max_position_embeddings}
    full = ModelConfig.preset(preset, **positions)
    groups = next(g for g in divisors(full.num_attention_heads) if cache(full, preset, g) >= cache(full, preset))
    dense = {
        "MHA": {"attention": "mha"},
        "GQA": {"attention": "gqa", "num_key_value_heads": groups},
        "MLA": {"attention": "mla"},
    }
    models = {name: Rung(resized(preset, full, **positions, **changes)) for name, changes in dense.items()}
    return models | {"MLA+MoE": Rung(full), "MLA+MoE+FP8": Rung(full, fp8=True)}


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def cache(full, preset, groups=None):
    """Numbers that a token leaves in the cache of `full`, or of its GQA with so many groups."""
    gqa = {"attention": "gqa", "num_key_value_heads": groups}
    return accounting.kv_elements_per_token(ModelConfig.preset(preset, **gqa) if groups else full)


def resized(preset, full, **changes):
    """The dense model with `changes` whose active parameters are nearest to those of `full`."""
    build = partial(ModelConfig.preset, preset, n_routed_experts=0, **changes)
    narrow, wider = (accounting.parameters(build(intermediate_size=WIDTH * n)).active for n in (1, 2))
    missing = accounting.parameters(full).active - narrow
    return build(intermediate_size=WIDTH * max(1, 1 + round(missing / (wider - narrow))))


class Text:
    """The text that all rungs learn from, its held-out part, and the batches."""

    def __init__(self, sizes, device):
        self.sizes, self.device = sizes, device
        self.corpus = data.load_corpus(sizes.data)
        self.tokenizer = data.load_tokenizer(self.corpus, ModelConfig.preset(sizes.preset).vocab_size)
        self.tokens = data.encode_files(self.tokenizer, self.corpus.train)
        reach = list(itertools.accumulate(map(len, self.corpus.heldout)))
        count = next((n for n, size in enumerate(reach, 1) if size >= sizes.heldout_bytes), len(reach))
        self.heldout = corpus.Corpus(self.corpus.name, self.corpus.train, self.corpus.heldout[:count])

    def settings(self):
        found = {"corpus": self.corpus.name, "corpus_hash": self.corpus.hash, "decay": DECAY}
        return {
            **found,
            "heldout_files": len(self.heldout.heldout),
            "heldout_bytes": sum(map(len, self.heldout.heldout)),
        }

    def batch(self, step, seed):
        batch = data.batch(self.tokens, step, seed, self.sizes.batch_size, self.sizes.seq_len)
        return [tensor.to(self.device) for tensor in batch]

    def precision(self):
        kind = torch.device(self.device)
        return torch.autocast(kind.type, torch.bfloat16, has_fast_bf16(kind))

    def bits_per_byte(self, model):
        """Of the held-out part, by the model as it was trained."""
        with self.precision():
            sizes = self.sizes.seq_len, self.sizes.batch_size
            return data.heldout_bits_per_byte(model, self.tokenizer, self.heldout, *sizes)

    @torch.no_grad()
    def evaluation_seconds(self, model):
        """About what bits_per_byte takes: the windows that it reads, by the time of one batch of them."""
        tokens = len(data.encode_files(self.tokenizer, self.heldout.heldout))
        batches = -(-len(data.window_starts(tokens, self.sizes.seq_len)[0]) // self.sizes.batch_size)
        inputs, _ = self.batch(0, 0)
        with self.precision():
            return batches * min(harness.wall_clock(lambda: float(model(inputs).sum())) for _ in range(2))


class Learner:
    """One rung in training: model, optimizers, and the number of steps done."""

    def __init__(self, rung, text, seed):
        seed_everything(seed)
        self.model = Transformer(rung.cfg).to(text.device)
        if rung.fp8:
            fp8.convert(self.model)
        self.optimizers = optim.build_optimizers(self.model, text.sizes.lr, text.sizes.lr, WEIGHT_DECAY)
        self.text, self.seed, self.done = text, seed, 0

    def step(self, factor=1.0):
        """One step, at `factor` times the rate after the warm-up."""
        rate = self.text.sizes.lr * factor * min(1.0, (self.done + 1) / WARMUP_STEPS)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with self.text.precision():
            loss, _ = self.model.loss(*self.text.batch(self.done, self.seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.model.update_expert_bias(BIAS_RATE)
        self.done += 1

    def train_to(self, steps, decay=0):
        """Train until `steps` are done, the last `decay` of them with a rate that falls to zero."""
        while self.done < steps:
            self.step(min(1.0, (steps - self.done) / (decay + 1)))

    def branch(self):
        """A copy of the model and its optimizers that goes its own way."""
        other = copy.copy(self)
        other.model, other.optimizers = copy.deepcopy((self.model, self.optimizers))
        return other
