# ---
# title: Mixture of experts
# promise: You build the router and the layer of DeepSeekMoE, give a small model five times the parameters for the same arithmetic, and find out when that wins by the clock.
# minutes: 75
# difficulty: 3
# needs: [torch]
# objectives:
#   - feel what a parameter costs in arithmetic, in memory and in time, and count total and active ones
#   - choose a few groups of experts for each token, without the trap that public code fell into
#   - build DeepSeek-V3's router, where a bias chooses and never weighs
#   - build the whole layer, equal to that of minids
#   - race it against a dense model with equal active parameters, by steps and by seconds, with the seeds' spread
# ---

# %%
import functools
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

import minids
from minids import accounting, data, layers, optim
from minids.lab import check, explore, fast, hint, load_text, machine, plots, predict, status
from minids.moe import reference

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: every parameter is multiplied
#
# The **feed-forward** of lesson 01, a SwiGLU of width $W$, holds most of a language model's parameters: three matrices, $3DW$ numbers. Each token is multiplied with all of them, two **FLOPs** (a multiplication and an addition) per parameter. With $W$ four times as wide, each token costs four times the arithmetic, also one that needs nothing of what was added.
#
# A **mixture of experts** (MoE) splits the wide layer into many narrow ones, the **experts**. A small matrix, the **router**, picks a few of them for each token; the others stay idle. So the model has the parameters of the wide layer, and nearly the arithmetic of the narrow one. Measured: widths $W$ and $4W$, and 16 experts a quarter of $W$ wide, of which each token visits 4: one **shared** expert, which all tokens visit, and 3 that the router picks for it among 15 **routed** ones.

# %% tags=["nbval-ignore-output"]
D, W = 512, 1024
tokens = 256 if fast() else 2048
wide_cfg = minids.ModelConfig(
    hidden_size=D, moe_intermediate_size=W // 4,
    n_routed_experts=15, num_experts_per_tok=3, n_shared_experts=1,
)  # fmt: skip
rivals = {
    "dense, W": layers.SwiGLU(D, W),
    "dense, 4W": layers.SwiGLU(D, 4 * W),
    "16 experts": minids.moe.MoE(wide_cfg).eval(),
}
x = torch.randn(1, tokens, D)
with torch.no_grad():
    times = machine.race({name: functools.partial(layer, x) for name, layer in rivals.items()})
for name, layer in rivals.items():
    size = sum(p.numel() for p in layer.parameters())
    idle = 12 / 15 * sum(p.numel() for p in layer.experts.parameters()) if "16" in name else 0
    print(f"{name:10}: {size / 1e6:.2f} million parameters", end=", ")
    print(f"{2 * (size - idle) / 1e6:5.2f} MFLOP per token", end=", ")
    print(f"{1e3 * times[name]:6.1f} ms, {times[name] / times['dense, W']:.2f} times W")

# %% [markdown]
# Three prices stand in that table. The memory of the experts is that of $4W$: all must be there. Their arithmetic is nearly that of $W$; the router adds a little. The time is another matter: it holds what no FLOP counts, such as sorting tokens by expert and many small products instead of one large.
#
# (The weights are random: what experts are good for shows only in training.)
#
# ### Your prediction
#
# Below, two small models train on the same text: a dense one, and one with 64 experts, with equal arithmetic per token. An MoE's step takes longer, so in the same **seconds** it makes fewer. When both have trained for the same seconds, less than a minute, how many bits per byte will the MoE be ahead? Negative means behind; both end far below 8, which is the text stored as it is. Write a number in place of `None`.

# %%
my_guess = None  # bits per byte, such as 0.1 or -0.1
guess = predict("At equal seconds, how far is the MoE ahead?", my_guess, "bits per byte")

# %% [markdown]
# ## What a layer of experts is
#
# For a token $t$ with hidden state $u_t$ (DeepSeek-V3 report, 2412.19437, eq. 12; 2401.06066 introduced it):
#
# $$h_t = u_t + \sum_{\text{shared } s} \mathrm{FFN}_s(u_t) + \sum_{\text{chosen } i} g_{i,t}\, \mathrm{FFN}_i(u_t)$$
#
# Each $\mathrm{FFN}$ is one expert, a SwiGLU of width $F$. Shared experts see every token, for what all of them need. The router chooses among the routed ones, and gives each chosen one a **gate** $g$, the weight of its result.
#
# | letter | meaning | field of the config |
# |---|---|---|
# | $M$ | tokens, all sequences of a batch in one row | |
# | $D$ | width of a hidden state | `hidden_size` |
# | $E$ | routed experts | `n_routed_experts` |
# | $A$ | experts that a token chooses ("top-k") | `num_experts_per_tok` |
# | $S$ | shared experts | `n_shared_experts` |
# | $F$ | width of one expert | `moe_intermediate_size` |

# %% [markdown]
# ## Exercise 1 · Total and active
#
# *6 minutes · difficulty ●○○○○*
#
# A parameter is **active** for a token if the token is multiplied with it, or the choice needs it. "671 billion, 37 billion active" are these two numbers for DeepSeek-V3. What is in one layer, and which of it is active?
#
# | part | how many | size of one |
# |---|---|---|
# | router | 1 | a matrix $[E, D]$, and a bias of $E$ numbers |
# | shared experts | $S$ | a SwiGLU: gate and up $[F, D]$, down $[D, F]$ |
# | routed experts | $E$, of which a token visits $A$ | the same |
#
# The router belongs to both numbers: every token is compared with all experts. (The bias comes in exercise 3.)


# %%
def moe_parameters(cfg):
    """(total, active) parameters of one MoE layer of the config `cfg`."""
    # BEGIN SOLUTION
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    for_all = cfg.n_routed_experts * (cfg.hidden_size + 1) + cfg.n_shared_experts * expert
    return for_all + cfg.n_routed_experts * expert, for_all + cfg.num_experts_per_tok * expert
    # END SOLUTION


# %%
my_moe_parameters = check(moe_parameters)

# %%
published = ["deepseek-v2-lite", "deepseek-v3", "moonlight-16b-a3b", "kimi-k2"]
for name in published:
    cfg = minids.ModelConfig.preset(name)
    total, active = my_moe_parameters(cfg)
    whole = accounting.parameters(cfg)
    print(f"{name:18} a layer {total / 1e9:6.3f} billion, {active / 1e9:.3f} active", end="; ")
    print(f"the model {whole.total / 1e9:7.1f}, {whole.active / 1e9:4.1f} active")

# %% [markdown]
# (V2-Lite's router has no bias; your count adds 64 numbers for it. The active parameters of a whole model here hold the head and not the input embedding, which is looked up, not multiplied.)
#
# ## Why so many small ones?
#
# Cut each expert into four of a quarter of the width, and choose four times as many: parameters and arithmetic stay the same. What grows is the number of different teams that a token can be given to. $C(n, k)$ is the number of ways to choose $k$ of $n$:

# %%
for finer in (1, 2, 4, 8):
    E, A = 16 * finer, 2 * finer
    print(f"{A:2d} of {E:3d} experts, each 1/{finer} as wide: {math.comb(E, A):>26,} teams")

# %% [markdown]
# That is the argument for **fine-grained** experts in 2401.06066; the first and the third line are its example. With few large experts each must know several unrelated things; with many small ones, knowledge can be divided more finely and combined more freely. A **shared** expert takes what all would otherwise learn again.
#
# The paper's own measurement, loss on the Pile (a collection of texts), lower is better; Switch and GShard are older MoEs of few large experts, from which a token chooses one or two:
#
# | | loss |
# |---|---|
# | dense | 2.060 |
# | Switch (top-1) | 1.881 |
# | GShard (top-2) | 1.867 |
# | DeepSeekMoE (fine-grained, shared) | 1.808 |
#
# From dense to any MoE is the larger step there, and fine grain the smaller. But the dense model of this table is not as large as DeepSeekMoE, which has 2 billion parameters: a dense model with as many in TOTAL is the upper bound, says the paper's abstract, and DeepSeekMoE "nearly approaches" it.

# %% [markdown]
# ## Exercise 2 · Few groups for each token
#
# *10 minutes · difficulty ●●●○○*
#
# V3's parameters take 1,342 GB in bfloat16; 8 cards of 80 GB hold 640. So in training V3 puts a **group** of its 256 experts on each of 8 machines, and lets a token go to 4 groups at most, so that its hidden state travels to few machines (V3 section 2.1.2). Each expert has a **score** for each token; where scores come from is exercise 3. To choose, a **bias** is added to them (exercise 3 too), which can make them negative: these sums are `biased`. One token, 12 experts in 3 groups, of which 2 may stay (bold: a group's two best):
#
# | group 0 | | | | group 1 | | | | group 2 | | | |
# |---|---|---|---|---|---|---|---|---|---|---|---|
# | −.2 | **−.1** | **−.1** | −.9 | **.0** | −.9 | −.8 | **−.8** | −.9 | **−.3** | **−.2** | −.4 |
# | sum: | −.2 | | stays | sum: | −.8 | | −∞ | sum: | −.5 | | stays |
#
# A group's score is the sum of its TWO best scores; the best `topk_group` groups stay as they are. Group 1 has the best expert of all, and goes.

# %% [markdown]
# | name | shape | meaning |
# |---|---|---|
# | `biased` | `[M, E]` | scores to choose by, any sign |
# | `n_group` | a number | groups, $n$ of them, each of $E / n$ NEIGHBOURS |
# | `topk_group` | a number | how many stay |
# | result | `[M, E]` | the scores, $-\infty$ in the groups that go |
#
# Tools: `x.unflatten(-1, (a, b))` cuts the last dimension into two, `-1` for "what is left"; `x.flatten(-2)` joins the last two; `x.topk(k, -1)` has the $k$ largest as `.values` and their places as `.indices`; `mask.scatter(-1, places, value)` writes at places; `x.masked_fill(mask, value)` writes where the boolean mask is True. Stuck? `hint("group_limit")`.


# %%
def group_limit(biased, n_group, topk_group):
    """Biased scores [M, E], -inf outside each token's best topk_group groups."""
    # BEGIN SOLUTION
    groups = biased.unflatten(-1, (n_group, -1))
    sums = groups.topk(2, -1).values.sum(-1)
    stay = sums.topk(topk_group, -1).indices
    gone = torch.ones_like(sums, dtype=torch.bool).scatter(-1, stay, False)
    return groups.masked_fill(gone.unsqueeze(-1), float("-inf")).flatten(-2)
    # END SOLUTION


# %%
my_group_limit = check(group_limit)

# %% [markdown]
# ### The trap
#
# Why $-\infty$, would 0 not do? V3's scores are sigmoids (exercise 3), which are never negative. But with the bias a score can be; then 0 is a high score, and experts of closed groups win. The library transformers filled with 0 up to version 5.5.4 (its issue 45440), and vLLM once did (pull request 13474).
#
# A test: lower ALL biases by the same amount. Nothing may change, for every expert loses alike. The next cell does it with 256 experts in 8 groups, of which 4 stay, and lets each token choose 8.

# %%
scores = torch.randn(2000, 256).sigmoid()
right = my_group_limit(scores, 8, 4).topk(8, -1).indices
for bias in (0.0, -0.5, -0.7, -0.8, -0.9, -1.0):
    limited = my_group_limit(scores + bias, 8, 4)
    chosen = limited.topk(8, -1).indices
    same = (chosen.sort(-1).values == right.sort(-1).values).all(-1).float().mean()
    zeros = limited.masked_fill(limited.isinf(), 0.0)
    strayed = limited.gather(-1, zeros.topk(8, -1).indices).isinf().any(-1).float().mean()
    print(f"bias {bias:4.1f}: by -inf {same:6.1%} of the tokens choose as before", end="; ")
    print(f"by 0 {strayed:6.1%} go to a closed group")

# %% [markdown]
# So the mistake hides well: while a token's best scores are positive nothing is wrong, then suddenly everything. And nothing crashes: the model answers a little worse, and tokens travel to machines that should not see them.
#
# ## Exercise 3 · The router
#
# *10 minutes · difficulty ●●●○○*
#
# With $s_{i,t}$ the **score** of expert $i$ for token $t$, $e_i$ row $i$ of the router's matrix, and a bias $b_i$ for each expert (V3 eq. 13 to 16):
#
# $$s_{i,t} = \mathrm{sigmoid}(u_t \cdot e_i), \qquad \text{choose the } A \text{ largest } s_{i,t} + b_i, \qquad g_{i,t} = \mathrm{factor} \cdot \frac{s_{i,t}}{\sum_{\text{chosen } j} s_{j,t}}$$
#
# The bias decides WHO is chosen and has no part in the gates: it is there to keep all experts equally busy, and is moved a little after every step (lesson 08), not learned. If it were in the gates, balancing would change what the model computes. The choice passes through `group_limit`. The factor is not in the report's equations; it stands in V3's config (2.5), and makes the routed sum larger beside the shared experts.

# %% [markdown]
# | name | shape | meaning |
# |---|---|---|
# | `logits` | `[M, E]` | $u_t \cdot e_i$ |
# | `bias` | `[E]` | $b_i$ |
# | `top_k` | a number | $A$ |
# | `n_group`, `topk_group` | numbers | for `my_group_limit` |
# | `factor` | a number | `routed_scaling_factor` |
# | result | `[M, A]`, `[M, A]` | indices of the chosen, largest BIASED score first (as `topk` gives them), and their gates |
#
# `scores.gather(-1, indices)` picks, in each row, what stands at its indices. With `n_group` 1 there is nothing to limit: skip it, the race below will be faster. Stuck? `hint("route")`.


# %%
def route(logits, bias, top_k, n_group, topk_group, factor):
    """Indices [M, A] of the chosen experts, best first, and their gates [M, A]."""
    # BEGIN SOLUTION
    scores = logits.sigmoid()
    allowed = scores + bias
    if n_group > 1:
        allowed = my_group_limit(allowed, n_group, topk_group)
    indices = allowed.topk(top_k, -1).indices
    gates = scores.gather(-1, indices)
    return indices, factor * gates / gates.sum(-1, keepdim=True)
    # END SOLUTION


# %%
my_route = check(route)

# %% [markdown]
# ## Exercise 4 · The layer
#
# *14 minutes · difficulty ●●●○○*
#
# Both sums of eq. 12, without $u_t$, which the block around it adds. Go through the experts one after the other: which tokens chose this one, and at which of their $A$ places?
#
# | name | shape | meaning |
# |---|---|---|
# | `x` | `[M, D]` | tokens |
# | `indices`, `gates` | `[M, A]` | of the router |
# | `gate_up_proj` | `[E, 2F, D]` | of each expert: $F$ rows of gate, then $F$ of up |
# | `down_proj` | `[E, D, F]` | of each expert |
# | `shared` | three matrices | gate, up, down of ONE SwiGLU as wide as all shared experts together |
# | result | `[M, D]` | |
#
# $\mathrm{FFN}(x) = W_{down}\,(\mathrm{silu}(W_{gate}\,x) \cdot W_{up}\,x)$; mind that the gate of a SwiGLU and the gates $g$ share only the name. $S$ experts side by side are one of width $S F$: no one chooses between them.

# %% [markdown]
# Tools: `F.linear(x, w)`; `y.chunk(2, -1)` halves the last dimension; `layers.swiglu(x, *shared)`; `token, place = (indices == e).nonzero(as_tuple=True)` gives two rows of numbers, the tokens that chose expert `e` and the places where (both are empty if none did); `out.index_add(0, token, y)` gives `out` with row `y[j]` added to row `token[j]`. Stuck? `hint("moe_forward")`.


# %%
def moe_forward(x, indices, gates, gate_up_proj, down_proj, shared):
    """Shared experts plus the gated sum of the chosen ones, [M, D], of x [M, D]."""
    # BEGIN SOLUTION
    out = layers.swiglu(x, *shared)
    for expert in range(gate_up_proj.shape[0]):
        token, place = (indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up_proj[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down_proj[expert])
        out = out.index_add(0, token, y * gates[token, place, None])
    return out
    # END SOLUTION


# %%
my_moe_forward = check(moe_forward)

# %% [markdown]
# ## Your layer
#
# All three together, with the weights of a layer of minids: 32 experts in 8 groups, 4 groups and 6 experts for a token, 2 shared experts, a bias. Both should give the same. minids has no loop over experts: it sorts the tokens by expert and multiplies all groups in one call (lesson 09 builds that). The loop makes several small calls for each expert; the second cell shows what that costs here, against minids.


# %%
def my_moe(moe, x):
    """The layer `moe` of minids with your functions: x [M, D] to [M, D]."""
    cfg, gate, experts, own = moe.cfg, moe.gate, moe.experts, moe.shared_experts
    limits = cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group, cfg.routed_scaling_factor
    indices, gates = my_route(F.linear(x, gate.weight), gate.e_score_correction_bias, *limits)
    shared = own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight
    return my_moe_forward(x, indices, gates, experts.gate_up_proj, experts.down_proj, shared)


sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 32}
sizes |= {"num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 8, "topk_group": 4}
layer = minids.moe.MoE(minids.ModelConfig(**sizes, routed_scaling_factor=2.5)).eval()
x = torch.randn(2048, 64)
with torch.no_grad():
    for weight in layer.parameters():
        weight.copy_(torch.randn_like(weight) / 8)
    layer.gate.e_score_correction_bias.copy_(-1.5 * torch.rand(32))
    error = minids.numerics.relative_error(my_moe(layer, x), layer(x[None])[0])
    clock = machine.race({"yours": lambda: my_moe(layer, x), "minids": lambda: layer(x[None])})
print(f"largest difference: {error:.0e} of the size of the result")
assert error < 1e-5, "the layer is not yours all through: run the cells above again, in order"

# %% tags=["nbval-ignore-output"]
for name, seconds in clock.items():
    print(f"{name}: {1e3 * seconds:.1f} ms for 2,048 tokens")

# %% [markdown]
# ## The race
#
# Two models of one layer, $D = 64$, two heads of plain attention, the text of lesson 01. They differ in the feed-forward alone:
#
# - **MoE**: 64 experts of width 32, top-3, one shared expert;
# - **dense**: as wide as it takes to have as many ACTIVE parameters, the router's included.
#
# So each token costs both the same arithmetic; the MoE only has more parameters. The vocabulary is small, 300 tokens, most of them single bytes: the network itself must put words together. (With 2,048 tokens much of that is in the vocabulary already; homework 1 asks what then remains of the gap.)
#
# Reading the text takes some seconds.

# %% tags=["nbval-ignore-output"]
text = load_text(vocab_size=300)
unseen = data.encode_files(text.tokenizer, text.corpus.heldout)
bytes_per_token = sum(map(len, text.corpus.heldout)) / len(unseen)
sample = data.batch(unseen, 0, 0, 8 if fast() else 128, 64)  # held-out pieces of 64 tokens
common = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "attention": "mha"}
common |= {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 0}
experts = {"n_routed_experts": 64, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
moe = minids.ModelConfig(**common, **experts)
_, active = my_moe_parameters(moe)
dense = minids.ModelConfig(**common, n_routed_experts=0, intermediate_size=round(active / (3 * 64)))
configs = {"dense": dense, "MoE": moe}
for name, cfg in configs.items():
    size = accounting.parameters(cfg)
    flops = accounting.train_flops_per_token(cfg, 64)
    print(f"{name:5}: {size.total:,} parameters, {size.active:,} active", end=", ")
    print(f"{flops / 1e3:.0f} kFLOP of training per token")
print(f"{bytes_per_token:.2f} bytes in a token")

# %% [markdown]
# A machine is not equally fast all the time, and others may use it. So both models train side by side: whoever has used less time takes the next step. At every moment they have had the same seconds. Every 25 steps each is tested on held-out text, with the clock stopped.
#
# The learning rate is constant after 20 steps. With the usual fall to zero only the end of a run could be compared; so every point of a curve can. Rate and sizes are the same for both, tuned for neither. The MoE chooses with YOUR router (or the reference); its experts are computed by minids.


# %%
@torch.no_grad()
def bits(model):
    """Bits per byte on the held-out sample."""
    model.eval()
    _, nats = model.loss(*sample)  # per token
    model.train()
    return data.bits_per_byte(nats.item(), tokens=1, nbytes=bytes_per_token)


def routed(gate, logits):
    """What a gate of minids gives, by your router: indices, gates and plain scores."""
    cfg = gate.cfg
    limits = cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group, cfg.routed_scaling_factor
    return *my_route(logits, gate.e_score_correction_bias, *limits), logits.sigmoid()


# %%
class Run:
    """One model in training; `curve` has (seconds, steps, held-out bits per byte)."""

    def __init__(self, cfg, seed, rate=0.007):
        torch.manual_seed(seed)
        self.model, self.seed, self.rate = minids.Transformer(cfg).train(), seed, rate
        for layer in self.model.moe_layers():
            layer.gate.route = functools.partial(routed, layer.gate)
        self.optimizers = optim.build_optimizers(self.model, rate, rate, weight_decay=0.1)
        self.seconds, self.steps, self.curve = 0.0, 0, []

    def step(self):
        began = time.perf_counter()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.rate * min(1, (self.steps + 1) / 20)
        self.model.loss(*data.batch(text.tokens, self.steps, self.seed, 32, 64))[0].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.model.update_expert_bias(0.001)  # towards equal load, lesson 08
        self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + 1
        if self.steps % EVERY == 0:
            self.curve.append((self.seconds, self.steps, bits(self.model)))


# %% [markdown]
# The cell takes its time, a minute or more on two cores, and prints a line for each seed.

# %% tags=["nbval-ignore-output"]
STEPS, SEEDS, EVERY = (12, 2, 3) if fast() else (400, 3, 25)
if fast():
    print("MINIDS_FAST is set: 12 steps instead of 400, so the figures below mean nothing")
runs = []
for seed in range(SEEDS):
    pair = {name: Run(cfg, seed) for name, cfg in configs.items()}
    while pair["MoE"].steps < STEPS or pair["dense"].steps < STEPS:
        min(pair.values(), key=lambda run: run.seconds).step()
    runs.append({name: np.array(run.curve).T for name, run in pair.items()})
    words = [f"{name} {run.steps} steps, {run.curve[-1][2]:.3f}" for name, run in pair.items()]
    print(f"seed {seed}, {pair['MoE'].seconds:.1f} s each: {'; '.join(words)}", flush=True)

# %% tags=["nbval-ignore-output"]
fig, panels = plots.figure(8, 3.6, columns=2)
for number, kind in enumerate(configs):
    look = {"color": plots.COLORS[number], "linestyle": plots.DASHES[number], "marker": ""}
    for seed, pair in enumerate(runs):
        seconds, steps, loss = pair[kind]
        share = 100 * seconds / pair["MoE"][0, -1]
        for axes, x in zip(panels, (steps, share), strict=True):
            axes.plot(x, loss, label=kind if seed == 0 else "_", linewidth=1, **look)
panels[0].set(xlabel="steps", ylabel="bits per byte, held out")
panels[1].set(xlabel="seconds, in percent of the race")
panels[0].legend(loc="upper right")
plots.show(fig, "Held-out loss of dense and MoE over steps and over time, for each seed.")

# %% [markdown]
# The two pictures show the same runs. Left, at equal steps, both have read the same text, and a token cost the same arithmetic. Right, at equal seconds, the dense model has read more (the right edge is the time that a seed's MoE took for all its steps). The lines lie close, so the next figure shows their difference: **MoE minus dense**, seed by seed, at each test of the MoE.


# %%
def gaps(pair):
    """(the MoE's steps, its bits minus dense's at equal steps, and at equal seconds)."""
    (seconds, steps, loss), other = pair["MoE"], pair["dense"]
    by_steps = loss - np.interp(steps, other[1], other[2])
    by_seconds = loss - np.interp(seconds, other[0], other[2])
    by_seconds[seconds < other[0][0]] = np.nan  # the dense model was not tested yet
    return steps, by_steps, by_seconds


tested = min(pair["MoE"].shape[1] for pair in runs)
steps = runs[0]["MoE"][1][:tested]
gap = {"equal steps": [gaps(pair)[1][:tested] for pair in runs]}
gap["equal seconds"] = [gaps(pair)[2][:tested] for pair in runs]

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(7.5, 3.8)
for number, (name, lines) in enumerate(gap.items()):
    look = {"color": plots.COLORS[number + 2], "linestyle": plots.DASHES[number]}
    for seed, line in enumerate(lines):
        axes.plot(steps, line, marker="", label=name if seed == 0 else "_", **look)
axes.axhline(0, color=plots.INK, linewidth=1)
axes.set(xlabel="steps of the MoE", ylabel="MoE minus dense, bits per byte")
axes.set_title("below the line the MoE is better")
axes.legend(loc="upper right")
plots.show(fig, "The loss of the MoE minus that of the dense model over the MoE's steps.")

# %% tags=["nbval-ignore-output"]
spread = max(np.ptp([pair[kind][2][:tested][-1] for pair in runs]) for kind in configs)
for name, lines in gap.items():
    last = np.array(lines)[:, -1]
    if fast():
        words = "means nothing after 12 steps"
    elif last.max() < 0 or last.min() > 0:
        words = f"{'MoE' if last.max() < 0 else 'dense'} is better with every seed"
    else:
        words = "the seeds do not agree: this race does not tell them apart"
    print(f"{name:13}: {last.mean():+.3f}, from {last.min():+.3f} to {last.max():+.3f}: {words}")
    behind = np.flatnonzero(~(np.mean(lines, axis=0) < 0))  # tests at which the MoE is not ahead
    turn = behind[-1] + 1 if behind.size else 0
    after = f"the MoE is ahead on average from its step {steps[min(turn, tested - 1)]:.0f} on"
    print(f"{'':13}  {after if turn < tested else 'the MoE is not ahead on average'}")
print(f"one kind, same steps, other seeds: up to {spread:.3f} apart")
slower = np.mean([p["MoE"][0][-1] / p["MoE"][1][-1] for p in runs])
slower /= np.mean([p["dense"][0][-1] / p["dense"][1][-1] for p in runs])
print(f"a step of the MoE takes {slower:.2f} times as long as a dense one")
if not fast():
    guess.compare(-float(np.mean(np.array(gap["equal seconds"])[:, -1])))

# %% [markdown]
# How to read this:
#
# - At equal steps nothing is paid for the parameters but memory. That is the comparison of most papers.
# - At equal seconds the dense model is ahead first: it makes more steps, and early on more text is worth more than more parameters. What counts is where the line crosses zero, if it does: later, knowing more is worth more. On a slower machine, or one where small products cost more, the crossing comes later, or after the end of the race.
# - Three seeds that agree would do so by luck in one race out of four, if the kinds were equal; the size of the gap beside the seeds' spread says more.
#
# This is one tiny model on one processor. The published gap stands above exercise 2; DeepSeek-V3 trained on 14.8 trillion tokens, very far to the right of this picture.

# %% [markdown]
# ## Where does the time go?
#
# The same arithmetic, and still slower. The next cell takes the layer of the race apart, forwards only, with random numbers: 2,048 tokens, 6,144 visits to experts (3 each), about 96 rows for each of 64 experts. "One product" is what a dense layer does with the FLOPs of the first grouped product.

# %% tags=["nbval-ignore-output"]
M, D, E, A, width = 2048, 64, 64, 3, 32
x, logits, bias = torch.randn(M, D), torch.randn(M, E), torch.zeros(E)
router, weights = torch.randn(E, D), torch.randn(E, 2 * width, D) / 8
indices, _ = my_route(logits, bias, A, 1, 1, 1.0)
plan = reference.dispatch_plan(indices, E)
rows, out = x[plan.token], torch.randn(M * A, D)


def grouped():
    """All experts' gate and up in one call, one product of about 96 rows each."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=plan.ends)


parts = {
    "router's scores": lambda: F.linear(x, router),
    "choice and gates": lambda: my_route(logits, bias, A, 1, 1, 1.0),
    "sort by expert": lambda: reference.dispatch_plan(indices, E),
    "copy the rows": lambda: x[plan.token],
    "64 small products": grouped,
    "one product instead": lambda: F.linear(rows, weights[0]),
    "back, and add up": lambda: out[plan.place].sum(1),
}

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    clock = machine.race(parts, rounds=9)
fig, axes = plots.figure(7, 3.2)
plots.bars(axes, {name: 1e3 * seconds for name, seconds in clock.items()}, unit="ms")
axes.set(xlabel="ms")
plots.show(fig, "Milliseconds of each part of the MoE layer of the race.")
useful = clock["one product instead"]
extra = sum(clock[name] for name in parts if "product" not in name)
print(f"small products: {clock['64 small products'] / useful:.1f} times one of as many FLOPs")
print(f"choosing, sorting, copying and adding: {extra / useful:.1f} times that product")

# %% [markdown]
# Which part is the largest depends on machine and sizes; with wide experts the products outgrow everything else, for they grow with $D \cdot F$, and choosing and copying with $D$. That is one reason why an MoE pays more in large models. On a GPU kernels fuse these parts (lesson 09).
#
# ## Explore: the same arithmetic, spent in other ways
#
# Take DeepSeek-V3 (where the sliders start), and keep the arithmetic of its experts: $(A + S) \cdot F = 18{,}432$ columns for each token. Choose $E$, $A$ and $S$; $F$ follows.
#
# **Questions.** Double $A$: what happens to the total, and why? Which slider moves the number of ACTIVE parameters? How many experts fit into 8 cards of 141 GB in bfloat16?
#
# <details><summary>Answers</summary>With A = 16 the experts are about half as wide, so the total nearly halves; to keep it, E must double too. None moves the active ones by much: only E adds rows to the router, and F is rounded. 8 cards hold 1,128 GB: 192 experts fit (with A = 8 and S = 1), 224 do not.</details>


# %%
def team(experts, top_k, shared):
    """DeepSeek-V3 with other experts, as wide as its arithmetic allows."""
    changes = {"n_routed_experts": experts, "num_experts_per_tok": top_k, "n_group": 1}
    changes |= {"moe_intermediate_size": 9 * 2048 // (top_k + shared), "topk_group": 1}
    return minids.ModelConfig.preset("deepseek-v3", **changes, n_shared_experts=shared)


def draw_models(axes, size):
    """Published models by active and total parameters, and one of `size`."""
    shift = {"kimi-k2": (-55, 5), "moonlight-16b-a3b": (-12, 8)}  # where its name stands
    shift["deepseek-v2-lite"] = (-12, -16)
    for name in (*published, "deepseek-v2"):
        one = accounting.parameters(minids.ModelConfig.preset(name))
        place = one.active / 1e9, one.total / 1e9
        axes.plot(*([value] for value in place), marker="o", color=plots.COLORS[0])
        where = shift.get(name, (7, -10))
        axes.annotate(name, place, xytext=where, textcoords="offset points")
    axes.plot([2, 60], [2, 60], marker="", color=plots.INK, linewidth=1)
    axes.annotate("dense", (5, 5), xytext=(4, -10), textcoords="offset points")
    axes.plot([size.active / 1e9], [size.total / 1e9], marker="D", color=plots.COLORS[3])
    axes.set(xscale="log", yscale="log", xlim=(1.5, 150), ylim=(2, 6000))
    axes.set(xlabel="billion active parameters", ylabel="billion parameters")
    words = f"{size.total / 1e9:,.0f} billion, {size.active / 1e9:.1f} active"
    axes.set_title(f"{words}\n{2 * size.total / 1e9:,.0f} GB in bfloat16")


# %%
def draw(figure, experts, top_k, shared):
    left, right = figure.subplots(1, 2)
    cfg = team(experts, top_k, shared)
    draw_models(left, accounting.parameters(cfg))
    teams = [math.log10(math.comb(experts, k)) for k in range(1, 17)]
    right.plot(range(1, 17), teams, marker="", color=plots.COLORS[0])
    right.plot([top_k], [teams[top_k - 1]], marker="D", color=plots.COLORS[3])
    right.set(xlabel="experts that a token chooses", ylim=(0, 32), xticks=(1, 4, 8, 12, 16))
    right.set(ylabel="teams, as a power of 10")
    right.set_title(f"each {cfg.moe_intermediate_size:,} wide\n10^{teams[top_k - 1]:.1f} teams")


# %%
explore(
    draw,
    alt="Left: total over active parameters of published models; right: possible teams over top-k",
    size=(8.5, 4.2),
    experts=(32, 480, 32),
    top_k=(1, 16),
    shared=(0, 2),
)

# %% [markdown]
# ## When does it not pay?
#
# - **Memory.** All experts must be there, idle or not: V3 needs the memory of 671 billion parameters to compute like 37.
# - **Decoding for some users.** One user's token reads only the experts that it chose. Several users choose different ones, and each that anyone chose is read: the saving melts away, until there are so many users that all share the cost.
# - **Rows per expert.** A GPU computes at full speed only if each weight that it reads meets enough tokens (lesson 00: the ridge). Experts divide the tokens among them.
# - **Travel.** Experts on other machines mean that hidden states travel there and back, in every layer.
#
# The next cell puts numbers on these, by arithmetic, for a router that spreads tokens evenly and independently: then $B$ tokens together choose $E\,(1 - (1 - A/E)^B)$ different experts on average.

# %%
v3 = minids.ModelConfig.preset("deepseek-v3")
size, one = accounting.parameters(v3), 3 * v3.hidden_size * v3.moe_intermediate_size
E, A, card = v3.n_routed_experts, v3.num_experts_per_tok, accounting.GPUS["H200"].memory
for name, count in (("V3", size.total), ("dense, as many active", size.active)):
    nbytes = 2 * count
    print(f"{name}: {nbytes / 1e9:,.0f} GB in bfloat16, {nbytes / card:.1f} cards of 141 GB")
moe_layers = v3.num_hidden_layers - v3.first_k_dense_replace
for batch in (1, 8, 64, 512, 4096):
    different = E * (1 - (1 - A / E) ** batch)
    read = size.active + moe_layers * (different - A) * one
    print(f"{batch:4d} tokens together: {different:5.1f} experts of a layer read", end=", ")
    print(f"{2 * read / 1e9:5,.0f} GB a step, {read / size.active:4.1f} times the dense model's")
ridge = accounting.ridge("H200")  # a row of an expert: 2 FLOPs for each weight of 2 bytes
print(f"H200, ridge {ridge:.0f}: an expert needs that many rows, so", end=" ")
print(f"{ridge * E / A:,.0f} tokens together; a dense layer {ridge:.0f}")

# %% [markdown]
# The middle is the worst place: with 64 tokens V3 reads almost as much as a dense model with ALL its parameters would, and does the arithmetic of 37 billion. So MoE models are served to very many users at once, on many cards.
#
# Travel, by the arithmetic of DeepSeek's ISCA paper (2505.09343, read in a secondary copy): a hidden state goes to 9 experts in one byte per number and comes back in two, at 50 GB per second and card. The next cell's time is for one token through all layers; a card with 32 tokens needs 32 times as long, unless it computes meanwhile ("overlapped"). On one machine nothing travels; what the race showed remains, that few steps favour dense. And where **memory** is short, not arithmetic, the fair rival is a dense model of the MoE's TOTAL size: the race did not ask it.

# %%
sent = 3 * 9 * v3.hidden_size
print(f"{sent:,} bytes per token and layer, {sent * moe_layers / 1e6:.1f} MB for all {moe_layers}")
print(f"at 50 GB/s: {1e6 * sent * moe_layers / 50e9:.0f} µs per token and card, if not overlapped")
reduced = sent * v3.topk_group / 9
print(f"to {v3.topk_group} machines instead of 9 experts: at most {reduced:,.0f} bytes per layer")

# %% [markdown]
# ## In the real DeepSeek
#
# The next cell prints the published sizes, as `ModelConfig.preset` holds them. V3's router stands in section 2.1.2 of its report, its sizes in section 4.2.
#
# - **V2** differs in four ways: scores by softmax over all experts; a group's score is its best expert's; the gates are not normalised; no bias, balance comes from losses. For V2-Lite there are no groups.
# - **V3**: sigmoid, top-2 sum, normalised, and a bias.
# - The bias has the name `e_score_correction_bias` in checkpoints, in float32.
# - The first layers stay dense: 1 in V2, 3 in V3.
#
# What came after: Kimi K2 took V3's layer with 384 experts and without groups. V4, by public code and posts, routes its first layers by a hash of the token instead of a learned router.

# %%
fields = {"routed": "n_routed_experts", "shared": "n_shared_experts"}
fields |= {"top-k": "num_experts_per_tok", "width": "moe_intermediate_size"}
fields |= {"groups": "n_group", "stay": "topk_group"}
fields |= {"scores": "scoring_func", "normal.": "norm_topk_prob", "factor": "routed_scaling_factor"}
print(" " * 18, *(f"{name:>8}" for name in fields))
for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2"):
    cfg = minids.ModelConfig.preset(name)
    print(f"{name:18}", *(f"{getattr(cfg, field)!s:>8}" for field in fields.values()))

# %% [markdown]
# ## To remember
#
# 1. Experts buy parameters without FLOPs; the price is memory, small products, and travel.
# 2. The bias chooses, the plain scores weigh; what is closed is $-\infty$, never 0.
# 3. At equal steps the parameters win; at equal seconds ask when, and with what spread.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** You double $E$ and keep $A$, $S$, $F$. What happens to the FLOPs of a token?
# <details><summary>they double</summary>No: a token visits as many experts as before.</details>
# <details><summary>almost nothing</summary>Yes: only the router's matrix grows, by a row of D numbers for each expert.</details>
#
# **2.** $A = 1$ and the gates are normalised. How does the router learn from the loss?
# <details><summary>by the gate of the chosen expert</summary>No: that gate is s / s = 1, whatever s is. Its gradient is zero.</details>
# <details><summary>not at all</summary>Yes, balance losses aside: the choice has no gradient, and the only gate is constant.</details>

# %% [markdown]
# **3.** An expert is chosen too rarely, so its bias rises. What happens to its gate where it is chosen anyway?
# <details><summary>it grows</summary>No: gates are made of the scores without the bias.</details>
# <details><summary>nothing, if the other chosen ones are the same</summary>Yes: the bias changes who is chosen, not how much each counts.</details>
#
# **4.** A paper reports that its MoE beats a dense model "at the same compute". What do you ask first?
# <details><summary>how many parameters it has</summary>Useful, but it says nothing about the time.</details>
# <details><summary>the same FLOPs, or the same seconds, and on which machine?</summary>Yes: here the answers differ for a good part of the race.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Repeat the race with `load_text(vocab_size=2048)` and `"vocab_size": 2048` in `common`, with the same steps: the cells from the text to the gap. Predict first: is the gap larger or smaller, and is it still outside the seeds' spread? Then double `STEPS`, and the time.
#    <details><summary>Expected</summary>The layer that differs becomes a small part: 28,736 of 64,512 active parameters in the race, of 176,384 now; the head has most of the others. So a step of the MoE is slower by less, and its gap at equal steps smaller; not even its sign is certain. Whether the seeds agree, the table says.</details>
# 2. Is fine grain worth it here? Keep $(A + S) F$ and $E F$ of the race: 16 experts of 128 with top-1, 32 of 64 with top-2, 64 of 32 with top-4 and 128 of 16 with top-8, all with `n_shared_experts=0`, three seeds each, at equal steps (`Run(cfg, seed)`, and its `step()` as often as `STEPS` says). It takes as long as two races. Leave out the two lines of `Run` that put `routed` in, and set `norm_topk_prob=False` for top-1; quiz question 2 says why.
#    <details><summary>Expected</summary>16, 496, 635,376 and 1,429,702,652,400 teams. The routers grow with $E$, so the active parameters are not quite equal: 61,392, 62,432, 64,512 and 68,672. Top-1 with normalised gates trains too, but its router hears of nothing but balance. Compare the gaps between the four with the spread of one kind's seeds.</details>

# %%
status()
