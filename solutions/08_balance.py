# ---
# title: Balance without a loss
# promise: You watch a router send most tokens to a few experts, repair that in DeepSeek-V2's way and in V3's, and measure what each repair costs.
# minutes: 60
# difficulty: 3
# needs: [torch]
# objectives:
#   - measure how unevenly tokens are spread over experts, and how even they could be at best
#   - write the balance loss of DeepSeek-V2 and V3, and the bias update that needs no loss
#   - say exactly when, by how much and from what the gate's bias is updated
#   - race four routers over several seeds, loss against balance
#   - show how much of the router's gradient a balance loss takes over
# ---

# %%
import functools
import math

import torch
import torch.nn.functional as F

import minids
from minids.lab import check, explore, fast, hint, load_text, machine
from minids.lab import plots, predict, status, train_live

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: nobody asked for balance
#
# In lesson 07 a **router** gave each token **scores** $s_i$ between 0 and 1, one for each of $E$ **experts** (small feed-forward networks), and sent it to the $A$ best. The **load** of an expert is the number of tokens that it gets. The cross-entropy, the loss that is trained, rewards good predictions alone: nothing in it asks for equal loads.
#
# What happens then? Below, a model of two such layers is trained for 80 steps: $E = 16$, $A = 2$, each layer with one shared expert besides, $T = 64$ tokens in each of $B = 16$ **sequences** of a step. Those are 1,024 tokens and 2,048 choices, on average 128 for each expert. Reading the text and training take less than a minute, mostly.

# %% tags=["nbval-ignore-output"]
STEPS, SEEDS, E, A, T = (6 if fast() else 80), (2 if fast() else 3), 16, 2, 64
if fast():
    print("MINIDS_FAST is set: 6 steps and 2 seeds, so the figures below mean nothing")
text = load_text(vocab_size=1024)
experts = {"n_routed_experts": E, "num_experts_per_tok": A, "moe_intermediate_size": 32}
sizes = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "attention": "mha"}
# experts in every layer, and no balance loss but your own
cfg = minids.ModelConfig(**sizes, **experts, first_k_dense_replace=0, aux_loss_alpha=0.0)


def build(seed):
    """A new model; its first weights depend on the seed alone."""
    torch.manual_seed(seed)
    return minids.Transformer(cfg)


def short(model, inputs, targets):
    """The loss of the first T tokens of each sequence of a batch."""
    return model.loss(inputs[:, :T], targets[:, :T])


def train(model, seed, loss=short, rate=0.0):
    """A model trained for STEPS steps; `rate` is that of the bias update, 0 for none."""
    return train_live(model, text, steps=STEPS, seed=seed, loss=loss, bias_rate=rate, live=False)


unbalanced = train(build(0), seed=0)

# %% tags=["nbval-ignore-output"]
LAST = slice(-max(1, STEPS // 5), None)  # the last fifth of the steps


def draw_loads(run, name):
    """Heat maps of the loads: experts over steps, a layer each."""
    fig, both = plots.figure(8, 3.2, columns=2)
    for layer, axes in enumerate(both):
        colours = {"cmap": "RdBu_r", "vmin": 0, "vmax": 2}
        names = {"xlabel": "step", "ylabel": "expert", "label": "load / mean load"}
        plots.heat(axes, run.loads[:, layer].T, **names, **colours)
        axes.set_title(f"{name}: layer {layer}")
    plots.show(fig, f"Loads of the experts in each step, {name}.")


draw_loads(unbalanced, "no balancing")
for layer, loads in enumerate(unbalanced.loads[LAST].mean(0)):
    best = loads.topk(4).values.sum() / E
    idle = (unbalanced.loads[:, layer] < 0.1).sum(-1)  # [steps]
    print(f"layer {layer}, at the end: the busiest expert has {loads.max():.1f} times the mean,")
    print(f"   the 4 busiest have {best:.0%} of all choices (if even, {4 / E:.0%})")
    print(f"   below a tenth of the mean: {idle.max()} experts in step {idle.argmax()},", end=" ")
    print(f"{(loads < 0.1).sum()} at the end")

# %% [markdown]
# White is the mean load, red twice as much or more, blue less. An expert that is chosen learns, so it gets better, and is chosen more, while others get hardly a token: this is called **routing collapse**. Here it is deepest early on. Some experts come back, but to the end a quarter of them does most of the work.
#
# Two things are lost:
#
# - **Time.** Large models keep each expert on some GPU. A layer is done when its busiest expert is: all GPUs wait for one.
# - **Parameters.** An expert without tokens has no gradient, and one with few learns little. You store all 16.
#
# What comes next: a number for imbalance, then two repairs. DeepSeek-V2 adds a loss to the cross-entropy (2405.04434, section 2.2.3). DeepSeek-V3 adds a bias to the scores, and almost no loss (2412.19437, section 2.1.2; the idea is from 2408.15664).

# %% [markdown]
# ## Exercise 1 · Loads as multiples of the mean
#
# *7 minutes · difficulty ●●○○○*
#
# Count the choices, sequence by sequence, and divide by the count of perfect balance, $A\,T/E$ (V3 report, eq. 18):
#
# $$f_i = \frac{E}{A\,T} \sum_{t=1}^{T} \mathbb{1}[\text{token } t \text{ chose expert } i]$$
#
# $\mathbb{1}[\ldots]$ is 1 where the statement is true, else 0. If $f_i = 1$ for all experts, balance is perfect; $f_i = 0$ is an idle expert.
#
# | name | shape | |
# |---|---|---|
# | `indices` | `[B, T, A]` | the chosen experts, numbers from 0 to $E - 1$ (int64) |
# | result | `[B, E]` | $f$ of each sequence, float32 |
#
# `counts.scatter_add_(-1, where, values)` adds each number of `values` to the place in `counts` that `where` names, row by row; a place that is named twice gets both.


# %%
def load_fractions(indices, n_experts):
    """The loads [B,E] of chosen experts [B,T,A], as multiples of the mean load."""
    # BEGIN SOLUTION
    chosen = indices.flatten(-2)
    counts = torch.zeros(len(chosen), n_experts)
    counts.scatter_add_(-1, chosen, torch.ones(chosen.shape))
    return counts * n_experts / chosen.shape[-1]
    # END SOLUTION


# %%
my_load_fractions = check(load_fractions)

# %% [markdown]
# ## Exercise 2 · One number: MaxVio
#
# *4 minutes · difficulty ●○○○○*
#
# The **maximal violation** says how far the busiest expert exceeds the mean load (2408.15664):
#
# $$\mathrm{MaxVio} = \frac{\max_i \mathrm{load}_i - \overline{\mathrm{load}}}{\overline{\mathrm{load}}}$$
#
# $\overline{\mathrm{load}}$ is the mean over the experts. 0 is perfect balance; a layer whose experts sit on GPUs of their own then takes $1 + \mathrm{MaxVio}$ times as long as a balanced one. The largest possible value is $E/A - 1$, here 7: all tokens choose the same two experts. Your function gets the loads of one layer, counts as float tensors; the cells below average over layers.


# %%
def max_violation(load):
    """MaxVio of the loads [E] of one layer, a 0-dim tensor."""
    # BEGIN SOLUTION
    return (load.max() - load.mean()) / load.mean()
    # END SOLUTION


# %%
my_max_violation = check(max_violation)

# %% [markdown]
# ### The floor under it
#
# Can MaxVio reach 0? Let a router choose $A$ different experts for each token at random, all equally likely. No router that looks at one token at a time is fairer, and yet some expert of a batch is the busiest, by luck. The next cell simulates that for several numbers of tokens. Read it before you compare two MaxVio: they must come from the same number of tokens.


# %%
def luck(tokens, draws=100):
    """The mean MaxVio of uniformly random choices."""
    found = []
    for _ in range(draws):
        chosen = torch.rand(1, tokens, E).topk(A).indices
        found.append(my_max_violation(my_load_fractions(chosen, E)[0]))
    return torch.stack(found).mean().item()


floor = luck(16 * T)
for tokens in (64, 256, 1024, 4096, 16384):
    draws = min(100, 400_000 // tokens)
    print(f"{tokens:6,} tokens at random: MaxVio {luck(tokens, draws=draws):.3f}")
print(f"without balancing, layer by layer, at the end: {unbalanced.max_vio[LAST].mean():.2f}")

# %% [markdown]
# Four times the tokens halve the floor: it is noise. Real text lies above it (the race shows how far), for its tokens are not independent: equal tokens tend to go the same way.
#
# ## Exercise 3 · A loss for balance
#
# *12 minutes · difficulty ●●●○○*
#
# The idea of V2: add to the cross-entropy what is large when loads are uneven. Counts have no gradient (a choice jumps), scores have one, so multiply the two:
#
# $$L = \alpha \sum_{i=1}^{E} f_i P_i, \qquad P_i = \frac{1}{T} \sum_{t=1}^{T} s'_{i,t}, \qquad s'_{i,t} = \frac{s_{i,t}}{\sum_j s_{j,t}}$$
#
# (V3 eq. 17-20, the **sequence-wise** form: one $L$ for each sequence, then the mean over all $B$.) $\alpha$ is a small factor, $P_i$ the mean share of expert $i$ in the scores. $f$ is a constant for the gradient: a share at a busy expert costs much, at an idle one little. A token's shares sum to 1, so the loss moves them from busy experts to idle ones. In perfect balance $L = \alpha$.

# %% [markdown]
# | name | shape | |
# |---|---|---|
# | `scores` | `[B, T, E]` | between 0 and 1, not yet normalised |
# | `indices` | `[B, T, A]` | the experts to count (V3 counts the $A$ best by $s$ alone, without the bias of exercise 4) |
# | `alpha` | a number | |
# | result | 0-dim | with a gradient to `scores` |


# %%
def balance_loss(scores, indices, alpha):
    """The sequence-wise balance loss, 0-dim, of scores [B,T,E] and chosen experts [B,T,A]."""
    # BEGIN SOLUTION
    f = my_load_fractions(indices, scores.shape[-1])
    P = (scores / scores.sum(-1, keepdim=True)).mean(-2)
    return alpha * (f * P).sum(-1).mean()
    # END SOLUTION


# %%
my_balance_loss = check(balance_loss)

# %% [markdown]
# ## Exercise 4 · No loss: a bias
#
# *6 minutes · difficulty ●●○○○*
#
# V3 leaves the scores alone and gives each expert a **bias** $b_i$. The $A$ experts with the largest $s_i + b_i$ are chosen; the gates, by which their outputs are weighted, are made of $s_i$ WITHOUT the bias (lesson 07). After each step (V3 section 2.1.2; $\gamma$ is the bias update speed):
#
# $$b_i \leftarrow b_i + \gamma \cdot \mathrm{sign}\left(\overline{\mathrm{load}} - \mathrm{load}_i\right)$$
#
# $\mathrm{sign}$ is $+1$, $-1$, or 0 for an expert with exactly the mean load.
#
# | name | shape | |
# |---|---|---|
# | `bias` | `[E]` | before the step; do not change it in place |
# | `load` | `[E]` | how many tokens each expert got in the step |
# | `rate` | a number | $\gamma$ |
# | result | `[E]` | the new bias |


# %%
def update_bias(bias, load, rate):
    """The bias [E] after a step in which the experts had `load` [E]."""
    # BEGIN SOLUTION
    return bias + rate * torch.sign(load.mean() - load)
    # END SOLUTION


# %%
my_update_bias = check(update_bias)

# %% [markdown]
# ## "How is the gate bias updated?"
#
# DeepSeek's public code only runs trained models; there is nothing in it that updates the bias, and so this is asked again and again. The answer in full:
#
# - **When:** once per training step, after the forward pass, never while a trained model is used.
# - **From what:** the choices of ALL tokens of the step's batch, added up over all GPUs.
# - **By how much:** by $\gamma$ up or down, by the sign alone.
# - **By whom:** not by the optimizer. Choosing has no gradient, and in the gates the bias does not occur; so it has no gradient at all, no momentum and no weight decay.
# - **Where it is kept:** in the checkpoint, as `e_score_correction_bias`, in float32: in bfloat16 a step of 0.001 is lost from a bias of 0.5 on.
#
# The next cell looks at minids' own gate.

# %%
gate = build(0).moe_layers()[0].gate
name = "e_score_correction_bias"
bias = getattr(gate, name)
print(f"parameters: {[n for n, _ in gate.named_parameters()]}, so an optimizer never sees the bias")
print(f"in the checkpoint: {list(gate.state_dict())}; asks for a gradient: {bias.requires_grad}")
print(f"0.5 + 0.001 in float32: {torch.tensor(0.5) + 0.001:.4f};", end=" ")
print(f"in bfloat16: {(torch.tensor(0.5).bfloat16() + 0.001).item():.4f}")
logits = torch.randn(1000, E)
bias.fill_(0.2)  # for all the same: no effect yet
before = gate.route(logits)
bias[3] += 0.3  # one expert more attractive
after = gate.route(logits)
for what, (chosen, gates, scores) in (("before", before), ("after", after)):
    print(f"{what}: expert 3 is chosen by {(chosen == 3).sum()} of 1,000 tokens", end="; ")
    used = scores.gather(1, chosen)
    same = torch.allclose(gates, used / used.sum(1, keepdim=True))
    print(f"the gates are the plain scores, normalised: {same}")

# %% [markdown]
# ## Explore: how fast should the bias move?
#
# No model here, only your two functions: a simulated gate whose logits (the scores before the sigmoid) stay as they are. Expert $i$ has a fixed advantage, drawn once and multiplied by `skew`; each token adds noise of its own. 300 steps of 1,000 tokens. At the left MaxVio over the steps, at the right the 16 biases.
#
# **Question:** at which $\gamma$ does MaxVio not come down to the dotted floor within 300 steps, for the biases are still on their way? At which does it stay above, for they oscillate? What does more `skew` do to both?
#
# <details><summary>Answer</summary>With 0.001 the biases move by 0.3 at most: just enough for a skew of 1, too little from 1.5 on. 0.003 arrives up to a skew of 2. 0.01 arrives sooner, and settles a little above the floor. At 0.03 it settles clearly above the floor, at 0.1 far above, however long you wait: each step throws busy experts below the mean and idle ones above it, and the next one back. More skew means a longer way, so a small γ needs more steps; and the oscillation grows too: compare where it ends with 0.03 for a skew of 0.5 and of 2.5.</details>


# %%
@functools.cache
def simulate(gamma, skew, steps=300, tokens=1000):
    """(MaxVio [steps], biases [steps, E]) of a gate with fixed advantages."""
    draw = torch.Generator().manual_seed(5)
    advantage = torch.randn(E, generator=draw)
    noise = torch.randn(8, tokens, E, generator=draw)
    scores = (skew * advantage + noise).sigmoid()  # eight batches, in turns
    bias, violations, biases = torch.zeros(E), [], []
    for step in range(steps):
        chosen = (scores[step % 8] + bias).topk(A).indices
        load = chosen.flatten().bincount(minlength=E).float()
        violations.append(my_max_violation(load).item())
        biases.append(bias)
        bias = my_update_bias(bias, load, gamma)
    return violations, torch.stack(biases)


# %%
def draw(figure, gamma, skew):
    violations, biases = simulate(gamma, skew)
    left, right = figure.subplots(1, 2)
    left.plot(violations, marker="", linewidth=1)
    left.axhline(luck(1000), color=plots.INK, linestyle=":")
    left.set(xlabel="step", ylabel="MaxVio", yscale="log", ylim=(0.08, 8))
    left.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    left.minorticks_off()
    left.set_title(f"last 50 steps: {sum(violations[-50:]) / 50:.2f} (dotted: by luck)")
    right.plot(biases, marker="", linestyle="-", linewidth=1)
    right.set(xlabel="step", ylabel="bias of each expert", title="simulated, fixed logits")


ranges = {"gamma": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3], "skew": (0.5, 2.5, 0.5)}
explore(draw, alt="MaxVio and biases over 300 simulated steps", size=(8, 3.4), **ranges)

# %% [markdown]
# ## The race
#
# Now real models: same data, same first weights, several **seeds** (the number that decides both), four ways to balance with YOUR functions (or the references, where a check did not pass):
#
# | | $\alpha$ | $\gamma$ |
# |---|---|---|
# | no balancing | 0 | 0 |
# | auxiliary loss | 0.01 | 0 |
# | bias | 0 | 0.005 |
# | strong loss | 1 | 0 |
#
# Why not V3's $\gamma = 0.001$ and $\alpha = 0.0001$? In 80 steps the one moves a bias by 0.08 at most; the gradient of the other would be tiny beside the prediction's (measured below).
#
# ### Your prediction
#
# You know MaxVio without balancing and the floor, for 1,024 tokens a step. To which MaxVio does the bias bring it, on average over the last 16 of the 80 steps? Write a number in place of `None`.

# %%
my_guess = None  # a MaxVio, such as 2
guess = predict("MaxVio with the bias, at the end of training?", my_guess)


# %%
def own_update(gate, rate):
    """What minids' gate does after a step, by your functions."""
    violation = my_max_violation(gate.load)
    new = my_update_bias(gate.e_score_correction_bias, gate.load, rate)
    gate.e_score_correction_bias.copy_(new)
    gate.load.zero_()
    return violation


def watch(model):
    """The model, with your functions, that notes in `routed` what its gates give."""
    model.routed = []
    for moe in model.moe_layers():
        moe.gate.register_forward_hook(lambda gate, given, result: model.routed.append(result))
        moe.gate.update_bias = functools.partial(own_update, moe.gate)
    return model


def both_losses(model, inputs, targets):
    """(cross-entropy, your balance loss for alpha = 1, summed over the layers)."""
    model.routed.clear()
    plain, _ = model.loss(inputs, targets)  # the config's own balance loss is switched off
    loss = 0.0
    for indices, _, scores in model.routed:
        scores, indices = (part.unflatten(0, inputs.shape) for part in (scores, indices))
        loss = loss + my_balance_loss(scores, indices, 1.0)
    return plain, loss


# %% [markdown]
# Each run is judged on 8,192 tokens of held-out files: loss in bits per byte as in lesson 01, and MaxVio over all of them. MaxVio in training is counted in each step, over its 1,024 tokens, and averaged over the last fifth of the steps. More tokens, a lower floor: compare each column with its own. The cell after the next prints a line for each run; together they take about a minute on two cores.

# %% tags=["nbval-ignore-output"]
unseen = minids.data.encode_files(text.tokenizer, text.corpus.heldout)
bytes_per_token = sum(map(len, text.corpus.heldout)) / len(unseen)
sample = minids.data.batch(unseen, 0, 0, 32, 256)


def with_alpha(alpha):
    """The loss to train on: cross-entropy plus alpha times the balance loss."""

    def loss(model, inputs, targets):
        plain, balance = both_losses(model, inputs[:, :T], targets[:, :T])
        return plain + alpha * balance, plain.detach()

    return loss


@torch.no_grad()
def judge(model):
    """(bits per byte, MaxVio) on the held-out sample."""
    nats, _ = both_losses(model, *sample)
    found = [my_max_violation(my_load_fractions(i[None], E)[0]) for i, *_ in model.routed]
    bits = minids.data.bits_per_byte(nats.item(), tokens=1, nbytes=bytes_per_token)
    return bits, torch.stack(found).mean().item()


# %% tags=["nbval-ignore-output"]
kinds = {"no balancing": (0, 0), "auxiliary loss": (0.01, 0), "bias": (0, 0.005)}
kinds["strong loss"] = (1, 0)  # (alpha, gamma)
runs, judged = {name: [] for name in kinds}, {name: [] for name in kinds}
for seed in range(SEEDS):
    for name, (alpha, rate) in kinds.items():
        if (name, seed) == ("no balancing", 0):
            run = unbalanced  # from the beginning of this lesson
            watch(run.model)
        else:
            run = train(watch(build(seed)), seed, with_alpha(alpha), rate)
        runs[name].append(run)
        judged[name].append(judge(run.model))
        print(f"seed {seed}, {name:14}: {judged[name][-1][0]:.4f} bits per byte,", end=" ")
        print(f"MaxVio {run.max_vio[LAST].mean():.2f} at the end", flush=True)

# %% tags=["nbval-ignore-output"]
print("mean of all seeds   bits/byte  MaxVio in training  held out  busiest expert")
ends = {name: torch.stack([run.max_vio[LAST].mean() for run in runs[name]]) for name in runs}
for name, pairs in judged.items():
    bits, held = torch.tensor(pairs).mean(0)
    print(f"{name:18} {bits:10.4f} {ends[name].mean():19.2f} {held:9.2f}", end="")
    print(f" {1 + ends[name].mean():8.1f} times the mean")
print(f"{'floor, by luck':18} {floor:30.2f} {luck(sample[0].numel(), draws=48):9.2f}")
halved = sum(ends["bias"] < ends["no balancing"] / 2).item()
print(f"the bias at least halves MaxVio with {halved} of {SEEDS} seeds")
by_seed = {name: torch.tensor([bits for bits, _ in pairs]) for name, pairs in judged.items()}
for name in ("no balancing", "auxiliary loss", "strong loss"):
    gaps = by_seed["bias"] - by_seed[name]
    spread = "the sign depends on the seed: not told apart"
    if gaps.min() > 0 or gaps.max() < 0:
        spread = f"{'worse' if gaps.min() > 0 else 'better'} with every seed"
    print(f"bias against {name}: {gaps.mean():+.4f} bits per byte, from", end=" ")
    print(f"{gaps.min():+.4f} to {gaps.max():+.4f}:")
    print(f"    {spread if not fast() else 'means nothing'}")
apart = max((bits.max() - bits.min()).item() for bits in by_seed.values())
print(f"one kind, other seeds: up to {apart:.4f} apart")
if not fast():
    guess.compare(ends["bias"].mean().item())

# %% tags=["nbval-ignore-output"]
fig, (left, right) = plots.figure(9, 3.8, columns=2)
for row, (name, found) in enumerate(runs.items()):
    style = {"color": plots.COLORS[row], "marker": plots.MARKERS[row]}
    curves = torch.stack([run.max_vio for run in found])
    left.plot(curves.mean(0), label=name, **style)
    left.fill_between(range(STEPS), *curves.aminmax(dim=0), color=plots.COLORS[row], alpha=0.2)
    bits = by_seed[name]
    right.plot(ends[name], bits, linestyle="", label=name, **style)
    right.plot(ends[name].mean(), bits.mean(), linestyle="", marker="+", color=plots.INK, ms=14)
ways = [torch.stack(list(values.values())) for values in (ends, by_seed)]  # [kinds, seeds]
right.plot(*ways, color=plots.GRID, marker="", linestyle="-", zorder=0)
left.axhline(floor, color=plots.INK, linestyle=":")
left.annotate("floor: by luck", (0, floor), xytext=(2, 4), textcoords="offset points")
right.axvline(floor, color=plots.INK, linestyle=":")
right.set(xlabel="MaxVio, end of training", ylabel="bits per byte, held out")
ticks = [0.1, 0.2, 0.5, 1, 2, 5]
left.set(yscale="log", ylim=(0.1, 8), yticks=ticks, yticklabels=ticks)
right.set(xscale="log", xlim=(0.1, 8), xticks=ticks, xticklabels=ticks)
_ = left.minorticks_off(), right.minorticks_off()
left.set(xlabel="step", ylabel="MaxVio", title="mean and range of all seeds")
right.set_title("each seed (+: mean): down and left is better")
fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plots.show(fig, "MaxVio over steps, and loss over MaxVio, for four ways to balance.")

# %% tags=["nbval-ignore-output"]
draw_loads(runs["auxiliary loss"][0], "auxiliary loss")
draw_loads(runs["bias"][0], "bias")

# %% [markdown]
# How to read this:
#
# - Compare points of the same seed (joined by a grey line): what a seed changes for all kinds alike cancels out.
# - "Better with every seed" is weak evidence with three seeds: luck alone puts one kind ahead with all three, this one or that, in one race out of four. "Not told apart" is a result too: no price in loss is seen. The strong loss shows how one looks.
# - What collapse itself costs in loss is small HERE: 16 experts of 32 columns, trained for seconds, beside a shared one that learns from all tokens.
# - MaxVio depends on $\gamma$ times the steps (how far a bias can go), on $\alpha$, on the number of experts (its largest value is $E/A - 1$), and on how many tokens are counted (the floor).

# %% [markdown]
# Published, for models of 1 billion parameters (2408.15664, table 2; read in a copy): perplexity 9.56 and MaxVio 0.72 with an auxiliary loss, 9.50 and 0.04 with the bias. (Perplexity is $e$ to the loss in nats per token.) Your race has the same direction in MaxVio. In loss?

# %% tags=["nbval-ignore-output"]
gain = math.log2(9.56 / 9.50)
gaps = by_seed["bias"] - by_seed["auxiliary loss"]
print(f"published gain by the bias: {gain:.4f} bits per token")
print(f"yours: {-gaps.mean() * bytes_per_token:+.4f} bits per token, from", end=" ")
print(f"{-gaps.max() * bytes_per_token:+.4f} to {-gaps.min() * bytes_per_token:+.4f} by seed")
model = runs["bias"][0].model
total, active = minids.accounting.parameters(model.cfg)
print(f"your models: {total:,} parameters, {active:,} of them active; {16 * T * STEPS:,} tokens")

# %% [markdown]
# The published gain is small. Where yours is of its size that is partly luck: look at its range over the seeds. Their models and their data are larger by orders of magnitude, their $\alpha$ and $\gamma$ are others, and MaxVio need not be counted over as many tokens; so only the direction can be compared.
#
# ## What the loss does to the router's gradient
#
# The paper's reason for having no loss: its gradient **interferes** with the cross-entropy's. Look at it. At the router's weights take $g_{ce}$, the gradient of the cross-entropy, and $g_{bal}$, that of the balance loss for $\alpha = 1$. Training follows $g_{ce} + \alpha\, g_{bal}$. Two angles tell the story: that between $g_{ce}$ and $g_{bal}$ (0°: they want the same, 180°: the opposite), and that by which the sum is turned away from $g_{ce}$. Random directions of 1,024 numbers are at 90°, give or take 2°.


# %% tags=["nbval-ignore-output"]
def angle(a, b):
    """Degrees between two gradients."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    return math.degrees(math.acos(cosine.item()))


def router_gradients(model, batches=4):
    """[(g_ce, g_bal)] at the router's weights of each layer, for several batches."""
    weights, pairs = [moe.gate.weight for moe in model.moe_layers()], []
    for number in range(batches):
        inputs, targets = minids.data.batch(text.tokens, 10_000 + number, 0, 16, T)
        plain, balance = both_losses(model, inputs, targets)
        ce = torch.autograd.grad(plain, weights, retain_graph=True)
        pairs += zip(ce, torch.autograd.grad(balance, weights), strict=True)
    return pairs


for name in ("no balancing", "auxiliary loss"):
    pairs = router_gradients(runs[name][0].model)
    print(f"model trained with {name}: g_ce and g_bal are apart by")
    for layer in (0, 1):
        between = [f"{angle(ce, bal):.0f}°" for ce, bal in pairs[layer::2]]
        print(f"   {', '.join(between)} in layer {layer} (a batch each)")
    for alpha in (0.001, 0.01, 0.1, 1):
        turned = sum(angle(ce, ce + alpha * bal) for ce, bal in pairs) / len(pairs)
        ratio = sum(alpha * bal.norm() / ce.norm() for ce, bal in pairs) / len(pairs)
        print(f"   alpha {alpha:5}: alpha g_bal is {ratio:5.2f} times as long as g_ce,", end=" ")
        print(f"the sum is turned by {turned:2.0f}°")

# %% [markdown]
# Most angles are nearer to 90° than to 0° or 180°: the larger part of $g_{bal}$ is sideways to the prediction. Beyond 94°, twice what chance gives, the rest works against the prediction; below 86° it works with it. The lengths decide: with a large $\alpha$ the router follows almost nothing but balance, the price of the strong loss in the race. With a small one the prediction leads, and more imbalance stays (its table). The bias has no gradient and pulls on no weight; what must be chosen for it is a speed, $\gamma$.

# %% [markdown]
# ## When does it not pay?
#
# - **Small batches.** Below some hundred tokens a step the sign follows luck: look at the floor for 64 tokens.
# - **Few experts, or one device.** If all experts are on one processor, nobody waits: the next cell.
# - **In use.** The bias is fixed then, and real texts may load experts differently than the training data did.
# - **$\gamma$ too large or too small**: the explorer.
# - **Balance is no quality.** Experts with even loads may still all learn the same.

# %% tags=["nbval-ignore-output"]
inputs, targets = minids.data.batch(text.tokens, 0, 0, 16, T)


def forward_and_backward(model):
    model.routed.clear()
    model.loss(inputs, targets)[0].backward()


models = {name: runs[name][0].model for name in ("no balancing", "bias")}
both = {name: functools.partial(forward_and_backward, model) for name, model in models.items()}
for name, seconds in machine.race(both, rounds=9).items():
    print(f"{name:12}: {1e3 * seconds:5.1f} ms for a step on this processor;", end=" ")
    print(f"one expert a device: {1 + ends[name].mean():.1f} times the least")

# %% [markdown]
# Run it again: which one is ahead, and by how much, changes. One processor does the work of all experts, and with or without balance that is the same work. What stands after the semicolon is arithmetic, for the experts alone: the busiest one's load.
#
# ## In the real DeepSeek
#
# | | yours | DeepSeek-V3 (2412.19437, section 4.2) |
# |---|---|---|
# | experts $E$, chosen $A$ | 16, 2 | 256, 8 |
# | bias update speed $\gamma$ | 0.005 | 0.001, then 0 for the last 500 billion of 14.8 trillion tokens |
# | sequence-wise loss, $\alpha$ | 0 | 0.0001 |
# | tokens dropped when an expert is full | none | none |
#
# The tiny loss stays because the bias looks at the whole batch only: a single sequence may still load few experts, and eq. 17 looks at each (section 2.1.2). $\gamma = 0$ freezes the biases.
#
# **Groups.** The 256 experts lie in 8 groups, and a token may choose from its best 4 groups only: each token is then sent to 4 machines at most (section 2.1.2). Balance keeps experts equally busy; the group limit bounds how far tokens travel.

# %% [markdown]
# ## To remember
#
# 1. The cross-entropy does not ask for balance; left alone, a router feeds few experts, and everyone waits for the busiest.
# 2. A balance loss pulls on the router's weights by a gradient that knows nothing of the prediction; $\alpha$ trades one for the other.
# 3. V3's bias moves by $\pm\gamma$ once a step, by the sign of the load's deviation, counts for the choice alone, and has no gradient.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** An expert's load is three times the mean. What happens to its bias?
# <details><summary>it falls by γ</summary>Yes: the sign of mean minus load is −1, however large the difference.</details>
# <details><summary>it falls by 2γ</summary>No: the size of the deviation does not count.</details>
#
# **2.** Why must the bias stay out of the gates?
# <details><summary>the outputs would be weighted by how idle an expert was</summary>Yes: a gate says how well an expert fits. The bias says how busy it was.</details>
# <details><summary>the gates would no longer sum to 1</summary>No: they are normalised after the choice, with a bias or without.</details>
#
# **3.** MaxVio is 0.15 over 1,024 tokens and 0.04 over 16,384. Did balance improve?
# <details><summary>yes, by a factor of almost 4</summary>No: both are what luck alone gives with 16 experts and 2 choices.</details>
# <details><summary>no, both are at their floor</summary>Yes: compare MaxVio at one number of tokens, or each with its own floor.</details>
#
# **4.** What is the balance loss for perfectly even loads?
# <details><summary>0</summary>No: all f are 1 and the shares P sum to 1, so it is α.</details>
# <details><summary>α</summary>Yes, for each layer, whatever E and A are.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Train three times from a shell, each time for `--minutes 5` unless you say otherwise: `python -m minids.train --balance none --checkpoint-every 3600 --out A`, with `--balance bias` into `B`, with `--balance loss` into `C`. Compare the heat maps in `loss.png`, and read `log.jsonl`: `from minids import report; rows = report.read_log("A/log.jsonl")`; a row has `step`, `max_vio` and `loads`, means over 10 steps (a checkpoint would end a row early: hence 3600 seconds). After how many steps is the bias at half of MaxVio without balancing? The loss?
#    <details><summary>Expected</summary>Here the bias moves by 0.001 a step. For the way that it could go in the race, 80 · 0.005 = 0.4, it needs 0.4/0.001 = 400 steps. The loss, with α = 0.01, pulls from the first step on: expect C to be ahead of B at first.</details>
# 2. In `own_update`, move the bias by the relative deviation instead of its sign, $b_i \leftarrow b_i + \gamma\,(\overline{\mathrm{load}} - \mathrm{load}_i)/\overline{\mathrm{load}}$, and find the $\gamma$ at which it does as well. Three seeds. With both rules at their $\gamma$: which stays calmer with 64 tokens a step (`inputs[:1, :T]` and `targets[:1, :T]` in `with_alpha`)? Judge on held-out text: 64 tokens have another floor.
#    <details><summary>Expected</summary>The sign moves every bias by γ. The relative deviation moves it by γ upwards at most (an idle expert), by (E/A − 1) γ = 7γ downwards at most, and by little near balance: so it needs the larger γ. With 64 tokens, all of one text, loads deviate more in every step, and its steps grow with them, the sign's do not: expect the sign to be the calmer one.</details>

# %%
status()
