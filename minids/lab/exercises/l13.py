"""Lesson 13: the frame of a layer, the training step, a dense rival with equal active parameters, reading a curve."""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from minids import accounting
from minids.config import ModelConfig
from minids.lab.exercise import Exercise
from minids.layers import rms_norm
from minids.model import Transformer

# 13.1 -----------------------------------------------------------------------------------------------------------------


def block_forward(x, attention, feed_forward, norm_1, norm_2):
    """One layer, [B,T,D] to [B,T,D]: each part behind its norm, and added to its input (V3 figure 2)."""
    h = x + attention(norm_1(x))
    return h + feed_forward(norm_2(h))


BLOCK_FORWARD = Exercise(
    "13.1",
    block_forward,
    minutes=6,
    sizes=[{"B": 1, "T": 8, "D": 16}, {"B": 3, "T": 7, "D": 10}, {"B": 2, "T": 16, "D": 32}, {"B": 1, "T": 1, "D": 6}],
    gradients=True,
    hints=[
        "Follow one vector from below: it is never replaced, only added to. What does attention see of it, what is its "
        "result added to, and what do the second norm and the second addition see?",
        "h = x + attention(norm_1(x)) is the first half. The second has the same form: h takes the place of x, and the "
        "other norm and the other part theirs.",
    ],
)


@dataclass
class Toy:
    """A part of a layer as a function; two of one kind and width are the same, for they are drawn alike."""

    kind: str
    width: int
    weights: tuple = field(compare=False, repr=False)

    def __call__(self, y):
        first, *rest = (w.to(y.dtype) for w in self.weights)
        if self.kind == "attention":  # causal, as attention is: the mean of all positions so far
            return (y.cumsum(1) / torch.arange(1, y.shape[1] + 1, dtype=y.dtype)[:, None]) @ first
        return F.silu(y @ first) @ rest[0] if self.kind == "feed-forward" else rms_norm(y, first, 1e-6)


@BLOCK_FORWARD.inputs
def _(r, B, T, D):
    mix, up, down = (r.normal(D, D) / D**0.5 for _ in range(3))
    parts = {"attention": (mix,), "feed-forward": (up, down)}
    parts |= {f"norm {number}": (r.uniform(0.5, 2, D),) for number in (1, 2)}
    return 2 * r.normal(B, T, D), *(Toy(kind, D, weights) for kind, weights in parts.items())


@BLOCK_FORWARD.wrong(
    "The norms stand behind the additions (post-norm, as in 2017): the sum itself is normed then, and nothing runs through "
    "all layers untouched. Norm what goes INTO a part."
)
def post_norm(x, attention, feed_forward, norm_1, norm_2):
    h = norm_1(x + attention(x))
    return norm_2(h + feed_forward(h))


@BLOCK_FORWARD.wrong("The parts' RESULTS are normed, before they are added: norm what goes into a part instead.")
def results_normed(x, attention, feed_forward, norm_1, norm_2):
    h = x + norm_1(attention(x))
    return h + norm_2(feed_forward(h))


@BLOCK_FORWARD.wrong("Nothing is added to x: the attention's result takes its place. Write h = x + attention(…).")
def first_addition_missing(x, attention, feed_forward, norm_1, norm_2):
    h = attention(norm_1(x))
    return h + feed_forward(norm_2(h))


@BLOCK_FORWARD.wrong("The feed-forward's result takes the place of h: it must be added to h.")
def second_addition_missing(x, attention, feed_forward, norm_1, norm_2):
    return feed_forward(norm_2(x + attention(norm_1(x))))


@BLOCK_FORWARD.wrong("Both additions are missing: each part's result is added to what came in.")
def both_additions_missing(x, attention, feed_forward, norm_1, norm_2):
    return feed_forward(norm_2(attention(norm_1(x))))


@BLOCK_FORWARD.wrong("The feed-forward's result is added to x: that loses what attention found. Add it to h.")
def added_to_x(x, attention, feed_forward, norm_1, norm_2):
    return x + feed_forward(norm_2(x + attention(norm_1(x))))


@BLOCK_FORWARD.wrong(
    "The feed-forward sees x: both parts work side by side (as in GPT-J). Here it sees h, what attention has added to."
)
def side_by_side(x, attention, feed_forward, norm_1, norm_2):
    return x + attention(norm_1(x)) + feed_forward(norm_2(x))


@BLOCK_FORWARD.wrong("Attention is fed without its norm: give it norm_1(x), and add its result to x itself.")
def attention_without_norm(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(x)
    return h + feed_forward(norm_2(h))


@BLOCK_FORWARD.wrong("The feed-forward is fed without its norm: give it norm_2(h), and add its result to h itself.")
def feed_forward_without_norm(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_1(x))
    return h + feed_forward(h)


@BLOCK_FORWARD.wrong("Neither part has its norm: attention sees norm_1(x), the feed-forward norm_2(h).")
def no_norms(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(x)
    return h + feed_forward(h)


@BLOCK_FORWARD.wrong(
    "The normed x is what you add to: x = norm_1(x) overwrites the stream. The norm is for the part alone; add to x as it came."
)
def stream_is_normed(x, attention, feed_forward, norm_1, norm_2):
    x = norm_1(x)
    h = x + attention(x)
    h = norm_2(h)
    return h + feed_forward(h)


@BLOCK_FORWARD.wrong("The second addition adds to norm_2(h): add to h, as it was before its norm.")
def second_stream_is_normed(x, attention, feed_forward, norm_1, norm_2):
    h = norm_2(x + attention(norm_1(x)))
    return h + feed_forward(h)


@BLOCK_FORWARD.wrong("The first addition adds to norm_1(x): add to x, as it was before its norm.")
def first_stream_is_normed(x, attention, feed_forward, norm_1, norm_2):
    y = norm_1(x)
    h = y + attention(y)
    return h + feed_forward(norm_2(h))


@BLOCK_FORWARD.wrong("norm_1 is used twice: the feed-forward has a norm of its own, norm_2.")
def same_norm_twice(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_1(x))
    return h + feed_forward(norm_1(h))


@BLOCK_FORWARD.wrong("The norms are swapped: norm_1 is attention's, norm_2 the feed-forward's.")
def norms_swapped(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_2(x))
    return h + feed_forward(norm_1(h))


@BLOCK_FORWARD.wrong("The feed-forward comes first in yours: attention is the first half, the feed-forward the second.")
def feed_forward_first(x, attention, feed_forward, norm_1, norm_2):
    h = x + feed_forward(norm_2(x))
    return h + attention(norm_1(h))


@BLOCK_FORWARD.wrong("Only the attention's half is there: the feed-forward follows, h + feed_forward(norm_2(h)).")
def half_a_block(x, attention, feed_forward, norm_1, norm_2):
    return x + attention(norm_1(x))


@BLOCK_FORWARD.wrong("The feed-forward sees the attention's result alone: it must see h, the sum of x and that result.")
def sees_the_result_alone(x, attention, feed_forward, norm_1, norm_2):
    found = attention(norm_1(x))
    return x + found + feed_forward(norm_2(found))


@BLOCK_FORWARD.wrong("The feed-forward sees norm_1(x), as attention does: it sees norm_2(h).")
def one_norm_for_both(x, attention, feed_forward, norm_1, norm_2):
    normed = norm_1(x)
    return x + attention(normed) + feed_forward(normed)


@BLOCK_FORWARD.wrong("x is added twice: it is in h already, so the second addition is h + …, and no x.")
def x_added_twice(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_1(x))
    return x + h + feed_forward(norm_2(h))


@BLOCK_FORWARD.wrong(
    "The result is normed once more: a layer hands the plain sum on, the next one norms what it reads."
)
def result_normed(x, attention, feed_forward, norm_1, norm_2):
    return norm_2(block_forward(x, attention, feed_forward, norm_1, norm_2))


@BLOCK_FORWARD.wrong("The parts' results are normed too (as Gemma 2 does): here only what goes INTO a part is.")
def normed_on_both_sides(x, attention, feed_forward, norm_1, norm_2):
    h = x + norm_1(attention(norm_1(x)))
    return h + norm_2(feed_forward(norm_2(h)))


@BLOCK_FORWARD.wrong("norm_1 is handed on as a function: call it, attention(norm_1(x)), and so norm_2(h).")
def norms_not_called(x, attention, feed_forward, norm_1, norm_2):
    h = x + attention(norm_1)
    return h + feed_forward(norm_2)


@BLOCK_FORWARD.wrong("You multiply where you must add: a residual stream is x + attention(…), h + feed_forward(…).")
def multiplied(x, attention, feed_forward, norm_1, norm_2):
    h = x * attention(norm_1(x))
    return h * feed_forward(norm_2(h))


# 13.2 -----------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A model in training and its optimizers; two with one seed are the same at their start."""

    seed: int
    model: object = field(compare=False, repr=False)
    optimizers: list = field(compare=False, repr=False)


def train_steps(run, batches, bias_rate, clip):
    """One training step of run.model for each (inputs, targets) of `batches`; their cross-entropies [steps] in nats."""
    losses = []
    for inputs, targets in batches:
        loss, nats = run.model.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.model.update_expert_bias(bias_rate)
        losses.append(nats)
    return torch.stack(losses)


TRAIN_STEPS = Exercise(
    "13.2",
    train_steps,
    minutes=10,
    sizes=[
        {"steps": 3, "tokens": 11, "experts": 5, "seed": 3, "clip": 0.5},  # the shortest first: it tells most apart
        {"steps": 5, "tokens": 7, "experts": 6, "seed": 2, "clip": 4.0},  # some gradients are shorter
        {"steps": 8, "tokens": 8, "experts": 8, "seed": 8, "clip": 0.5},
    ],
    hints=[
        "Five things in a step, in this order: loss, gradients, their limit, the optimizers, the routers' biases. What must "
        "be emptied before the next gradients come, and which of the two numbers of model.loss is reported?",
        "loss, nats = run.model.loss(inputs, targets); loss.backward(); torch.nn.utils.clip_grad_norm_(run.model.parameters()"
        ", clip); for each optimizer .step() and .zero_grad(); run.model.update_expert_bias(bias_rate). Collect nats, and "
        "give torch.stack of them.",
    ],
)


@TRAIN_STEPS.inputs
def _(r, steps, tokens, experts, seed, clip):
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8, "v_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "aux_loss_alpha": 0.3, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(n_routed_experts=experts, initializer_range=0.3, **sizes)).train()
    hidden = [p for p in model.layers.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if not any(p is other for other in hidden)]
    optimizers = [torch.optim.SGD(hidden, lr=1.0), torch.optim.SGD(rest, lr=0.5)]
    batches = [tuple(r.integers(0, 24, 2, tokens) for _ in range(2)) for _ in range(steps)]
    return Run(seed, model, optimizers), batches, 0.3, clip


def limited(model, clip):
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)


def halves(model, clip):
    hidden = [p for p in model.layers.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if not any(p is other for other in hidden)]
    for part in (hidden, rest):
        torch.nn.utils.clip_grad_norm_(part, clip)


def each_alone(model, clip):
    for p in model.parameters():
        torch.nn.utils.clip_grad_norm_([p], clip)


def by_value(model, clip):
    torch.nn.utils.clip_grad_value_(model.parameters(), clip)


def steps_with(run, batches, bias_rate, clip, limit=limited, empty=slice(None), move=slice(None), give=1):
    """train_steps with a part replaced: the limit, whose gradients are emptied, who steps, which loss is given."""
    model, losses = run.model, []
    for inputs, targets in batches:
        pair = model.loss(inputs, targets)
        pair[0].backward()
        limit(model, clip)
        for optimizer in run.optimizers[move]:
            optimizer.step()
        for optimizer in run.optimizers[empty]:
            optimizer.zero_grad()
        model.update_expert_bias(bias_rate)
        losses.append(pair[give].detach())
    return torch.stack(losses)


NOBODY = slice(0, 0)


@TRAIN_STEPS.wrong(
    "The gradients are never emptied: backward ADDS to what is there, so each step goes along the sum of all gradients so "
    "far. Call zero_grad() after step()."
)
def never_emptied(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, empty=NOBODY)


@TRAIN_STEPS.wrong("Only the first optimizer's gradients are emptied: each one has parameters of its own.")
def first_emptied(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, empty=slice(1))


@TRAIN_STEPS.wrong("Only the last optimizer's gradients are emptied: is zero_grad() outside of the loop over them?")
def last_emptied(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, empty=slice(1, None))


@TRAIN_STEPS.wrong("Only the first optimizer steps: the other one's parameters never learn. Loop over run.optimizers.")
def first_steps(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, move=slice(1))


@TRAIN_STEPS.wrong("Only the last optimizer steps: is step() outside of the loop over run.optimizers?")
def last_steps(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, move=slice(1, None))


@TRAIN_STEPS.wrong(
    "The weights stay as they were: no optimizer steps, or its gradients are gone when it does. The order is backward(), step(), zero_grad()."
)
def nobody_steps(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, move=NOBODY)


@TRAIN_STEPS.wrong(
    "The gradients have no limit when the optimizers step: clip_grad_norm_(run.model.parameters(), clip) stands between backward() and step()."
)
def without_limit(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, limit=lambda model, clip: None)


@TRAIN_STEPS.wrong(
    "Each parameter's gradient is limited by itself: that turns the step. The limit is for the norm of ALL gradients together."
)
def limited_alone(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, limit=each_alone)


@TRAIN_STEPS.wrong(
    "Each optimizer's gradients are limited by themselves: the limit is for the norm of ALL of run.model.parameters() together, "
    "once, before the loop over the optimizers."
)
def limited_by_optimizer(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, limit=halves)


@TRAIN_STEPS.wrong("Each number of a gradient is cut at clip: it is the NORM of all that is limited, clip_grad_norm_.")
def limited_by_value(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, limit=by_value)


@TRAIN_STEPS.wrong(
    "The routers' biases do not move between the steps: no gradient reaches them (lesson 08). run.model.update_expert_bias(bias_rate) ends each step."
)
def biases_rest(run, batches, bias_rate, clip):
    return steps_with(run, batches, 0.0, clip)


@TRAIN_STEPS.wrong("bias_rate is negated: the busy experts get busier. Hand it on as it is.")
def biases_backwards(run, batches, bias_rate, clip):
    return steps_with(run, batches, -bias_rate, clip)


@TRAIN_STEPS.wrong(
    "You give the loss with the balance loss in it: that is for backward. What is reported and compared is the cross-entropy, "
    "the second result of model.loss."
)
def total_reported(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip, give=0)


@TRAIN_STEPS.wrong(
    "backward() finds no graph: the second result of model.loss is a report and has none, and under torch.no_grad() nothing has "
    "one. Differentiate the first result."
)
def backward_of_the_report(run, batches, bias_rate, clip):
    for inputs, targets in batches:
        run.model.loss(inputs, targets)[1].backward()


@TRAIN_STEPS.wrong("You give the mean of the losses: one number for each step is asked for, torch.stack of them.")
def mean_reported(run, batches, bias_rate, clip):
    return train_steps(run, batches, bias_rate, clip).mean()


@TRAIN_STEPS.wrong("You give a list: torch.stack(losses) makes one tensor [steps] of it.")
def list_reported(run, batches, bias_rate, clip):
    return list(train_steps(run, batches, bias_rate, clip))


@TRAIN_STEPS.wrong(
    "You give a list of Python numbers: keep the tensors, without .item(), and give torch.stack of them."
)
def numbers_reported(run, batches, bias_rate, clip):
    return train_steps(run, batches, bias_rate, clip).tolist()


@TRAIN_STEPS.wrong("Only the last step's loss comes back: collect them in a list, and stack it at the end.")
def last_reported(run, batches, bias_rate, clip):
    return train_steps(run, batches, bias_rate, clip)[-1]


@TRAIN_STEPS.wrong("One step is made and returned from: is the `return` inside the loop?")
def one_step(run, batches, bias_rate, clip):
    return train_steps(run, batches[:1], bias_rate, clip)


@TRAIN_STEPS.wrong("Every step sees the first batch: take each pair of `batches` in turn.")
def same_batch(run, batches, bias_rate, clip):
    return train_steps(run, batches[:1] * len(batches), bias_rate, clip)


@TRAIN_STEPS.wrong(
    "The model is in evaluation mode (eval()): its routers count no loads and there is no balance loss. Leave it in training."
)
def in_evaluation(run, batches, bias_rate, clip):
    run.model.eval()
    return train_steps(run, batches, bias_rate, clip)


@TRAIN_STEPS.wrong(
    "The loss is computed again after the step: report the one that the gradients came from, before the weights moved."
)
def after_the_step(run, batches, bias_rate, clip):
    losses = []
    for pair in batches:
        train_steps(run, [pair], bias_rate, clip)
        losses.append(copy.deepcopy(run.model).loss(*pair)[1])
    return torch.stack(losses)


@TRAIN_STEPS.wrong("Inputs and targets are swapped: model.loss(inputs, targets), in the order of the pair.")
def inputs_swapped(run, batches, bias_rate, clip):
    return train_steps(run, [pair[::-1] for pair in batches], bias_rate, clip)


@TRAIN_STEPS.wrong(
    "The gradients are brought to the length `clip` in every step: they are shortened only if they are LONGER."
)
def always_of_one_length(run, batches, bias_rate, clip):
    def limit(model, clip):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        length = torch.sqrt(sum(g.square().sum() for g in gradients))
        for g in gradients:
            g.mul_(clip / length)

    return steps_with(run, batches, bias_rate, clip, limit=limit)


@TRAIN_STEPS.wrong("The limit is 1.0 in yours, whatever `clip` is: use the argument.")
def limited_at_1(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, 1.0)


@TRAIN_STEPS.wrong("The biases move by 0.001 in yours, whatever `bias_rate` is: use the argument.")
def biases_by_a_thousandth(run, batches, bias_rate, clip):
    return steps_with(run, batches, 0.001, clip)


@TRAIN_STEPS.wrong("bias_rate and clip are exchanged.")
def rate_and_clip_exchanged(run, batches, bias_rate, clip):
    return steps_with(run, batches, clip, bias_rate)


@TRAIN_STEPS.wrong(
    "Only the layers' gradients are limited: run.model.parameters() has embedding, last norm and head too."
)
def layers_limited(run, batches, bias_rate, clip):
    def limit(model, clip):
        torch.nn.utils.clip_grad_norm_(model.layers.parameters(), clip)

    return steps_with(run, batches, bias_rate, clip, limit=limit)


@TRAIN_STEPS.wrong("The losses are in bits: they are asked for in nats, as model.loss gives them.")
def in_bits(run, batches, bias_rate, clip):
    return steps_with(run, batches, bias_rate, clip) / math.log(2)


@TRAIN_STEPS.wrong("model.loss gives two results: loss, nats = run.model.loss(inputs, targets).")
def loss_not_taken_apart(run, batches, bias_rate, clip):
    for inputs, targets in batches:
        run.model.loss(inputs, targets).backward()


@TRAIN_STEPS.wrong("run.optimizers is a list: go through it, for optimizer in run.optimizers.")
def list_steps(run, batches, bias_rate, clip):
    for inputs, targets in batches:
        run.model.loss(inputs, targets)[0].backward()
        run.optimizers.step()


@TRAIN_STEPS.wrong("Every step is made twice: is a loop over run.optimizers inside another one?")
def steps_twice(run, batches, bias_rate, clip):
    doubled = Run(run.seed, run.model, run.optimizers * 2)
    return steps_with(doubled, batches, bias_rate, clip)


# 13.3 -----------------------------------------------------------------------------------------------------------------


def equal_active_width(cfg):
    """The width of a SwiGLU with which a dense model, all layers alike, has the active parameters of `cfg`, rounded."""
    columns = 3 * cfg.hidden_size  # of a SwiGLU: what one more column of its width adds
    experts, layers = accounting.moe_parameters(cfg).active, range(cfg.num_hidden_layers)
    active = sum(experts if cfg.is_moe_layer(i) else columns * cfg.intermediate_size for i in layers)
    return round(active / (columns * cfg.num_hidden_layers))


EQUAL_ACTIVE_WIDTH = Exercise(
    "13.3",
    equal_active_width,
    minutes=9,
    sizes=[
        {"L": 24, "D": 64, "I": 256, "F": 32, "E": 16, "S": 8, "A": 8, "first": 8},
        {"L": 4, "D": 128, "I": 384, "F": 64, "E": 16, "S": 1, "A": 4, "first": 1},
        {"L": 61, "D": 7168, "I": 18432, "F": 2048, "E": 256, "S": 1, "A": 8, "first": 3},
        {"L": 5, "D": 36, "I": 130, "F": 23, "E": 90, "S": 2, "A": 3, "first": 2},
        {"L": 3, "D": 20, "I": 77, "F": 10, "E": 44, "S": 1, "A": 2, "first": 0},
        {"L": 6, "D": 8, "I": 50, "F": 12, "E": 96, "S": 1, "A": 2, "first": 1},
        {"L": 2, "D": 12, "I": 61, "F": 9, "E": 26, "S": 1, "A": 2, "first": 1},
    ],
    hints=[
        "What does a token meet in the feed-forwards of all layers together: in a dense one, and in one with experts (lesson "
        "07)? The dense model has the same sum, spread evenly over its layers.",
        "A SwiGLU of width W is 3·D·W. A layer with experts: E·(D + 1) for the router and its bias, and (S + A)·3·D·F. Add up "
        "first_k_dense_replace layers of width intermediate_size and the other layers; divide by L·3·D; round.",
    ],
)


@EQUAL_ACTIVE_WIDTH.inputs
def _(r, L, D, I, F, E, S, A, first):  # noqa: E741
    experts = {"n_routed_experts": E, "n_shared_experts": S, "num_experts_per_tok": A, "moe_intermediate_size": F}
    layers = {"num_hidden_layers": L, "first_k_dense_replace": first}
    return ModelConfig(hidden_size=D, intermediate_size=I, **experts, **layers)


def width(cfg, visited=None, router=None, first=None, over=None, matrices=3, plus=0):
    """The width with a part of the count replaced; `visited` experts a token, `first` dense layers, divided by `over`."""
    D, L = cfg.hidden_size, cfg.num_hidden_layers
    first = cfg.first_k_dense_replace if first is None else first
    visited = cfg.n_shared_experts + cfg.num_experts_per_tok if visited is None else visited
    moe = visited * matrices * D * cfg.moe_intermediate_size + (
        cfg.n_routed_experts * (D + 1) if router is None else router
    )
    active = first * 3 * D * cfg.intermediate_size + (L - first) * moe + plus
    return round(active / (3 * D * (L if over is None else over)))


@EQUAL_ACTIVE_WIDTH.wrong(
    "You count all E experts: those are the total parameters. A token meets A routed ones and the S shared ones."
)
def equal_total(cfg):
    return width(cfg, cfg.n_shared_experts + cfg.n_routed_experts)


@EQUAL_ACTIVE_WIDTH.wrong("The shared experts are missing: every token meets them, besides the A routed ones.")
def without_shared(cfg):
    return width(cfg, cfg.num_experts_per_tok)


@EQUAL_ACTIVE_WIDTH.wrong("Only the shared experts are counted: a token meets A routed ones too.")
def shared_alone(cfg):
    return width(cfg, cfg.n_shared_experts)


@EQUAL_ACTIVE_WIDTH.wrong("One expert is counted: a token meets S shared and A routed ones.")
def one_expert(cfg):
    return width(cfg, 1)


@EQUAL_ACTIVE_WIDTH.wrong("The router is missing: each token is multiplied with all its E rows of D numbers.")
def without_router(cfg):
    return width(cfg, router=0)


@EQUAL_ACTIVE_WIDTH.wrong("The router's bias is missing: E more parameters, E·(D + 1) in all.")
def router_without_bias(cfg):
    return width(cfg, router=cfg.n_routed_experts * cfg.hidden_size)


@EQUAL_ACTIVE_WIDTH.wrong(
    "You count the router's rows of the A chosen experts alone: to choose, a token is multiplied with all E of them."
)
def router_of_the_chosen(cfg):
    return width(cfg, router=cfg.num_experts_per_tok * (cfg.hidden_size + 1))


@EQUAL_ACTIVE_WIDTH.wrong(
    "The first layers are counted as if they had experts: first_k_dense_replace of them are dense, intermediate_size wide."
)
def all_have_experts(cfg):
    return width(cfg, first=0)


@EQUAL_ACTIVE_WIDTH.wrong("One layer is counted as dense, whatever first_k_dense_replace says.")
def one_dense_layer(cfg):
    return width(cfg, first=1)


@EQUAL_ACTIVE_WIDTH.wrong(
    "The dense layers and those with experts are swapped: first_k_dense_replace are DENSE, the others have experts."
)
def kinds_swapped(cfg):
    return width(cfg, first=cfg.num_hidden_layers - cfg.first_k_dense_replace)


@EQUAL_ACTIVE_WIDTH.wrong(
    "You divide by the layers with experts alone: in the dense model ALL L layers have this width, the first ones too."
)
def over_expert_layers(cfg):
    return width(cfg, over=cfg.num_hidden_layers - cfg.first_k_dense_replace)


@EQUAL_ACTIVE_WIDTH.wrong("That is the sum over all layers: the L layers of the dense model share it.")
def sum_of_layers(cfg):
    return width(cfg, over=1)


@EQUAL_ACTIVE_WIDTH.wrong(
    "That is a number of parameters: a column of a SwiGLU has 3·D of them, so divide by that too."
)
def parameters_not_columns(cfg):
    return width(cfg, over=1 / (3 * cfg.hidden_size))


@EQUAL_ACTIVE_WIDTH.wrong("You count two matrices for an expert: a SwiGLU has three, gate, up and down.")
def two_matrices(cfg):
    return width(cfg, matrices=2)


@EQUAL_ACTIVE_WIDTH.wrong(
    "The head is in the count: both models have the same head and attention; only the feed-forwards are compared."
)
def with_the_head(cfg):
    return width(cfg, plus=cfg.hidden_size * cfg.vocab_size)


@EQUAL_ACTIVE_WIDTH.wrong(
    "That is intermediate_size as the config has it: the width of its first layers, not of a dense model with as many "
    "active parameters."
)
def as_it_is(cfg):
    return cfg.intermediate_size


@EQUAL_ACTIVE_WIDTH.wrong("You do not round: a width is a whole number, round(…).")
def not_rounded(cfg):
    D, L, first = cfg.hidden_size, cfg.num_hidden_layers, cfg.first_k_dense_replace
    moe = accounting.moe_parameters(cfg).active
    return (first * 3 * D * cfg.intermediate_size + (L - first) * moe) / (3 * D * L)


@EQUAL_ACTIVE_WIDTH.wrong("You round down: the nearest whole width is asked for, round(…).")
def rounded_down(cfg):
    return math.floor(not_rounded(cfg))


@EQUAL_ACTIVE_WIDTH.wrong("You round up: the nearest whole width is asked for, round(…).")
def rounded_up(cfg):
    return math.ceil(not_rounded(cfg))


@EQUAL_ACTIVE_WIDTH.wrong("You round twice, a layer's width first and their mean afterwards: round once, at the end.")
def rounded_twice(cfg):
    L, first = cfg.num_hidden_layers, cfg.first_k_dense_replace
    experts = round(accounting.moe_parameters(cfg).active / (3 * cfg.hidden_size))
    return round((first * cfg.intermediate_size + (L - first) * experts) / L)


@EQUAL_ACTIVE_WIDTH.wrong("One shared expert is counted, whatever n_shared_experts says.")
def one_shared_expert(cfg):
    return width(cfg, 1 + cfg.num_experts_per_tok)


@EQUAL_ACTIVE_WIDTH.wrong("One router is counted: each layer with experts has its own.")
def one_router(cfg):
    return width(cfg, router=0, plus=cfg.n_routed_experts * (cfg.hidden_size + 1))


@EQUAL_ACTIVE_WIDTH.wrong("The dense layers have a router in your count: only those with experts have one.")
def router_everywhere(cfg):
    return width(cfg, plus=cfg.first_k_dense_replace * cfg.n_routed_experts * (cfg.hidden_size + 1))


@EQUAL_ACTIVE_WIDTH.wrong(
    "Experts have intermediate_size for their width in your count: theirs is moe_intermediate_size."
)
def experts_as_wide_as_dense(cfg):
    visited = cfg.n_shared_experts + cfg.num_experts_per_tok
    return width(cfg, visited * cfg.intermediate_size / cfg.moe_intermediate_size)


@EQUAL_ACTIVE_WIDTH.wrong("The first layers are as wide as an expert in your count: their width is intermediate_size.")
def dense_as_narrow_as_experts(cfg):
    narrower = cfg.first_k_dense_replace * 3 * cfg.hidden_size * (cfg.intermediate_size - cfg.moe_intermediate_size)
    return width(cfg, plus=-narrower)


@EQUAL_ACTIVE_WIDTH.wrong(
    "One dense layer too many is counted: range(first_k_dense_replace) has first_k_dense_replace of them."
)
def one_dense_more(cfg):
    return width(cfg, first=cfg.first_k_dense_replace + 1)


@EQUAL_ACTIVE_WIDTH.wrong("One dense layer too few is counted: the layers 0 to first_k_dense_replace - 1 are dense.")
def one_dense_less(cfg):
    return width(cfg, first=cfg.first_k_dense_replace - 1)


# 13.4 -----------------------------------------------------------------------------------------------------------------


def time_to_reach(times, bits, target):
    """When a curve `bits` [n] at `times` [n] is at `target` for the first time, on the line between two points; else inf."""
    if bits[0] <= target:
        return float(times[0])
    for before, after in zip(range(len(bits)), range(1, len(bits)), strict=False):
        if bits[after] <= target:
            share = (bits[before] - target) / (bits[before] - bits[after])
            return float(times[before] + share * (times[after] - times[before]))
    return math.inf


TIME_TO_REACH = Exercise(
    "13.4",
    time_to_reach,
    minutes=7,
    sizes=[
        {"n": 16, "where": 0.5, "noise": 0.0},
        {"n": 12, "where": 0.6, "noise": 0.4},
        {"n": 9, "where": 0.4, "noise": 0.5},
        {"n": 8, "where": 2.0, "noise": 0.2},  # never reached
        {"n": 7, "where": -1.0, "noise": 0.0},  # reached at once
        {"n": 2, "where": 0.5, "noise": 0.0},
        {"n": 10, "where": "lowest", "noise": 0.4},  # touched by the lowest point alone: the lesson's own goal
        {"n": 11, "where": "lowest", "noise": 0.4},  # which is not the last one here
    ],
    hints=[
        "Which is the first point at or below the target? The curve crossed on the way from the point before it. And if there "
        "is none, or if it is the first point of all?",
        "With a point before (t0, b0) and after (t1, b1): the share of the way is (b0 - target) / (b0 - b1), the time t0 + "
        "share · (t1 - t0). Without such a point: float('inf'); at once: times[0].",
    ],
)


@TIME_TO_REACH.inputs
def _(r, n, where, noise):
    times = r.uniform(0.5, 3, n).cumsum(0)
    smooth = 4 - 2 * torch.linspace(0, 1, n, dtype=torch.float64)
    bumps = noise * torch.tensor([(-1.0) ** i for i in range(n)], dtype=torch.float64)
    bits = smooth + bumps  # it goes up and down: the target is crossed more than once
    bits = bits.float().double()  # so that the lowest one is the target in fp32 too
    return times, bits, bits.min().item() if where == "lowest" else 4 - 2 * where + 0.013


def crossing(times, bits, target, point=None, never=math.inf, at_once=True):
    """time_to_reach with point(times, bits, before, after, target) in the place of the line between two points."""
    for after in range(len(bits)):
        if bits[after] <= target:
            if after == 0 and at_once:
                return float(times[0])
            return float(point(times, bits, after - 1, after, target))
    return float(never(times, bits)) if callable(never) else never


def on_the_line(times, bits, before, after, target):
    share = (bits[before] - target) / (bits[before] - bits[after])
    return times[before] + share * (times[after] - times[before])


@TIME_TO_REACH.wrong(
    "You give the time of the first point at or below the target: the curve crossed on the way to it. Go the right share of "
    "the way between the two points."
)
def point_after(times, bits, target):
    return crossing(times, bits, target, lambda t, b, before, after, goal: t[after])


@TIME_TO_REACH.wrong("You give the time of the last point above the target: the crossing lies behind it.")
def point_before(times, bits, target):
    return crossing(times, bits, target, lambda t, b, before, after, goal: t[before])


@TIME_TO_REACH.wrong("You take the middle between the two points: the share of the way depends on how far each is off.")
def middle(times, bits, target):
    return crossing(times, bits, target, lambda t, b, before, after, goal: (t[before] + t[after]) / 2)


@TIME_TO_REACH.wrong("The share is counted from the wrong end: it is 0 at the point before, and 1 at the point after.")
def share_from_the_end(times, bits, target):
    def point(t, b, before, after, goal):
        return t[after] + t[before] - on_the_line(t, b, before, after, goal)

    return crossing(times, bits, target, point)


@TIME_TO_REACH.wrong("That is the share of the way alone: times[before] + share · (times[after] - times[before]).")
def share_alone(times, bits, target):
    return crossing(times, bits, target, lambda t, b, before, after, goal: (b[before] - goal) / (b[before] - b[after]))


@TIME_TO_REACH.wrong("You give the number of the point, a position in the list, not a time.")
def number_of_the_point(times, bits, target):
    return crossing(times, bits, target, lambda t, b, before, after, goal: after, at_once=False)


@TIME_TO_REACH.wrong(
    "The share multiplies the bits, not the time: the answer lies between times[before] and times[after]."
)
def share_of_the_bits(times, bits, target):
    def point(t, b, before, after, goal):
        return t[before] + (b[before] - goal) * (t[after] - t[before])

    return crossing(times, bits, target, point)


@TIME_TO_REACH.wrong(
    "You take the LAST time that the curve comes down to the target: it goes up and down, and the first time counts."
)
def last_crossing(times, bits, target):
    found = [i for i in range(1, len(bits)) if bits[i] <= target < bits[i - 1]]
    if not found:
        return time_to_reach(times, bits, target)
    return float(on_the_line(times, bits, found[-1] - 1, found[-1], target))


@TIME_TO_REACH.wrong(
    "A point exactly AT the target does not count in yours: it is reached there, so compare with <=, not with <. The target "
    "below is the lowest point of a curve."
)
def below_alone(times, bits, target):
    if bits[0] < target:
        return float(times[0])
    for after in range(1, len(bits)):
        if bits[after] < target:
            return float(on_the_line(times, bits, after - 1, after, target))
    return math.inf


@TIME_TO_REACH.wrong(
    "The curve goes up and down, so a search that needs sorted bits (np.interp, searchsorted) goes wrong on it: walk along the "
    "points, to the first one at or below the target."
)
def sorted_search(times, bits, target):
    if bits.min() > target:
        return math.inf
    return float(np.interp(-float(target), -bits.double().numpy(), times.double().numpy()))


@TIME_TO_REACH.wrong(
    "You take the LAST time that the curve comes down to the target, and a first point at it does not count: the first counts."
)
def backwards(times, bits, target):
    for after in range(len(bits) - 1, 0, -1):
        if bits[after] <= target <= bits[after - 1]:
            return float(on_the_line(times, bits, after - 1, after, target))
    return math.inf


@TIME_TO_REACH.wrong(
    "You take the point that is nearest to the target: the first crossing is asked for, between points."
)
def nearest(times, bits, target):
    return float(times[(bits - target).abs().argmin()])


@TIME_TO_REACH.wrong("You take the curve's lowest point: the first time at the target is asked for.")
def lowest(times, bits, target):
    return float(times[bits.argmin()])


@TIME_TO_REACH.wrong(
    "A target that is never reached gets the last time: nobody knows when it would have been. Give float('inf')."
)
def last_time_if_never(times, bits, target):
    return crossing(times, bits, target, on_the_line, never=lambda t, b: t[-1])


@TIME_TO_REACH.wrong(
    "A target that is never reached is guessed, on the line through the last two points: a loss flattens. Give float('inf')."
)
def guessed(times, bits, target):
    return crossing(times, bits, target, on_the_line, never=lambda t, b: on_the_line(t, b, -2, -1, target))


@TIME_TO_REACH.wrong("A target that is never reached gives None: give float('inf'), which loses against any time.")
def none_if_never(times, bits, target):
    found = time_to_reach(times, bits, target)
    return None if math.isinf(found) else found


@TIME_TO_REACH.wrong("A target that is never reached gives 0: that would be at once. Give float('inf').")
def zero_if_never(times, bits, target):
    return crossing(times, bits, target, on_the_line, never=0.0)


@TIME_TO_REACH.wrong(
    "Where the first point is at the target already, you reach for the point before it, which Python takes from the end "
    "of the list (-1): give times[0]."
)
def before_the_first(times, bits, target):
    return crossing(times, bits, target, on_the_line, at_once=False)


@TIME_TO_REACH.wrong(
    "The line goes from the FIRST point to the one that is below: it must start at the point just before."
)
def from_the_start(times, bits, target):
    return crossing(times, bits, target, lambda t, b, before, after, goal: on_the_line(t, b, 0, after, goal))


@TIME_TO_REACH.wrong(
    "You wait until the curve is ABOVE the target: a loss falls, so look for the first point at or below."
)
def above(times, bits, target):
    return time_to_reach(times, -bits, -target)


@TIME_TO_REACH.wrong(
    "np.interp needs its second argument to RISE, and a loss falls; on a curve with bumps it goes wrong at all events."
)
def interp_on_falling_bits(times, bits, target):
    return float(np.interp(target, bits.double().numpy(), times.double().numpy()))


@TIME_TO_REACH.wrong(
    "np.interp needs sorted bits, and gives the last time where the target is never reached: walk along the points, to the first "
    "one at or below the target, and give float('inf') if there is none."
)
def interp_without_a_guard(times, bits, target):
    return float(np.interp(-target, -bits.double().numpy(), times.double().numpy()))


@TIME_TO_REACH.wrong(
    "np.interp on the reversed curve needs it to rise there, and gives the last time where the target is never reached: walk along "
    "the points instead."
)
def interp_backwards(times, bits, target):
    return float(np.interp(target, bits.double().numpy()[::-1].copy(), times.double().numpy()[::-1].copy()))


@TIME_TO_REACH.wrong(
    "The points are sorted by their bits, which mixes their times: keep their order, and take the first crossing."
)
def sorted_by_bits(times, bits, target):
    order = bits.argsort()
    return float(np.interp(target, bits[order].double().numpy(), times[order].double().numpy()))


@TIME_TO_REACH.wrong(
    "A point AT the target counts in yours only if it is the last one: it is reached wherever it lies, so compare with <=."
)
def below_or_last(times, bits, target):
    found = below_alone(times, bits, target)
    return float(times[-1]) if math.isinf(found) and bits[-1] <= target else found


@TIME_TO_REACH.wrong(
    "Where the first point is at or below the target there is no crossing, and you find none: the answer is times[0]."
)
def no_crossing_at_once(times, bits, target):
    return math.inf if bits[0] <= target else time_to_reach(times, bits, target)


@TIME_TO_REACH.wrong("Where the first point is at or below the target you give 0: the answer is times[0].")
def zero_at_once(times, bits, target):
    return 0.0 if bits[0] <= target else time_to_reach(times, bits, target)


@TIME_TO_REACH.wrong(
    "Where the first point is below the target you draw its line on to the left: nobody measured there, the answer is times[0]."
)
def drawn_on_to_the_left(times, bits, target):
    return float(on_the_line(times, bits, 0, 1, target)) if bits[0] <= target else time_to_reach(times, bits, target)


@TIME_TO_REACH.wrong("A target that is never reached gives NaN: give float('inf'), which loses against any time.")
def nan_if_never(times, bits, target):
    return crossing(times, bits, target, on_the_line, never=math.nan)


@TIME_TO_REACH.wrong("A target that is never reached gives -1, which wins against any time: give float('inf').")
def minus_one_if_never(times, bits, target):
    return crossing(times, bits, target, on_the_line, never=-1.0)


@TIME_TO_REACH.wrong(
    "A target that is never reached runs past the last point: end the loop there, and give float('inf')."
)
def past_the_end(times, bits, target):
    after = 0
    while bits[after] > target:
        after += 1
    return float(on_the_line(times, bits, after - 1, after, target)) if after else float(times[0])


@TIME_TO_REACH.wrong("The last point is left out: range(1, n) ends at n - 1 already.")
def last_point_left_out(times, bits, target):
    return float(times[0]) if bits[0] <= target else time_to_reach(times[:-1], bits[:-1], target)


@TIME_TO_REACH.wrong(
    "The line goes from the first point at or below to the one AFTER it: it starts at the point before."
)
def line_behind(times, bits, target):
    def point(t, b, before, after, goal):
        return on_the_line(t, b, after, min(after + 1, len(b) - 1), goal) if after + 1 < len(b) else math.inf

    return crossing(times, bits, target, point)


@TIME_TO_REACH.wrong(
    "The share is negative: both of its differences count from the point before, (b0 - target) / (b0 - b1)."
)
def negative_share(times, bits, target):
    def point(t, b, before, after, goal):
        return 2 * t[before] - on_the_line(t, b, before, after, goal)

    return crossing(times, bits, target, point)


@TIME_TO_REACH.wrong("You give the time since the first point: the time itself is asked for, as `times` counts it.")
def since_the_first(times, bits, target):
    return time_to_reach(times, bits, target) - float(times[0])


@TIME_TO_REACH.wrong(
    "You look for the time from which the curve STAYS at or below the target: the first time there counts, it may go up again."
)
def stays_below(times, bits, target):
    after = len(bits)
    while after and bits[after - 1] <= target:
        after -= 1
    if after in (0, len(bits)):
        return math.inf if after else float(times[0])
    return float(on_the_line(times, bits, after - 1, after, target))


@TIME_TO_REACH.wrong(
    "right=inf cares for a target that is never reached, but np.interp needs sorted bits, and these go up and down: walk along the "
    "points, to the first one at or below the target."
)
def interp_with_an_end(times, bits, target):
    return float(np.interp(-target, -bits.double().numpy(), times.double().numpy(), right=np.inf))
