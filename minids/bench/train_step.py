"""The steps of suite train: minids' and transformers', with one model's weights, and how each is run."""

import copy
from functools import partial

import torch
import torch.nn.functional as F

from minids import accounting, optim
from minids.bench import harness
from minids.config import ModelConfig
from minids.model import Transformer
from minids.numerics import relative_error
from minids.run import BIAS_RATE, CLIP, WEIGHT_DECAY

BF16 = torch.bfloat16
RATE = 1e-7  # so small that the loss of a round is that of the first
AGREE = 1e-4  # of the logits' scale, in fp32


class Step:
    """A side's training step: step(inputs, targets) gives nats; `loss(inputs, targets)` what to differentiate, nats."""

    def __init__(self, model, loss, after=lambda: None):
        self.model, self.loss, self.after = model, loss, after
        self.optimizers = optim.build_optimizers(model, RATE, RATE, WEIGHT_DECAY)

    def differentiate(self, inputs, targets):
        with torch.autocast(inputs.device.type, BF16):
            loss, nats = self.loss(inputs, targets)
        loss.backward()
        return nats

    def __call__(self, inputs, targets):
        nats = self.differentiate(inputs, targets)
        self.update()
        self.model.zero_grad()
        return nats

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.after()

    def state_bytes(self):
        """Bytes of weights, buffers and what the optimizers keep."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *kept))


class Graphed(Step):
    """A step whose forward and backward pass were recorded once, and are launched as one."""

    def record(self, inputs, targets):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled, caches filled
                self.differentiate(inputs, targets)
                self.model.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.nats = self.differentiate(inputs, targets)
        return self

    def __call__(self, inputs, targets):
        self.graph.replay()  # it writes the gradients over the last ones
        self.update()
        return self.nats


class Sides:
    """The sides of one preset: a model whose weights all begin with, the batch, and the steps built so far."""

    def __init__(self, device, preset, batch, length):
        self.device, self.cfg = device, ModelConfig.preset(preset)
        with torch.device(device.where):
            self.model = Transformer(self.cfg).train()
        tokens = torch.randint(self.cfg.vocab_size, (batch, length + 1), device=device.where)
        self.inputs = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.work = {"flops": int(accounting.train_flops_per_token(self.cfg, length)) * batch * length, "bytes": 0}
        self.known, self.other = {}, None
        with torch.no_grad(), torch.autocast(device.where.type, BF16):
            self.want = self.model.loss(*self.inputs)[1]

    def minids(self, change=lambda model: model, kind=Step):
        model = change(copy.deepcopy(self.model))
        return kind(model, model.loss, partial(model.update_expert_bias, BIAS_RATE))

    def transformers(self):
        """transformers' step with the same weights; raises BenchError where its logits differ."""
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        config = DeepseekV3Config.from_dict(self.cfg.to_hf())
        with torch.device(self.device.where):
            model = DeepseekV3ForCausalLM(config).train()
        weights = self.model.state_dict().items()
        model.load_state_dict({k if k.startswith("lm_head") else f"model.{k}": v for k, v in weights})
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("eager")
        few = self.inputs[0][:2, :64]
        with torch.no_grad():
            error = relative_error(model(few, use_cache=False).logits, self.model(few))
        if not error < AGREE:
            raise harness.BenchError(f"its logits differ from minids' by {error:.1e}, allowed is {AGREE:.0e}")
        model.set_experts_implementation("grouped_mm")
        self.other = Step(model, partial(logits_loss, model, cross_entropy))
        return self.other

    def recorded(self):
        """minids' step as a CUDA graph, which has run once."""
        step = self.minids(kind=Graphed).record(*self.inputs)
        step(*self.inputs)
        return step

    def compiled(self):
        """The same with its layers and its loss compiled, from here on."""
        if self.other is None:
            raise harness.BenchError("its step has not run before")
        torch._dynamo.reset()
        for layer in self.other.model.model.layers:
            layer.compile(dynamic=False)
        self.other.loss = partial(logits_loss, self.other.model, torch.compile(cross_entropy, dynamic=False))
        return self.other


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def logits_loss(model, function, inputs, targets):
    loss = function(model(inputs, use_cache=False).logits, targets)
    return loss, loss.detach()
