# ---
# title: The mini-DeepSeek
# promise: The functions that you wrote become one model. You train it, let it write, and then climb the ladder from a dense transformer to it, with a prediction before each step.
# minutes: 60
# difficulty: 3
# needs: [torch]
# objectives:
#   - put your own functions together to a whole model, and see which part is yours and which the reference
#   - write the frame of a layer, and see what becomes of gradients without it
#   - write the training step of a model whose routers have biases
#   - build a dense rival with as many active parameters, so that a comparison says something
#   - read two curves as "so many times as fast to the same loss", and say which rungs pay
# ---

# %%
import functools
import inspect
import textwrap
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import minids
from minids import accounting, bench, data, fp8, optim
from minids.bench import ladder, tables
from minids.lab import assemble, check, exercises, explore, fast, hint, load_text
from minids.lab import machine, mine, minutes, plots, portrait, predict, progress
from minids.lab import status, train_live

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: good parts are not yet a model
#
# Attention, experts, norms, products in FP8: each passed its check by itself. What holds them together? Take 24 layers of random parts, and send a gradient from the last one back to the input. In training it must arrive there, or the first layers never learn.
#
# The same parts, in two frames: as DeepSeek has them, and in a chain, where each part feeds the next.

# %%
D, DEPTH, T = 64, 24, 32


def random_layer():
    """(attention, feed-forward, norm, norm) of random weights; attention is a mean so far."""
    mix, up, down = torch.randn(D, D) / 16, torch.randn(D, D) / 16, torch.randn(D, D) / 16
    seen = torch.ones(T, T).tril()
    seen = seen / seen.sum(1, keepdim=True)
    norm = torch.nn.RMSNorm(D)
    return lambda y: seen @ y @ mix, lambda y: F.silu(y @ up) @ down, norm, norm


def in_a_chain(x, attention, feed_forward, norm_1, norm_2):
    return norm_2(feed_forward(norm_1(attention(x))))


frames = {"DeepSeek's frame": exercises.reference("13.1"), "a chain": in_a_chain}
layers = [random_layer() for _ in range(DEPTH)]
for name, frame in frames.items():
    x = torch.randn(1, T, D, requires_grad=True)
    y = functools.reduce(lambda y, layer: frame(y, *layer), layers, x)
    y.backward(torch.randn(y.shape))
    early, late = x.grad[0, :4].std(), x.grad[0, -4:].std()
    print(f"{name:16}: a gradient of size 1 arrives as {early:.1e} at the first four positions,")
    print(f"{'':16}  as {late:.1e} at the last four")

# %% [markdown]
# In the chain a position's own word is averaged with all before it, layer by layer, until nothing of it is left; so nothing comes back to it either. (Only the first position is its own mean: there the gradient arrives.) The frame is two additions long, and you write it next.
#
# ### Your prediction
#
# At the end of this lesson's first half your model trains for 40 seconds. How many **bits per byte** will it then need for text that it never saw? (Lesson 01's dense model had longer.) Write a number in place of `None`.

# %%
my_guess = None  # a number of your own, such as 2.5
guess = predict("Bits per byte of the mini-DeepSeek after 40 seconds?", my_guess, "bits per byte")

# %% [markdown]
# ## Exercise 1 · The frame of a layer
#
# *6 minutes · difficulty ●○○○○*
#
# With $x$ what comes into a layer, `[B, T, D]` ($B$ sequences, $T$ positions, $D$ numbers each; V3 report, figure 2):
#
# $$h = x + \mathrm{Attention}(\mathrm{Norm}_1(x)), \qquad \mathrm{out} = h + \mathrm{FeedForward}(\mathrm{Norm}_2(h))$$
#
# What is added to is never normed itself. From the embedding to the head there is a way on which nothing is multiplied, the **residual stream**: each part reads a normed copy of it, and adds what it found.
#
# | name | | |
# |---|---|---|
# | `x` | `[B, T, D]` | |
# | `attention`, `feed_forward` | functions | `[B, T, D]` to `[B, T, D]` |
# | `norm_1`, `norm_2` | functions | the same |
# | result | `[B, T, D]` | |


# %%
def block_forward(x, attention, feed_forward, norm_1, norm_2):
    """One layer, [B,T,D] to [B,T,D]; the other arguments are functions."""
    # BEGIN SOLUTION
    h = x + attention(norm_1(x))
    return h + feed_forward(norm_2(h))
    # END SOLUTION


# %%
my_block_forward = check(block_forward)

# %% [markdown]
# ## Your model
#
# Whatever passed in lessons 01 to 12 was kept, as source, in the folder `.minids/passed`. `assemble.Parts()` loads it; what has not passed comes from the reference. Each part is tried beside the reference, on what the model gives it, before it is used: one that passed, and raises or differs here, is named, and the reference stands in.
#
# The model has MLA, 16 experts in 4 groups (of which a token may use 2), one shared expert, four layers of 128 numbers; the first layer is dense, as in V3.

# %%
parts = assemble.Parts()
cfg = minids.ModelConfig.preset("tiny", n_group=4, topk_group=2)
torch.manual_seed(0)
model = assemble.MiniDeepSeek(cfg, parts)
own = [part for part in parts.all.values() if part.owner == "yours"]
print(f"{len(own)} of {len(parts.all)} parts are yours, the others the reference's")
size = accounting.parameters(cfg)
print(f"{size.total:,} parameters, {size.active:,} of them active for a token")
plots.show(portrait.draw(parts, cfg), "The model: filled boxes with a tick are your functions.")

# %% [markdown]
# Read it from below. Boxes on the right work inside of others, or beside them: `split_heads_kv` within `attend_expanded`, `group_limit` within `route`. If the larger one is yours, it brings along what it used when it passed; if it is not, it is put together of the smaller ones, yours among them.
#
# An exercise that passed and is not ticked was done where its source could not be kept. Run its cell again, then the one above.
#
# Is it the same model? minids' own `Transformer` has the same weights under the same names. So they can be exchanged, and both must give the same logits.

# %%
twin = minids.Transformer(cfg)
twin.load_state_dict(model.state_dict())
tokens = torch.randint(0, cfg.vocab_size, (2, 100))
with torch.no_grad():
    error = minids.numerics.relative_error(model.eval()(tokens), twin.eval()(tokens))
prompt = tokens[:, :20]
same = torch.equal(minids.generate(model, prompt, 20), minids.generate(twin, prompt, 20))
print(f"largest difference of the logits: {error:.0e} of their size")
print(f"20 tokens decoded with the cache: {'the same' if same else 'NOT the same'}")
assert error < 1e-3, "the model differs from minids': is a cell above not run?"

# %% [markdown]
# No line of minids' layers ran in yours. The glue that calls your functions is short enough to read: this is attention, with everything that lessons 02 to 04 were about in one place. `put` appends to the cache; `crossover` says whether so few new tokens are cheaper absorbed; `as_multiplied` changes a weight in FP8 alone.

# %%
print(inspect.getsource(assemble.MiniDeepSeek.latent_attention))

# %% [markdown]
# ## Exercise 2 · The training step
#
# *10 minutes · difficulty ●●●○○*
#
# All lessons trained with the same few lines, and you never had to write them. For each batch:
#
# 1. the loss: `run.model.loss(inputs, targets)` gives `(loss, nats)`: what to differentiate (lesson 08's balance loss is in it), and the cross-entropy to report, cut off from the graph;
# 2. its gradients: `loss.backward()` adds them to what each parameter's `.grad` holds;
# 3. their limit: `torch.nn.utils.clip_grad_norm_(parameters, clip)` shortens all gradients **together** to the length `clip`, if they are longer; one odd batch then does no harm;
# 4. `step()` of each optimizer, after which its gradients must be emptied, `zero_grad()`;
# 5. the routers' biases: no gradient reaches them (lesson 08), so the model has a method for it, `update_expert_bias(bias_rate)`.

# %% [markdown]
# | name | | |
# |---|---|---|
# | `run.model` | a model in training | `run.model.parameters()` has all its weights |
# | `run.optimizers` | a list | each has some of the weights: Muon the matrices, AdamW the rest |
# | `batches` | a list | of `(inputs, targets)`, each `[B, T]` |
# | `bias_rate`, `clip` | numbers | |
# | result | `[steps]` | the cross-entropy of each step, in nats |
#
# `torch.stack(list)` makes one tensor of many. Stuck? `hint("train_steps")`.


# %%
def train_steps(run, batches, bias_rate, clip):
    """A training step of run.model for each batch; their cross-entropies [steps] in nats."""
    # BEGIN SOLUTION
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
    # END SOLUTION


# %%
my_train_steps = check(train_steps)

# %% [markdown]
# ## 40 seconds of training
#
# First some of your steps, to see that the loss falls. Then 40 seconds of `train_live`: the same five things in each step, with a learning rate that rises, then falls to zero, and a curve.

# %% tags=["nbval-ignore-output"]
text = load_text(vocab_size=cfg.vocab_size)
run = SimpleNamespace(model=model.train())
run.optimizers = optim.build_optimizers(model, 0.01, 0.01, weight_decay=0.1)
batches = [data.batch(text.tokens, step, 1, 4, 64) for step in range(4 if fast() else 12)]
nats = my_train_steps(run, batches, 0.001, 1.0)
bits = nats / torch.log(torch.tensor(2.0)) / text.bytes_per_token
print("bits per byte, step by step:", ", ".join(f"{b:.2f}" for b in bits))

# %% tags=["nbval-ignore-output"]
trained = train_live(model, text, minutes=minutes(40 / 60), sample_at=(13, 26))

# %% [markdown]
# ## What it knows
#
# Bits per byte on **held-out** files, which no step has seen; on the first of them, so that it is quick. gzip and xz compress the same files; the lines above were theirs for all held-out ones.

# %% tags=["nbval-ignore-output"]
corpus, count = text.corpus, 2 if fast() else 8
some = data.Corpus("held out", corpus.train, corpus.heldout[:count], cache_dir=corpus.cache_dir)
my_bits_per_byte = mine("bits_per_byte")
with torch.no_grad():
    measured = my_bits_per_byte(*data.heldout_nats(model, text.tokenizer, some, 256, 16))
print(f"{sum(map(len, some.heldout)):,} bytes of {count} files that it never saw")
rows = {"gzip": some.gzip_bpb, "xz": some.xz_bpb, "yours": measured}
fig, axes = plots.figure(7, 2.2)
plots.bars(axes, rows, form=".2f")
axes.set(xlabel="bits per byte, held out")
plots.show(fig, "Bits per byte of gzip, xz and your model.")
if not fast():
    guess.compare(measured)

# %% [markdown]
# ## It writes
#
# A prompt goes through `attend_expanded` in one pass; each token after it through `attend_absorbed`, over a cache of 80 numbers a token and layer. What it learnt in 40 seconds: indentation, brackets, names that occur often; not what a program is for.


# %% tags=["nbval-ignore-output"]
def write(prompt, new_tokens=80, temperature=0.6):
    """The model's continuation of a prompt."""
    ids = torch.tensor([text.tokenizer.encode(prompt).ids])
    out = minids.generate(model, ids, new_tokens, temperature, 0.95, seed=0)
    return text.tokenizer.decode(out[0].tolist())


for seconds, words in trained.samples:
    print(f"── after {seconds} seconds ──\n{words}\n")
began = time.perf_counter()
sample = write("def read(self, ")
speed = 80 / (time.perf_counter() - began)
print(f"── at the end, {speed:.0f} tokens/s ──\n{sample}")

# %% [markdown]
# It is a checkpoint like any other. The next cell writes it in the layout of the hub, with its vocabulary, and any shell can then let it write on.

# %%
folder = progress.home() / "mini_deepseek"
model.save_pretrained(folder)
text.tokenizer.save(str(folder / "tokenizer.json"))
again = minids.Transformer.from_pretrained(folder)
with torch.no_grad():
    error = minids.numerics.relative_error(again(prompt), model.eval()(prompt))
print(f"opened by minids.Transformer: logits {error:.0e} apart")
print('python -m minids.generate .minids/mini_deepseek --prompt "class "')

# %% [markdown]
# ## Whose work was it?
#
# Every part counted its calls, training, evaluation and decoding together, and the seconds within it (a larger one's seconds hold those of the smaller ones it calls). Backward passes are not in them.

# %% tags=["nbval-ignore-output"]
table = portrait.rows(parts)
print(f"{'part':26} {'where':19} {'whose':9} {'calls':>8} {'ms a call':>9}")
for title, place, owner, calls, each, trouble in table:
    print(f"{title:26} {place:19} {owner:9} {calls:>8} {each:>9}")
    if trouble:
        print(f"    {trouble}")

# %% tags=["nbval-ignore-output"]
total = {name: sum(part.seconds.values()) for name, part in parts.all.items()}
most = sorted((name for name in total if name != "block_forward"), key=total.get)[:-9:-1]
fig, axes = plots.figure(7.5, 3.4)
names = {f"{name} ({parts.all[name].owner})": total[name] for name in most}
plots.bars(axes, names, unit="s")
axes.set(xlabel="seconds, forward passes")
plots.show(fig, "Seconds within each part, and whose it is.")

# %% [markdown]
# Slow and right is welcome here. If one of yours stands out, compare its line with that of a friend: the reference loops over experts too, so lesson 09's sorting and grouped products are what would help next.
#
# These exercises were about **kernels**; on a processor they only run in the interpreter, so no part of this model is one. On a GPU they would do the work of these parts:

# %%
for title, work, owner in portrait.kernels():
    print(f"{title:32} {owner:9} for {work}")

# %% [markdown]
# ### The same weights in FP8
#
# With `Parts(fp8=True)` each product of attention and feed-forward goes through lesson 12's `linear_forward` and `linear_backward`. Parts that multiply by weights inside, such as `swiglu`, are then put together of these products. An emulation on a processor is slow, so: one small batch, trained weights, loss and gradient.

# %% tags=["nbval-ignore-output"]
narrow = assemble.MiniDeepSeek(cfg, assemble.Parts(fp8=True))
narrow.load_state_dict(model.state_dict())
batch = data.batch(text.tokens, 500, 0, 1, 64)
found = {}
for name, one in {"FP32": model, "FP8": narrow}.items():
    one.zero_grad()
    loss, nats = one.train().loss(*batch)
    loss.backward()
    found[name] = nats, one.layers[0].self_attn.o_proj.weight.grad.clone()
    model.zero_grad()
nats, grad = zip(*found.values(), strict=True)
print(f"loss in FP8: {100 * (nats[1] / nats[0] - 1):+.2f}% of that in FP32")
print(f"gradient of a weight: {(grad[1] - grad[0]).norm() / grad[0].norm():.1%} off")
for name in ("linear_forward", "linear_backward"):
    part = narrow.parts.all[name]
    print(f"{name}: {sum(part.calls.values())} times, {part.owner}")

# %% [markdown]
# ## The ladder
#
# What did each lesson's technique buy? Five models on the same text, one change a **rung**:
#
# | rung | attention | feed-forward | products |
# |---|---|---|---|
# | MHA | keys and values for each head | dense | BF16 or FP32 |
# | GQA | heads share them: as few as can be, with a cache no smaller than MLA's | dense | |
# | MLA | latents | dense | |
# | MLA+MoE | latents | experts | |
# | MLA+MoE+FP8 | latents | experts | FP8 |
#
# Compared with what kept equal? The experts' model has many more parameters. Here all rungs get the same **active** ones: a token costs the same arithmetic, nearly. So the dense rungs' feed-forward must have a certain width.

# %% [markdown]
# ## Exercise 3 · The dense rival
#
# *9 minutes · difficulty ●●○○○*
#
# `cfg` is a model with experts. How wide must the SwiGLU of a dense model be, all its layers alike, so that the feed-forwards of all layers together have as many **active** parameters?
#
# | field of `cfg` | | |
# |---|---|---|
# | `num_hidden_layers` | $L$ | layers of both models |
# | `first_k_dense_replace` | | so many of the first ones are dense in `cfg` too, |
# | `intermediate_size` | $I$ | and so wide |
# | `hidden_size` | $D$ | a SwiGLU of width $W$ has $3DW$ parameters |
# | `n_routed_experts`, `num_experts_per_tok` | $E$, $A$ | |
# | `n_shared_experts` | $S$ | |
# | `moe_intermediate_size` | $F$ | width of one expert |
#
# A router has $E\,(D + 1)$ parameters, its bias included; all of them are active. Result: the width, rounded to the nearest whole number.


# %%
def equal_active_width(cfg):
    """The width of a dense model's SwiGLU that has as many active parameters as `cfg`."""
    # BEGIN SOLUTION
    column = 3 * cfg.hidden_size
    visited = cfg.n_shared_experts + cfg.num_experts_per_tok
    router = cfg.n_routed_experts * (cfg.hidden_size + 1)
    dense = cfg.first_k_dense_replace
    active = dense * column * cfg.intermediate_size
    per_layer = visited * column * cfg.moe_intermediate_size + router
    active += (cfg.num_hidden_layers - dense) * per_layer
    return round(active / (column * cfg.num_hidden_layers))
    # END SOLUTION


# %%
my_equal_active_width = check(equal_active_width)

# %% [markdown]
# `ladder.rungs` builds the five configurations. It rounds widths to multiples of 16, and makes up in the feed-forward for what attention has more or less of. What do they cost by arithmetic, in training, a token in a sequence of 256?

# %%
rungs = ladder.rungs("tiny")
print(f"your width: {my_equal_active_width(rungs['MLA+MoE'].cfg)},", end=" ")
print(f"the MLA rung's: {rungs['MLA'].cfg.intermediate_size}")
print(f"{'':12} {'parameters':>11} {'active':>9} {'MFLOP/token':>12} {'cache, bytes/token':>19}")
cache = {}
for name, rung in rungs.items():
    size = accounting.parameters(rung.cfg)
    cache[name] = accounting.kv_bytes_per_token(rung.cfg, torch.bfloat16)
    flops = accounting.train_flops_per_token(rung.cfg, 256) / 1e6
    print(f"{name:12} {size.total:11,} {size.active:9,} {flops:12.2f} {cache[name]:19,}")

# %% [markdown]
# ### Your prediction
#
# Two rungs race below, the lowest and the highest that is not emulated: dense MHA against MLA+MoE, each for the same seconds on this machine. When both have had them, how far is MLA+MoE **ahead** in bits per byte? (Negative: behind.)

# %%
my_second_guess = None  # bits per byte, such as 0.05 or -0.05
ahead = predict("At equal seconds, how far is MLA+MoE ahead of MHA?", my_second_guess, "bits/byte")

# %% [markdown]
# First the speed of one training step: all five rungs in turns, by your `train_steps`, on batches of 1,024 tokens. (FP8 is emulated on a processor. Its bar says what emulating costs, and nothing about FP8.)


# %% tags=["nbval-ignore-output"]
ROWS, LENGTH = 8, 128


def stepper(rung):
    """A function that makes one training step of a new model of this rung."""
    torch.manual_seed(0)
    one = minids.Transformer(rung.cfg).train()
    one = fp8.convert(one) if rung.fp8 else one
    run = SimpleNamespace(model=one, optimizers=optim.build_optimizers(one, 0.01, 0.01, 0.1))
    batches = [data.batch(text.tokens, 0, 0, ROWS, LENGTH)]
    return lambda: my_train_steps(run, batches, 0.001, 1.0)


steps = {name: stepper(rung) for name, rung in rungs.items()}
clock = machine.race(steps, rounds=1 if fast() else 3)
speeds, (left, right) = plots.figure(9, 2.9, columns=2)
plots.bars(left, {name: ROWS * LENGTH / s for name, s in clock.items()}, form=",.0f")
plots.bars(right, cache, form=",.0f")
left.set(xlabel="training, tokens/s, here")
right.set(xlabel="cache, bytes per token, BF16", yticklabels=[])
plots.show(speeds, "Training speed here and cache bytes of the five rungs.")

# %% [markdown]
# The race: whoever has used less time makes the next five steps. After them a test on held-out text, with the clock stopped. Both have the same learning rate, constant, tuned for neither.

# %% tags=["nbval-ignore-output"]
unseen = data.encode_files(text.tokenizer, text.corpus.heldout[:40])
nbytes = sum(map(len, text.corpus.heldout[:40])) / len(unseen)
sample_batch = data.batch(unseen, 0, 0, 4 if fast() else 32, LENGTH)


class Racer:
    """A rung in training; `curve` has (seconds, steps, held-out bits per byte)."""

    def __init__(self, rung):
        torch.manual_seed(0)
        self.model = minids.Transformer(rung.cfg).train()
        self.optimizers = optim.build_optimizers(self.model, 0.005, 0.005, 0.1)
        self.seconds, self.steps, self.curve = 0.0, 0, []

    def go(self, n=5):
        batches = [data.batch(text.tokens, self.steps + i, 0, ROWS, LENGTH) for i in range(n)]
        began = time.perf_counter()
        my_train_steps(self, batches, 0.001, 1.0)
        self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + n
        with torch.no_grad():
            nats = self.model.eval().loss(*sample_batch)[1].item()
        self.model.train()
        self.curve.append((self.seconds, self.steps, my_bits_per_byte(nats, 1, nbytes)))


# %% tags=["nbval-ignore-output"]
SECONDS = 1.0 if fast() else 10.0
racers = {name: Racer(rungs[name]) for name in ("MHA", "MLA+MoE")}
while min(racer.seconds for racer in racers.values()) < SECONDS:
    min(racers.values(), key=lambda racer: racer.seconds).go()
if fast():
    print("MINIDS_FAST is set: a race of one second, so the figures below mean nothing")
race, panels = plots.figure(9, 3.3, columns=2)
for name, racer in racers.items():
    seconds, steps, bits = torch.tensor(racer.curve).T
    for axes, x in zip(panels, (seconds, steps), strict=True):
        axes.plot(x, bits, label=name)
panels[0].set(xlabel="seconds", ylabel="bits per byte, held out")
panels[1].set(xlabel="steps")
panels[1].legend(loc="upper right")
plots.show(race, "Held-out loss of two rungs over seconds and over steps.")

# %% [markdown]
# ## Exercise 4 · Read a curve
#
# *7 minutes · difficulty ●●○○○*
#
# "A little fewer bits" says little. How many times as fast one gets to the same loss says more: draw a line at a loss, and see when each curve is there. A curve is a list of points, so the time lies between two of them; go straight from one to the other.
#
# | name | | |
# |---|---|---|
# | `times`, `bits` | `[n]`, `[n]` | the points of the curve, in order of time |
# | `target` | a number | the loss to reach |
# | result | a number | the time at which the curve is at `target` for the FIRST time (later it may go up again) |
#
# Two ends: at or below the target at the first point already, the answer is `times[0]`; never there, it is `float("inf")`.


# %%
def time_to_reach(times, bits, target):
    """When the curve is at `target` for the first time, on the straight line between points."""
    # BEGIN SOLUTION
    if bits[0] <= target:
        return float(times[0])
    for i in range(1, len(bits)):
        if bits[i] <= target:
            share = (bits[i - 1] - target) / (bits[i - 1] - bits[i])
            return float(times[i - 1] + share * (times[i] - times[i - 1]))
    return float("inf")
    # END SOLUTION


# %%
my_time_to_reach = check(time_to_reach)

# %% [markdown]
# Now the race in one line: the loss that both reach, and how long each took to get there; by seconds, and by steps.

# %% tags=["nbval-ignore-output"]
curves = {name: torch.tensor(racer.curve).T for name, racer in racers.items()}
goal = max(curve[2].min().item() for curve in curves.values())
print(f"both reach {goal:.3f} bits per byte:")
needed = {}
for row, unit in ((0, "seconds"), (1, "steps")):
    needed[unit] = {n: my_time_to_reach(c[row], c[2], goal) for n, c in curves.items()}
    words = ", ".join(f"{name} after {value:.1f}" for name, value in needed[unit].items())
    ratio = needed[unit]["MHA"] / needed[unit]["MLA+MoE"]
    print(f"  {unit:8}{words}: MLA+MoE is {ratio:.2f} times as fast")
ends = {name: curve[2, -1].item() for name, curve in curves.items()}
if not fast():
    ahead.compare(ends["MHA"] - ends["MLA+MoE"])

# %% [markdown]
# One seed, a short race, no schedule: what you see is this race, not a law. Lesson 07's race had three seeds, and there they did not always agree.
#
# The whole ladder takes longer than a lesson: every rung, three seeds, with a schedule and larger batches, at equal seconds **and** at equal FLOPs: those that the slowest rung does in that time, so its two losses are one. (FP8, where it is emulated, has no time that counts: it gets the same FLOPs.) `python -m minids.bench ladder --minutes 60 --record` runs it, and keeps the result; on a GPU for `small`, on a larger text. What is recorded:

# %% tags=["nbval-ignore-output"]
recorded = bench.record("ladder")
if recorded:
    plots.show(ladder.draw(recorded, columns=3), "The recorded ladder, a row for each rung.")
    for line in [*ladder.verdicts(recorded, brief=True), tables.where(recorded)]:
        print(textwrap.fill(line, 90, subsequent_indent="    "))
else:
    print("the ladder is not recorded yet: python -m minids.bench ladder --record")

# %% [markdown]
# A rung **pays** where it beats the one before it by more than the spread: a loss lower with every seed, a speed whose whole range lies above. Mind what each is for: GQA and MLA shrink the cache, and should not cost loss; experts should lower the loss for the same arithmetic, once training is long enough, and cost memory; FP8 buys time on GPUs that have it, and at best costs no loss. A run of seconds on a processor need not show any of this: read what it did show.

# %% [markdown]
# ## Explore: a token's bytes
#
# Decoding is memory traffic: a step reads the weights it needs, once for all **users** who decode together, and each user's cache (lesson 02). Left, the bytes for one token of one user; right, what an H200's bandwidth allows at best, all users together.
#
# **Questions.** `small`, one user: from which context on does MHA read more cache than weights, and MLA? With 4,096 tokens, what do 16 users change for MHA, and for MLA? Which rung shares its weights worst?
#
# <details><summary>Answers</summary>MHA from 4,096 tokens on, MLA between 16,384 and 65,536. 16 users share the weights, and nobody's cache: MHA is left with its cache alone, and all 16 together get less than twice the tokens of one; with MLA they get more than four times as many. The experts' model shares worst: different users choose different experts, so a step reads more and more of them, until all are read.</details>


# %%
def token_bytes(cfg, context, users):
    """(weights, cache): bytes read for one token of one of `users`, in BF16."""
    size, idle = accounting.parameters(cfg), 0.0
    if cfg.n_routed_experts:
        E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
        layers = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers))
        one = 3 * cfg.hidden_size * cfg.moe_intermediate_size
        chosen = E * (1 - (1 - A / E) ** users)  # different ones, if all are equally likely
        idle = layers * one * (chosen - A)
    weights = 2 * (size.active + idle) / users
    return weights, context * accounting.kv_bytes_per_token(cfg, torch.bfloat16)


def draw(figure, model, users, context):
    left, right = figure.subplots(1, 2)
    shown = [(n, r.cfg) for n, r in ladder.rungs(model).items() if not r.fp8]
    read = {name: token_bytes(one, context, users) for name, one in shown}
    values = {n: {"weights": w / 1e6, "cache": c / 1e6} for n, (w, c) in read.items()}
    plots.bars(left, values, form=",.3g")
    left.set(xlabel="MB read for a token of one user")
    many = "s" * (users > 1)
    left.set_title(f"{model}: {users} user{many}, {context:,} tokens each")
    bandwidth = accounting.GPUS["H200"].bandwidth
    speed = {n: bandwidth / (w + c) / 1e3 for n, (w, c) in read.items()}
    plots.bars(right, speed, form=",.3g")
    right.set(xlabel="thousand tokens/s of all users, at most", yticklabels=[])


# %%
sizes = {"model": ["small", "tiny", "base", "deepseek-v2-lite"]}
controls = {"users": [1, 4, 16, 64, 256], "context": [4096, 256, 1024, 16384, 65536]}
alt = "Bytes read for a token, and tokens/s at best, by rung"
explore(draw, alt, (9, 3.8), **sizes, **controls)

# %% [markdown]
# ## When does it not pay?
#
# - **Small models.** Each technique has a fixed price: more and smaller products, a router, quantising. Where products are small already, as in `tiny`, that price is most of it. The speeds above say how much on this machine.
# - **Short texts, one user.** MLA saves cache. Where the cache is small beside the weights, there is nothing to save.
# - **Short training.** More parameters need more steps to be worth their memory (lesson 07: where the lines cross).
# - **Memory.** At equal active parameters the experts' model is the larger one (by how much, the next cell prints); against a dense model of its TOTAL size it would need to win otherwise.
# - **Anything emulated.** FP8 without FP8 units is only slower.
#
# And what a ladder cannot show: whether gains add up. The order of the rungs is a choice; another one would credit each technique differently.

# %% tags=["nbval-ignore-output"]
total = {name: accounting.parameters(rung.cfg).total for name, rung in rungs.items()}
for name in rungs:
    print(f"{name:12}: {clock['MHA'] / clock[name]:.2f} times MHA's training speed here,", end=" ")
    print(f"{total[name] / total['MHA']:.2f} times its parameters,", end=" ")
    print(f"{cache[name] / cache['MHA']:.2f} times its cache")

# %% [markdown]
# ## In the real DeepSeek
#
# The same parts, other numbers (V3 report, sections 2 and 4.2; sizes from the config):

# %%
v3 = minids.ModelConfig.preset("deepseek-v3")
fields = ["num_hidden_layers", "first_k_dense_replace", "hidden_size", "num_attention_heads"]
fields += ["q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "n_routed_experts"]
fields += ["num_experts_per_tok", "n_shared_experts", "n_group", "topk_group"]
fields += ["routed_scaling_factor"]
print(f"{'':24} {'yours':>12} {'DeepSeek-V3':>16}")
for field in fields:
    print(f"{field:24} {getattr(cfg, field)!s:>12} {getattr(v3, field)!s:>16}")
for what, count in {
    "parameters": lambda c: accounting.parameters(c).total,
    "active parameters": lambda c: accounting.parameters(c).active,
    "cache, bytes per token": lambda c: accounting.kv_bytes_per_token(c, torch.bfloat16),
}.items():
    print(f"{what:24} {count(cfg):12,} {count(v3):16,}")
print(f"V3's dense rival would have a SwiGLU of width {my_equal_active_width(v3):,}")

# %% [markdown]
# - V3 trained on 14.8 trillion tokens, with AdamW, the gradients' norm limited to 1.0, a batch that grew from 3,072 to 15,360 sequences.
# - The bias moved by 0.001 a step, and by 0 for the last 500 billion tokens.
# - It has one thing more than yours: **multi-token prediction**, a further block that guesses one token beyond the next (section 2.2). minids has it, `num_nextn_predict_layers=1`; no exercise is about it.
#
# What came after: V3.2 adds an indexer that lets each token attend to 2,048 tokens at most. V4, by public code and posts, replaces MLA by shared-KV attention over compressed sparse layers, and trains with Muon, as you did here.
#
# ## Your page
#
# One file, with pictures inside, to keep or to show: `.minids/mini_deepseek.html`.

# %% tags=["nbval-ignore-output"]
curve, axes = plots.figure(8, 3.2)
axes.plot([r[0] for r in trained.rows], [r[2] for r in trained.rows], label="training")
for name, value in {"gzip, held out": some.gzip_bpb, "xz, held out": some.xz_bpb}.items():
    axes.plot([0, trained.rows[-1][0]], [value, value], marker="", label=name)
axes.set(xlabel="seconds", ylabel="bits per byte")
plots.label_lines(axes)
sections = [
    ("The model, and which part is whose", portrait.draw(parts, cfg)),
    (f"40 seconds of training: {measured:.2f} bits per byte on text it never saw", curve),
    ("What it writes", sample),
    ("Five rungs: speed here, and cache", speeds),
    ("Two rungs, the same seconds", race),
    ("Its parts: whose, calls, milliseconds a call", portrait.rows(parts)),
]
if recorded:
    drawn = ladder.draw(recorded, columns=3)
    sections.insert(5, (f"The ladder, recorded on {recorded['device']}", drawn))
portrait.write_page(progress.home() / "mini_deepseek.html", "My mini-DeepSeek", sections)
print("written: .minids/mini_deepseek.html")

# %% [markdown]
# ## To remember
#
# 1. A layer adds to a stream that it never replaces; norms stand before the parts, not on the stream.
# 2. Compare at equal active parameters, then ask: at equal steps, at equal seconds, or at equal memory?
# 3. Each rung buys another thing: cache, parameters for the same arithmetic, time on GPUs that have FP8; what it costs is paid at once, what it buys often only with size.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Why does the second addition add to $h$ and not to $x$?
# <details><summary>because of the norm</summary>No: neither is normed.</details>
# <details><summary>so that what attention found stays in the stream</summary>Yes: x + … would lose it, but for what the feed-forward made of it.</details>
#
# **2.** You forget `zero_grad()`. What happens?
# <details><summary>an error</summary>No: nothing complains.</details>
# <details><summary>each step goes along the sum of all gradients so far</summary>Yes: a loss that falls at first, then behaves oddly.</details>

# %% [markdown]
# **3.** A paper's MoE has as many TOTAL parameters as its dense rival. Which of them does more arithmetic for a token?
# <details><summary>the dense one</summary>Yes: all its parameters are active. If the MoE is as good, it is cheaper to run.</details>
# <details><summary>they do the same</summary>No: that would be equal ACTIVE parameters.</details>
#
# **4.** MLA's rung has the same loss as GQA's, and trains no faster. Did it pay?
# <details><summary>no, nothing was gained</summary>Look at what it is for, before you say so.</details>
# <details><summary>ask for the cache, at equal loss</summary>Yes: GQA's cache here is the larger one, so MLA saved memory, and it cost no loss. That is what it is for.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Which part earns most? Build the ladder in another order: from MHA to MHA with experts, then to MLA with experts. The first and the last are `minids.bench.ladder.rungs("tiny")["MHA"].cfg` and `["MLA+MoE"].cfg`, the old step between is `["MLA"].cfg`, the new one `minids.ModelConfig.preset("tiny", attention="mha")`. Train the four with `minids.lab.train_live(model, text, steps=100, seed=seed)`, three seeds each: twelve runs, each of 100 steps as long as the training above, or shorter (`torch.manual_seed(seed)` before each model). Compare `minids.data.bits_per_byte(*run.heldout())`. Do MLA and experts help each other, or hinder?
# <details><summary>Expected</summary>The new step has 1,047,728 active parameters, the others up to 1,066,112: less than 2 in 100 apart. Whether the two help each other is one number, the same in both orders: what MLA changes with experts, less what it changes without, (MLA+MoE − MHA+MoE) − (MLA − MHA). Compute it for each seed. Below 0 for all three they help, above 0 for all three they hinder, else the seeds hide it.</details>
# 2. Go back to an exercise whose box above has no tick, solve it, and run this notebook again. Then break it on purpose: edit its file in `.minids/passed` so that it gives half of what it should, and look at what `assemble.Parts()` says once the model runs.
# <details><summary>Expected</summary>At its first call, for 01.1: <code>01.1 rms_norm: yours passed, and does not work in this model; the reference stands in</code>, and how many of its numbers are not the reference's. The picture is drawn before that, and keeps the tick; the table below “Whose work was it?” has the reference, and the reason. About a part that this model never calls, such as 01.3, nothing is said.</details>

# %%
status()
