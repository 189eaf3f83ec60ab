# ---
# title: Economics
# promise: You compute from a configuration what a model costs to train and to serve, reproduce the published tables to their digits, find where one does not come out, and put five headlines to the test.
# minutes: 60
# difficulty: 2
# needs: [torch]
# objectives:
#   - count the parameters of a whole model, and know which two numbers are both called active
#   - get training FLOPs, GPU-hours and dollars from a configuration, and say what a published price leaves out
#   - compute what a step of decoding reads for a batch, and what a million tokens cost at least
#   - measure what your own training costs in electricity
#   - judge a headline by its arithmetic, by what was divided by what, and what was left out
# ---

# %%
import functools

import numpy as np
import torch
import torch.nn.functional as F

import minids
from minids import accounting, layers
from minids.lab import check, explore, fast, hint, load_text, machine
from minids.lab import minutes, plots, predict, status, train_live

_ = torch.manual_seed(0)
v3 = minids.ModelConfig.preset("deepseek-v3")

# %% [markdown]
# ## The problem: the same run, here
#
# DeepSeek-V3 was trained on 14.8 trillion tokens (its report, 2412.19437). What would that take on the machine in front of you? The next cell trains `tiny`, which has the same parts (latent attention, experts), for some seconds. It counts **FLOPs**, multiplications and additions, per second, and asks how long V3's would take at that rate. Where V3's number comes from is exercise 2.

# %% tags=["nbval-ignore-output"]
text = load_text()
tiny = minids.ModelConfig.preset("tiny")
run = train_live(minids.Transformer(tiny), text, minutes=minutes(0.25), live=False)
here = machine.measure()
reached = run.tokens_per_second * accounting.train_flops_per_token(tiny, 256)
print(f"{run.tokens_per_second:,.0f} tokens/s, {reached / 1e9:.1f} GFLOP/s in training")
print(f"{here.flops / 1e9:,.0f} GFLOP/s in one large product: {reached / here.flops:.0%} are used")
whole_run = 14.8e12 * accounting.train_flops_per_token(v3, 4096)
years = whole_run / reached / 3600 / 24 / 365
print(f"V3's training, {whole_run:.2e} FLOPs: {years:,.0f} years at this rate")

# %% [markdown]
# The second line is the **MFU**, model FLOPs utilisation: the share of a machine's peak that a model's own arithmetic amounts to. A GPU does far more per second, and V3 had 2,048 of them (its report). Machines can be rented by the hour, so a run has a price.
#
# ### Your prediction
#
# And serving it? Take eight H200 cards at 2 dollars per card and hour, V3's weights in FP8 (one byte each), and ONE user with 4,096 tokens of context. Each token needs 37 of the 671 billion parameters. What do a million tokens of output cost **at least**? (DeepSeek's own price for its reasoning model was $2.19, by its API's documentation, api-docs.deepseek.com.) Write a number in place of `None`.

# %%
my_guess = None  # dollars per million tokens
guess = predict("A million tokens for one user on eight H200, at least?", my_guess, "dollars")

# %% [markdown]
# ## Exercise 1 · The whole model
#
# *8 minutes · difficulty ●●○○○*
#
# In lesson 07 you counted a layer of experts. Now all of it: the **total**, which must be in memory, and the **active** parameters, which one token is multiplied with.
#
# | part | where | total | active |
# |---|---|---|---|
# | embedding | once | $V D$ | – (a look-up multiplies nothing) |
# | two norms | each layer | $2 D$ | $2 D$ |
# | attention, its inner norms with it | each layer | `accounting.attention_parameters(cfg)` | the same |
# | dense SwiGLU, or | layers without experts | $3 D W$ | the same |
# | router and experts | the others | `accounting.moe_parameters(cfg)[0]` | `accounting.moe_parameters(cfg)[1]` |
# | last norm | once | $D$ | $D$ |
# | head | once | $V D$ | $V D$ |
#
# $V$ is `vocab_size`, $D$ `hidden_size`, $W$ `intermediate_size`. `cfg.is_moe_layer(i)` says what layer $i$ has. With `cfg.tie_word_embeddings` embedding and head are one matrix: once in the total, and still multiplied with. Stuck? `hint("parameters")`.


# %%
def parameters(cfg):
    """(total, active) parameters of the model that `cfg` describes."""
    # BEGIN SOLUTION
    D, head = cfg.hidden_size, cfg.vocab_size * cfg.hidden_size
    total = active = D + head
    if not cfg.tie_word_embeddings:
        total += head
    for i in range(cfg.num_hidden_layers):
        dense = 3 * D * cfg.intermediate_size
        all_of_it, used = accounting.moe_parameters(cfg) if cfg.is_moe_layer(i) else (dense, dense)
        common = 2 * D + accounting.attention_parameters(cfg)
        total, active = total + common + all_of_it, active + common + used
    return total, active
    # END SOLUTION


# %%
my_parameters = check(parameters)

# %% [markdown]
# `accounting.published(name)` has the presets and, for their sizes alone, some dense models by others. Do your counts agree with the names?

# %%
names = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2", "deepseek-67b"]
names += ["qwen2.5-72b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"]
print(" " * 18, "        total", "  active, with the embedding")
for name in names:
    cfg = accounting.published(name)
    total, active = my_parameters(cfg)
    print(f"{name:18} {total / 1e9:11.2f} B {active / 1e9:8.2f} B", end=" ")
    print(f"{accounting.active_with_embedding(cfg) / 1e9:8.2f} B")
mtp, table = accounting.mtp_parameters(v3), v3.vocab_size * v3.hidden_size
print(f"V3's module for predicting a second token: {mtp.total / 1e9:.2f} B of its own", end=", ")
print(f"{(mtp.total - 2 * v3.hidden_size**2) / 1e9:.2f} B without its projection")

# %% [markdown]
# Two conventions, both called "active": without the input embedding, and with it. V3's "37 billion" (its report) fits the first, and so does V2-Lite's "2.4 billion" (2405.04434), if its 2.45 were cut and not rounded; with the embedding they would be 38 and 2.7. DeepSeek's own file on the weights (README_WEIGHTS.md) says 36.7B with embedding AND head in it, which is neither; and 11.5B for the module that predicts a second token (**MTP**), which comes out without one projection. So: before comparing two models by active parameters, ask who counted.

# %% [markdown]
# ## Exercise 2 · FLOPs of training
#
# *8 minutes · difficulty ●●●○○*
#
# A parameter costs a token 2 FLOPs forward, one multiplication and one addition, and twice that backward (gradients of the inputs, and of the weights): 6.
#
# Attention has products without parameters. A query meets, on average, half of the $S$ positions (it is **causal**: it sees only what came before). With each it does a product as wide as a key, and one as wide as a value, in each of $H$ heads and $L$ layers; backward costs twice as much again.

# %% [markdown]
# $$\text{FLOPs per token} = 6\,N_{active} + 3 \cdot L \cdot H \cdot 2\,(w_k + w_v) \cdot \frac{S}{2}$$
#
# | name | meaning |
# |---|---|
# | $N_{active}$ | `accounting.parameters(cfg).active` |
# | $L$, $H$, $S$ | `cfg.num_hidden_layers`, `cfg.num_attention_heads`, `seq_len` |
# | $w_k$, $w_v$ | widths of a key and of a value in the expanded form, which training uses (lesson 04) |
# | with `cfg.attention == "mla"` | $w_k$ = `cfg.qk_head_dim` (nope and rope columns), $w_v$ = `cfg.v_head_dim` |
# | otherwise | both are `cfg.attention_head_dim` |
#
# Stuck? `hint("train_flops_per_token")`.


# %%
def train_flops_per_token(cfg, seq_len):
    """FLOPs of training per token, for sequences of `seq_len` tokens."""
    # BEGIN SOLUTION
    key, value = (cfg.attention_head_dim,) * 2
    if cfg.attention == "mla":
        key, value = cfg.qk_head_dim, cfg.v_head_dim
    one_pass = cfg.num_hidden_layers * cfg.num_attention_heads * 2 * (key + value) * seq_len / 2
    return 6 * accounting.parameters(cfg).active + 3 * one_pass
    # END SOLUTION


# %%
my_train_flops = check(train_flops_per_token)

# %% [markdown]
# DeepSeek's paper at the ISCA conference (2505.09343) has two tables to test it on: table 1, bytes of cache per token in bfloat16, with multiples of V3's; and table 2, training GFLOPs per token at 4,096 tokens.

# %%
printed = {  # cache in bytes, its multiple, GFLOPs per token: tables 1 and 2 of 2505.09343
    "deepseek-v2": (None, None, 155),
    "deepseek-v3": (70_272, 1, 250),
    "qwen2.5-72b": (327_680, 4.66, 394),
    "llama-3.1-405b": (516_096, 7.28, 2448),
}
for name, (size, multiple, work) in printed.items():
    cfg = accounting.published(name)
    cache = accounting.kv_bytes_per_token(cfg)
    flops = my_train_flops(cfg, 4096) / 1e9
    print(f"{name:15} {cache:8,} bytes", end=" ")
    ratio = cache / accounting.kv_bytes_per_token(v3)
    if size:
        right = "as printed" if abs(ratio - multiple) < 0.006 else f"printed: {multiple}"
        print(f"({'as printed' if cache == size else size}), {ratio:.2f} times ({right})", end="")
    else:
        print("(not in the table)", end="")
    print(f"; {flops:7.1f} GFLOPs ({work} printed, {flops / work - 1:+.1%})")

# %% [markdown]
# All three sizes of caches come out; one multiple does not, and it is the paper's own division. Both models with experts come out too. The two **dense** rows do not: the same formula gives more than the table prints, and more by different shares. None of the usual conventions gives both (the next cell tries five). Perhaps these two were counted in another way; the paper does not say.
#
# Why does it matter? The table is there to show by how much experts are cheaper. By one formula for all rows the advantage is a little LARGER than printed. A table is worth redoing even if its message holds.

# %%
for name in ("qwen2.5-72b", "llama-3.1-405b"):
    cfg = accounting.published(name)
    ours, active = my_train_flops(cfg, 4096) / 1e9, accounting.parameters(cfg).active
    attention = ours - 6 * active / 1e9
    head = 6 * cfg.vocab_size * cfg.hidden_size / 1e9
    tries = {"formula": ours, "no attention": ours - attention, "no head": ours - head}
    tries |= {"whole square": ours + attention, "neither": ours - attention - head}
    print(f"{name}, printed {printed[name][2]}:", end=" ")
    print(", ".join(f"{label} {value:.0f}" for label, value in tries.items()))

# %% [markdown]
# ## Exercise 3 · Hours and dollars
#
# *5 minutes · difficulty ●●○○○*
#
# | name | meaning |
# |---|---|
# | `flops_per_token`, `tokens` | the run: their product is all FLOPs |
# | `peak` | FLOPs per second of one GPU, at best |
# | `mfu` | the share of it that is reached, such as 0.4 |
# | `price` | dollars for one GPU for an hour |
# | result | GPU-hours, dollars |
#
# **GPU-hours** do not say how long it took: 2,048 GPUs give 2,048 of them in each hour. Stuck? `hint("training_cost")`.


# %%
def training_cost(flops_per_token, tokens, peak, mfu, price):
    """(GPU-hours, dollars) of a training run."""
    # BEGIN SOLUTION
    per_hour = 3600 * mfu * peak
    hours = flops_per_token * tokens / per_hour
    return hours, price * hours
    # END SOLUTION


# %%
my_training_cost = check(training_cost)

# %% [markdown]
# V3's report has the hours (table 1, H800 cards) and takes 2 dollars for each. The ISCA paper has the speed on 2,048 cards (table 4; it also sets the attention's whole square beside the causal half). Hours, speed and the configuration are all published, so each can be held against the other two. R1's hours are second-hand: the press about the supplement of its paper in Nature (asiadaily.org/news/7927), which gives 202K, 10K and 82K dollars, 294K in all.

# %%
hours = {"pre-training": 2664e3, "longer context": 119e3, "after-training": 5e3}  # V3, table 1
total_hours = sum(hours.values())
print(f"{total_hours:,.0f} hours · $2 = ${2 * total_hours / 1e6:.3f} million")
print(f"180K hours per trillion tokens · 14.8 = {180e3 * 14.8:,.0f}", end="; ")
print(f"a trillion takes {180e3 / 2048 / 24:.1f} days on 2,048 cards")
r1 = 512 * (198 + 80) + 5000  # cards, hours of two runs; hours for making data
print(f"R1 on top of V3 (second-hand): {r1:,} hours · $2 = ${2 * r1 / 1e3:.0f}K")
moe_layers = v3.num_hidden_layers - v3.first_k_dense_replace
routers = 6 * moe_layers * v3.n_routed_experts * (v3.hidden_size + 1)  # with their biases
pairs = v3.num_hidden_layers * v3.num_attention_heads * (v3.qk_head_dim + v3.v_head_dim)
square = 3 * pairs * 4096  # FLOPs of attention's other half, above the diagonal
causal = accounting.train_flops_per_token(v3, 4096) - routers
rate = 272.80e9 / 86400 / 2048  # tokens per second and card: table 4
for kind, work in (("causal", causal), ("not causal", causal + square)):
    print(f"{kind}: {work * rate / 1e12:.0f} TFLOP/s, {work * rate / 989e12:.2%} of 989")
spent, _ = my_training_cost(causal, 14.8e12, 989e12, causal * rate / 989e12, 2)
print(f"14.8T tokens at that speed: {spent:,.0f} hours", end=", ")
print(f"{spent / hours['pre-training']:.1%} of those of pre-training")

# %% [markdown]
# Table 4 prints 385 and 432 TFLOP/s, 38.94% and 43.73%: all four come out, once the routers' FLOPs are left out (our reading; the paper does not say so). And the hours agree with the speed: nothing is hidden in the arithmetic. Two more things to know about these figures:
#
# - The divisor, 989, is the card's peak in bfloat16, although V3 trains mostly in FP8, whose peak is twice as high.
# - What the price leaves out stands in the same paragraph of the report (section 1): earlier research and experiments. Rent per hour does not contain people and data either.

# %% [markdown]
# ## Explore: the price of a run
#
# **Questions.** At which price per hour would V3's run have cost 10 million? What would its tokens have cost on the dense LLaMA-3.1-405B? The 405B took 30.84 million hours (Meta's model card): at which MFU do 15 trillion tokens take that long? (The black line has all of V3's 2.788 million hours, the diamond the training on 14.8 trillion tokens alone.)
#
# <details><summary>Answers</summary>At about $3.75, with the MFU where it stands, that of table 4. Ten times as much, for it has ten times the FLOPs per token. A third: the first headline below computes it.</details>


# %%
def draw_training(figure, price, mfu_percent, trillions):
    axes = figure.subplots()
    shares = np.linspace(18, 60, 22)
    for name in ("deepseek-v3", "qwen2.5-72b", "llama-3.1-405b"):
        flops = my_train_flops(accounting.published(name), 4096)
        cost = functools.partial(my_training_cost, flops, trillions * 1e12, 989.5e12)
        hours, dollars = cost(mfu_percent / 100, price)
        words = f"{name}: {hours / 1e6:.2f}M hours, ${dollars / 1e6:,.2f}M"
        line = axes.plot(shares, [cost(s / 100, price)[1] / 1e6 for s in shares], label=words)[0]
        axes.plot([mfu_percent], [dollars / 1e6], "D", ms=9, color=line.get_color())
    axes.axhline(5.576, color=plots.INK, linewidth=0.8)
    axes.annotate("V3 as published", (18.4, 5.576), xytext=(0, -14), textcoords="offset points")
    axes.set(yscale="log", xlim=(18, 60.5), ylim=(0.02, 20000), ylabel="million dollars")
    axes.set(xlabel="MFU in percent, of an H800 or H100 in bfloat16")
    axes.set_title(f"{trillions:.1f} trillion tokens at ${price:.2f} per hour, MFU {mfu_percent}%")
    axes.legend(loc="upper right")


# %%
explore(
    draw_training,
    alt="Dollars of training over MFU, for DeepSeek-V3, Qwen2.5-72B and LLaMA-3.1-405B",
    size=(8.5, 4.6),
    price=(0.25, 3.75, 0.25),
    mfu_percent=(18, 60, 1),
    trillions=(1.0, 28.6, 0.2),
)

# %% [markdown]
# ## Exercise 4 · What a step of decoding reads
#
# *10 minutes · difficulty ●●●○○*
#
# Decoding makes one token per step for each sequence of the **batch**. A weight is read once per step, however many sequences use it; each sequence reads its own cache. So a large batch shares the weights. Experts complicate it: a token visits $A$ of $E$, and other tokens visit others.
#
# If tokens choose independently and evenly, one expert is missed by one token with probability $1 - A/E$, and by all $B$ of them with $(1 - A/E)^B$. So a layer reads $d = E\,\big(1 - (1 - A/E)^B\big)$ different experts on average.

# %% [markdown]
# | name | meaning |
# |---|---|
# | `batch`, `context` | sequences, and tokens in the cache of each |
# | `weight_bytes`, `cache_bytes` | bytes of one number |
# | $B$, $A$, $E$, $D$ | `batch`, `cfg.num_experts_per_tok`, `cfg.n_routed_experts`, `cfg.hidden_size` |
# | result | bytes of weights, bytes of caches: two numbers |
#
# Tools: `accounting.parameters(cfg).active` has everything that ONE token needs, $A$ experts of each layer for which `cfg.is_moe_layer(i)` is True among it; one expert is $3\,D$ `cfg.moe_intermediate_size` numbers; `accounting.kv_elements_per_token(cfg)` counts the cache of one token over all layers. In this exercise every config has experts. Stuck? `hint("decode_bytes")`.


# %%
def decode_bytes(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    """(bytes of weights, bytes of caches) that one step of decoding reads."""
    # BEGIN SOLUTION
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    different = E * (1 - (1 - A / E) ** batch)
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    with_experts = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers))
    weights = accounting.parameters(cfg).active + with_experts * (different - A) * expert
    caches = batch * context * accounting.kv_elements_per_token(cfg)
    return weight_bytes * weights, cache_bytes * caches
    # END SOLUTION


# %%
my_decode_bytes = check(decode_bytes)

# %% [markdown]
# "37 of 671 billion" is the truth about ONE token. How fast does it fade?

# %%
batches = [2**n for n in range(14)]
whole = accounting.parameters(v3).total
read = {b: my_decode_bytes(v3, b, 4096, 1, 2) for b in batches}
fig, (left, right) = plots.figure(9, 3.8, columns=2)
left.plot(batches, [100 * read[b][0] / whole for b in batches])
left.set(xscale="log", ylim=(0, 105), xlabel="sequences in the batch")
left.set(ylabel="percent of V3's weights read in a step")
for place, kind in enumerate(("weights", "caches")):
    right.plot(batches, [read[b][place] / b / 1e9 for b in batches], label=kind)
right.set(xscale="log", yscale="log", xlabel="sequences in the batch, 4,096 tokens each")
right.set(ylabel="GB read per token made")
plots.label_lines(right)
plots.show(fig, "Share of V3's weights read in a step, and GB per token, over the batch.")
for b in (1, 8, 64, 512):
    print(f"{b:4d} sequences: {read[b][0] / whole:5.1%} of the weights", end=", ")
    print(f"{sum(read[b]) / b / 1e9:5.2f} GB per token")

# %% [markdown]
# Left: with a few dozen sequences most of the model is read after all. Right: per token the bytes fall nevertheless, because the batch shares them; in the end the caches are what remains.
#
# ## Exercise 5 · The price of a million tokens
#
# *4 minutes · difficulty ●○○○○*
#
# | name | meaning |
# |---|---|
# | `tokens_per_second` | what all GPUs make together, for all users |
# | `price_per_hour` | dollars for ONE GPU |
# | `gpus` | how many there are |
#
# How long a step takes at least is the roofline of lesson 00: bytes over bandwidth, or FLOPs over the peak, whichever is longer (`accounting.decode_seconds`). Stuck? `hint("dollars_per_million")`.


# %%
def dollars_per_million(tokens_per_second, price_per_hour, gpus=1):
    """Dollars that a million tokens cost."""
    # BEGIN SOLUTION
    tokens_per_hour = 3600 * tokens_per_second
    return gpus * price_per_hour / tokens_per_hour * 1_000_000
    # END SOLUTION


# %%
my_dollars = check(dollars_per_million)

# %%
bound = {}
for b in (1, 8, 64, 512, 1024):
    seconds = accounting.decode_seconds(v3, b, 4096, "H200", gpus=8, weight_bytes=1)
    bound[b] = my_dollars(b / seconds, 2, 8)
    print(f"{b:4d} users: a step {1e3 * seconds:5.1f} ms", end=", ")
    print(f"{1 / seconds:6.0f} tokens/s each", end=", ")
    print(f"{b / seconds:7,.0f} together, ${bound[b]:.3f} per million")
guess.compare(bound[1], how="computed")
print(f"from one user to 512: {bound[1] / bound[512]:.0f} times cheaper")
card = accounting.GPUS["H800"].memory
print(f"V3 in FP8: {whole / 1e9:.0f} GB; eight H800 hold {8 * card / 1e9:.0f}, eight H200", end=" ")
print(f"{8 * accounting.GPUS['H200'].memory / 1e9:.0f}")

# %% [markdown]
# These are bounds: even shares, no network, no software, nobody waiting. But they show what sets a price: how many users share a step. One user alone on that machine could not be served at DeepSeek's price. Where on the roofline does a step stand?

# %% tags=["hide-input"]
points = {}
for name, size, b in (("deepseek-v3", 1, 1), ("deepseek-v3", 1, 64), ("deepseek-v3", 1, 1024),
                      ("qwen2.5-72b", 2, 64)):  # fmt: skip
    cfg = accounting.published(name)
    nbytes = sum(accounting.decode_bytes(cfg, b, 4096, size))
    points[f"{name}, batch {b}"] = accounting.decode_flops(cfg, b, 4096), nbytes
fig, axes = plots.figure(7.5, 4.2)
plots.roofline(axes, ["H200"], points)
plots.show(fig, "Steps of decoding under the roofline of an H200, all left of the ridge.")
for name, (flops, nbytes) in points.items():
    print(f"{name:23} {flops / nbytes:5.1f} FLOP per byte; ridge {accounting.ridge('H200'):.0f}")

# %% [markdown]
# Even with a thousand users a step of these is bound by memory, left of the ridge (that of bfloat16; in FP8 it lies at twice the value): bytes set the price. That is what FP8 weights and a small cache are for in serving.
#
# What does reality say? DeepSeek's overview of a day of serving (github.com/deepseek-ai/open-infra-index, day 6 of its open-source week) names 226.75 nodes of eight H800 on average, its tokens, and the prices below. Cache **hits** are input tokens whose latents were kept from an earlier request.

# %%
day = {"input, hits": (342e9, 0.14), "input, misses": (266e9, 0.55), "output": (168e9, 2.19)}
cost = 226.75 * 8 * 24 * 2  # nodes, cards, hours, dollars
income = sum(tokens / 1e6 * dollars for tokens, dollars in day.values())
print(f"cost ${cost:,.0f}; at R1's prices ${income:,.0f} ($562,027 published, counts unrounded)")
print(f"margin over cost: {562_027 / cost - 1:.0%}; as a share of income: {1 - cost / 562_027:.1%}")
made = 168e9 / 86400
print(f"{made / 226.75:,.0f} tokens/s of output per node", end="; ")
print(f"if output paid for all: ${my_dollars(made, 2, 226.75 * 8):.2f} per million")

# %% [markdown]
# DeepSeek's "margin" divides by the COST; the usual one divides by the income, and is the second number. It is **theoretical** for another reason too, and the overview says so: every token is priced like R1's, although V3 was cheaper, and free use and discounts earn less. The cost is rent alone, at an assumed 2 dollars.
#
# ### Another bound: the network
#
# V3 does not fit into eight H800 (above), so its experts lie on many cards, and hidden states travel. For a card with 32 tokens, 9 experts per token, one byte there and two back (2505.09343, section 2.3.2). Two halves of a batch take turns, one travels while the other computes: a layer takes two transfers. DeepSeek's [overview](https://github.com/deepseek-ai/open-infra-index) has 20 to 22 tokens/s for each user on that day.

# %%
for width in (7000, v3.hidden_size):  # the paper says 7K
    once = (1 + 2) * 32 * 9 * width / 50e9  # bytes over the speed of the link, as given there
    step = 2 * once * v3.num_hidden_layers  # two halves of a batch
    print(f"width {width}: {1e6 * once:.2f} µs a layer, a step {1e3 * step:.2f} ms", end=", ")
    print(f"{int(1 / step)} tokens/s for each user at most")

# %% [markdown]
# ## Explore: batch, context, price
#
# Eight H200, as above; V3 in FP8, as it is published, the dense models in bfloat16, as they are. A line ends where weights and caches no longer fit into the memory.
#
# **Questions.** With 4,096 tokens of context, for how many users is V3 cheaper per token than the dense 72B, which is a ninth of its size? (The next cell searches, and asks it again with the 72B in FP8.) What does a context of 64K change, and for whom most?
#
# <details><summary>Answers</summary>The lines cross twice. For a handful of users V3 reads fewer bytes (37 GB of weights against 143 for one); then most of its experts are read, and it is dearer up to about 500 users, from where on its smaller cache decides. At 64K the caches weigh more: the dense models' are 4.7 (72B) and 7.3 times (405B) as large per token, so their lines end early, and V3 is the cheaper one for any number of users that fits.</details>


# %%
served = {"deepseek-v3": 1, "qwen2.5-72b": 2, "llama-3.1-405b": 2}  # bytes of a weight
memory = 8 * accounting.GPUS["H200"].memory


def price_of(name, users, context, price):
    """Dollars per million tokens on eight H200, NaN where it does not fit."""
    cfg, size = accounting.published(name), served[name]
    held = size * accounting.parameters(cfg).total
    held += users * context * accounting.kv_bytes_per_token(cfg)
    seconds = accounting.decode_seconds(cfg, users, context, "H200", 8, size)
    return my_dollars(users / seconds, price, 8) if held < memory else np.nan


def draw_serving(figure, users, context, price):
    left, right = figure.subplots(1, 2)
    many = np.unique(np.geomspace(1, 4096, 60).astype(int))
    for name in served:
        (line,) = left.plot(many, [price_of(name, b, context, price) for b in many], label=name)
        spot = price_of(name, users, context, price)
        left.plot([users], [spot], "D", ms=8, color=line.get_color())
    left.set(xscale="log", yscale="log", xlim=(0.8, 4096), ylim=(0.01, 200))
    left.set(xlabel="users at once", ylabel="dollars per million tokens, at least")
    left.legend(loc="upper right")
    full = [name for name in served if np.isnan(price_of(name, users, context, price))]
    words = "no room: " + ", ".join(full) if full else "all have room"
    left.set_title(f"${price:.2f} per card and hour\n{words}")
    draw_bytes(right, users, context)


# %%
def draw_bytes(axes, users, context):
    """What a step reads, weights and caches, of each model."""
    rows = {}
    for name, size in served.items():
        parts = accounting.decode_bytes(accounting.published(name), users, context, size)
        rows[name] = {"weights": parts[0] / 1e9, "caches": parts[1] / 1e9}
    plots.bars(axes, rows, form=",.1f")
    axes.set(xscale="log", xlim=(0.05, 1e6), xlabel="GB read in a step")
    axes.set_title(f"users: {users}, tokens of each: {context:,}")


explore(
    draw_serving,
    alt="Dollars per million tokens over users, and the bytes of a step, for three models",
    size=(9.5, 4.6),
    users=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
    context=[4096, 16384, 65536, 131072],
    price=(0.25, 3.75, 0.25),
)

# %%
users = range(1, 1000)
for size in (1, 2):
    served["qwen2.5-72b"] = size
    ours = np.array([price_of("deepseek-v3", b, 4096, 2) for b in users])
    theirs = np.array([price_of("qwen2.5-72b", b, 4096, 2) for b in users])  # NaN: no room
    dearer = 1 + np.flatnonzero(ours > theirs)
    print(f"the 72B at {size} bytes per weight: V3 is dearer", end=" ")
    print(f"from {dearer.min()} to {dearer.max()} users")

# %% [markdown]
# ## Measured here: your own mini-DeepSeek, in electricity
#
# The run at the top was yours: your machine, your socket. Type what the machine draws under load, in watts (a plug-in meter knows; a laptop's charger names its most), and what a kilowatt-hour (kWh) costs you. With `None` the cell takes example values, and says so. The minutes are those measured above.

# %% tags=["nbval-ignore-output"]
my_watts, my_price = None, None  # watts under load; money per kWh
watts, per_kwh = my_watts or 45, my_price or 0.30
if not (my_watts and my_price):
    print(f"an example, not yours: {watts} W, {per_kwh} per kWh")
seconds = run.rows[-1][0]
energy = watts * seconds  # joules: a watt for a second
print(f"measured: {seconds:.0f} s, {run.rows[-1][1]} steps, {energy:,.0f} J", end=" ")
print(f"= {energy / 3.6e6:.5f} kWh: {per_kwh * energy / 3.6e6:.6f} in money")
print(f"an hour of it: {watts / 1e3 * per_kwh:.4f}; a million tokens of training", end=" ")
print(f"{watts / 1e3 * per_kwh / 3600 * 1e6 / run.tokens_per_second:.6f}")
print(f"V3's run at {reached / watts / 1e9:.2f} GFLOP per joule:", end=" ")
print(f"{whole_run / reached * watts / 3.6e6 * per_kwh / 1e6:,.0f} million in electricity")
machine.recorded("train")

# %% [markdown]
# Per joule a GPU does far more than a processor, so the last line would be smaller with one; a record from a GPU, where there is one, stands below it.
#
# ## The headlines, checked
#
# Five claims as they stand in the press, in our words. Each gets a verdict, and below it the arithmetic or the measurement that the verdict stands on.
#
# ### 1 · "V3 was trained for about 6 million dollars"
#
# **Right, as the rent for the final run; it is not what V3 cost.** Hours, speed and FLOPs agree with each other (exercise 3), and the report says itself what it leaves out. The price is rent at an assumed 2 dollars. How much hangs on that, and how does it compare with a model whose hours are published too?

# %%
for price in (1, 2, 4):
    print(f"at ${price} per hour: ${price * total_hours / 1e6:.2f} million")
llama = accounting.published("llama-3.1-405b")  # 30.84M hours, "15T+" tokens: Meta's model card
work = accounting.train_flops_per_token(llama, 8192)
share = accounting.mfu(work, 15e12 / (30.84e6 * 3600), "H100")
print(f"LLaMA-3.1-405B: {30.84e6 / total_hours:.1f} times the hours", end=", ")
print(f"MFU {share:.0%} at 15 trillion tokens (more, if they were more)")
used = causal * rate / 989e12  # table 4 of 2505.09343, exercise 3
formula = accounting.gpu_hours(whole_run, used, "H800")
print(f"V3 at {used:.0%}: {formula:,.0f} hours by the formula")
dense = accounting.train_flops_per_token(llama, 4096) / accounting.train_flops_per_token(v3, 4096)
print(f"FLOPs per token: {dense:.1f} times; the rest is tokens and utilisation")
print(f"V2 against the older 67B, hours per trillion: {1 - 172.8 / 300.6:.1%} saved")

# %% [markdown]
# So V3 took few hours, and the reason is mostly one: FLOPs per token, that is, few active parameters. (The "42.5% saved" of V2's abstract is the last line: 172.8K against 300.6K hours per trillion tokens, 2405.04434.)
#
# ### 2 · "Prices 20 times lower"
#
# **Right for one pair of models, wrong for another; and a price is not a cost.** From early 2025, dollars per million tokens: R1 and V3 by DeepSeek's documentation (api-docs.deepseek.com/quick_start/pricing-details-usd); o1 and GPT-4o second-hand, by a copy of OpenAI's price list (docs.rs, openai-models 0.1.1).

# %%
prices = {  # input, input from the cache, output
    "DeepSeek R1": (0.55, 0.14, 2.19),
    "OpenAI o1": (15, 7.5, 60),
    "DeepSeek V3": (0.27, 0.07, 1.10),
    "GPT-4o": (2.50, 1.25, 10),
}
kinds = ("input", "cached input", "output")
for ours, theirs in (("DeepSeek R1", "OpenAI o1"), ("DeepSeek V3", "GPT-4o")):
    ratios = (b / a for a, b in zip(prices[ours], prices[theirs], strict=True))
    words = ", ".join(f"{kind} {ratio:.1f}" for kind, ratio in zip(kinds, ratios, strict=True))
    print(f"{theirs} over {ours}: {words} times")
rent = my_dollars(made, 2, 226.75 * 8)
print(f"R1's output price over the rent above, if output paid for all: {2.19 / rent:.1f}")

# %% [markdown]
# More than 20 between the reasoning models, a third of that between the others, and twice as much for cached input. A ratio of PRICES says nothing about the ratio of costs: nobody outside knows what the other side's tokens cost to make. What can be checked: R1's price was above the rent of the cards (last line), so it does not take a loss to explain it. And a price per token is no price per task, if one model writes more tokens.
#
# ### 3 · "Latent attention drastically reduces memory at inference"
#
# **Right for the cache; for the memory as a whole only with many long conversations.** First measured on live tensors, then as arithmetic.

# %%
sizes = {}
for kind in ("mla", "mha"):
    cfg = minids.ModelConfig.preset("tiny", attention=kind)
    model = minids.Transformer(cfg).eval()
    cache = model.new_cache(batch=1, max_len=100)
    with torch.no_grad():
        model(torch.zeros(1, 100, dtype=torch.long), cache)
    sizes[kind] = sum(layer.nbytes for layer in cache) / 100
    print(f"tiny with {kind}: {sizes[kind]:,.0f} bytes per token, read off the tensors")
print(f"{sizes['mha'] / sizes['mla']:.1f} times smaller")
expanded = 2 * pairs  # bytes of a key and a value in each layer and head of V3
latent, gqa8 = accounting.kv_bytes_per_token(v3), 2 * v3.num_hidden_layers * 2 * 8 * 128
print(f"V3: {latent:,} bytes, {expanded / latent:.0f} times less than its expanded heads", end=", ")
print(f"{gqa8 / latent:.1f} times less than GQA-8")
for users, context in ((1, 4096), (64, 4096), (64, 131072)):
    caches, same = users * context * latent, users * context * gqa8
    saved = (same - caches) / (whole + same)
    print(f"{users:2d} users, {context:7,} tokens: weights and caches {saved:5.1%}", end=" ")
    print("smaller than with GQA-8")

# %% [markdown]
# GQA-8 (8 heads of 128 for keys and values in each of 61 layers, as dense models have, the weights left as they are) is the fair rival: nobody would serve the expanded heads. For one short conversation the 671 GB of weights are everything, and no attention helps; for many long ones the cache is most of the memory, and there the word "drastically" is right.
#
# A cousin: V2's abstract says its cache is **93.3% smaller** than the 67B's. Lesson 03 took it apart; here is the line again, with the 6 bits per number that V2 stores (2405.04434) and the 67B's sizes, which are second-hand:

# %%
v2, old = accounting.published("deepseek-v2"), accounting.published("deepseek-67b")
ours, theirs = accounting.kv_elements_per_token(v2), accounting.kv_elements_per_token(old)
print(f"numbers: {ours:,} against {theirs:,}, {1 - ours / theirs:.1%} fewer")
print(f"6 bits against 16: {1 - 0.75 * ours / (2 * theirs):.1%} fewer bytes")
qwen = accounting.kv_bytes_per_token(accounting.published("qwen2.5-72b"))
print(f"V2 in 16 bits against Qwen2.5-72B in 16: {1 - 2 * ours / qwen:.1%} fewer")

# %% [markdown]
# The headline needs two things besides MLA: a cache in 6 bits against one in 16, and an older model with 95 layers to compare with.
#
# ### 4 · "Only a fraction of the model is active, which saves energy"
#
# **Right for FLOPs; right for energy only as far as the time falls, and for some batches it hardly does.** We found no published energy for V3. Measured here: the time of one dense layer, and of 16 experts of which a token visits 2, with as many parameters in all. If the watts are the same, energy is time; that is an assumption, for we measure no watts.

# %% tags=["nbval-ignore-output"]
D, width = 512, 4096
cfg = minids.ModelConfig(
    hidden_size=D, moe_intermediate_size=width // 16, n_routed_experts=16,
    num_experts_per_tok=2, n_shared_experts=0,
)  # fmt: skip
dense, moe = layers.SwiGLU(D, width), minids.moe.MoE(cfg).eval()
with torch.no_grad():
    for weight in moe.parameters():
        weight.copy_(torch.randn_like(weight) / 20)
    for tokens in (1, 8, 64, 128 if fast() else 1024):
        x = torch.randn(1, tokens, D)
        runs = {"dense": functools.partial(dense, x), "experts": functools.partial(moe, x)}
        clock = machine.race(runs, rounds=9)
        touched = accounting.experts_touched(cfg, tokens)
        print(f"{tokens:4d} tokens: {touched:4.1f} of 16 experts", end=", ")
        ratio = clock["experts"] / clock["dense"]
        print(f"an eighth of the FLOPs, {ratio:.2f} times the time")

# %%
active = accounting.parameters(v3).active
for b in (1, 16, 64, 256, 1024, 4096):
    weights, _ = accounting.decode_bytes(v3, b, 0, 1)
    time = accounting.decode_seconds(v3, b, 0, "H200", weight_bytes=1)
    as_large = accounting.roofline_seconds(2 * b * whole, whole, "H200")  # dense, in FP8 too
    print(f"V3, batch {b:4d}, of a dense model as large: FLOPs {active / whole:.1%}", end=", ")
    print(f"bytes of weights {weights / whole:5.1%}, time at the roofline {time / as_large:5.1%}")
meta = 30.84e6 * 700 / 1e9  # hours, watts at the peak: Meta's model card
print(f"LLaMA-3.1-405B's training: {meta:.1f} GWh by its card; V3's at the same watts", end=" ")
print(f"(an assumption: none is published): {total_hours * 700 / 1e9:.2f} GWh")

# %% [markdown]
# At the roofline of an H200 (last column, short contexts): one user needs few bytes, and with thousands, as in training, arithmetic sets the time; at both ends the time falls as the FLOPs do. In between, at some dozens, most experts are read for a few tokens each, and the time is nearly that of a dense model as large; look for the same hump in the measurement, where a single token's time is that of many small calls, too. And all of it must sit in powered memory. A fair rival is a dense model **as good**, not as large; which one that is, no table of parameters says.

# %% [markdown]
# ### 5 · "FP8 allows faster computation on older hardware"
#
# **Wrong as it stands.** FP8 multiplies faster only where the hardware has units for it, and those came with the newer cards. The peaks are those of the makers' datasheets (`accounting.GPUS[name].source`); the A100, of 2020, lists none for FP8. What an old card must do instead, this processor can show: widen the weights, then multiply.

# %% tags=["nbval-ignore-output"]
for name in accounting.GPUS:
    try:
        ratio = accounting.peak(name, torch.float8_e4m3fn) / accounting.peak(name, torch.bfloat16)
        print(f"{name:16} FP8 at {ratio:.1f} times the speed of bfloat16")
    except ValueError as error:
        print(f"{name:16} {str(error).split(';')[0]} ({accounting.GPUS[name].source})")
w = torch.randn(2048, 2048)
w8 = w.to(torch.float8_e4m3fn)
for rows in (1, 512):
    x = torch.randn(rows, 2048)
    runs = {"fp32": lambda x=x: F.linear(x, w), "fp8": lambda x=x: F.linear(x, w8.float())}
    clock = machine.race(runs, rounds=9)
    ratio = clock["fp8"] / clock["fp32"]
    print(f"here, rows: {rows}, weights in FP8, widened: {ratio:.2f} times the time of fp32")
for rows in (1, 4096):  # an A100 multiplies in bfloat16 either way; it reads 2 bytes or 1
    flops = 2 * rows * 8192**2
    two, one = (accounting.roofline_seconds(flops, n * 8192**2, "A100") for n in (2, 1))
    print(f"an A100, rows: {rows}, one byte per weight: {one / two:.2f} of the time at best")

# %% [markdown]
# An A100 has no such units. It can STORE FP8: the weights take half the memory, and with few rows, where reading is the bottleneck, a kernel that widens them on the fly may come near the line before the last. The arithmetic stays that of 16 bits (last line), and the widening comes on top: computing never gets faster. (Here widening is a step of its own, through memory: dear for one row, hidden by the product for many.)
#
# Perhaps the claim comes from V3's training in FP8 on H800 cards. But an H800 is an H100 with slower links between cards (2505.09343), so it HAS the units; it is restricted, not old. Users of A800 cards, which are cut A100, got an error for R1: `type fp8e4nv not supported in this architecture` (vllm-project/vllm, issue 15336).
#
# | headline | verdict |
# |---|---|
# | V3 for about 6 million | right, as the rent for the final run; all else is left out |
# | prices 20 times lower | right for R1 and o1, wrong for V3 and GPT-4o; a price is not a cost |
# | MLA drastically reduces memory | right for the cache; for all memory only with many long contexts |
# | a fraction is active, saves energy | right for FLOPs; for time, and so energy, not at middling batches |
# | FP8 computes faster on older hardware | wrong: that takes units they lack; what they save is bytes |

# %% [markdown]
# ## When does it not pay?
#
# Each technique of this course moves a cost, and there is a size at which the move is a loss:
#
# - **Experts**: below a certain batch and size the routing costs more than it saves (lesson 07, and headline 4: a ratio of time above 1 is a loss, one far above an eighth a gain mostly lost). And memory for all of them must be paid.
# - **MLA**: for short contexts and few users the cache is a small share of memory.
# - **FP8**: small products, and cards without units.
# - **Renting by the hour**: a price per hour assumes that the cards are busy. The next cell asks what idle time does to a price.

# %%
for busy in (1.0, 0.5, 0.1):
    print(f"busy {busy:.0%} of the time: ${bound[512] / busy:.3f} per million", end=" ")
    print(f"at 512 users, ${bound[1] / busy:.2f} at one")

# %% [markdown]
# ## In the real DeepSeek
#
# - **Training**: 2,048 H800; table 1 of the V3 report (2412.19437) has hours and dollars, section 4.2 the sizes and the schedule.
# - **Serving**: prefill and decode run on separate groups of cards, with experts spread differently (2505.09343, section 2.3.1).
# - **Second token**: the MTP module drafts it; the report says that 85 to 90% are accepted, for 1.8 times the tokens per second. Our bounds leave it out: it makes a step yield more than one token.
# - **After**: V3.2 reads 2,048 chosen positions instead of the whole cache in attention; V4, by public code and posts, replaced MLA. Prices have changed several times since.

# %% [markdown]
# ## To remember
#
# 1. Total parameters cost memory, active ones FLOPs; which of the two sets your time depends on the batch.
# 2. A price per token is a price per hour divided by how many share a step.
# 3. Of every headline ask: divided by what, and without what?

# %% [markdown]
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** A model card says "21B active". What must you ask before comparing it?
# <details><summary>in which precision</summary>No: a count of parameters does not depend on it.</details>
# <details><summary>whether the input embedding is counted</summary>Yes: both ways are in use, and for a small model the embedding is a large share.</details>
#
# **2.** You double the batch of V3 from 256 to 512 sequences with short contexts. The time of a step
# <details><summary>doubles</summary>No: nearly all experts were read before, and they are read once for all.</details>
# <details><summary>hardly changes</summary>Yes: the weights dominate and are all read already. The price per token nearly halves.</details>

# %% [markdown]
# **3.** Another company rents cards at half the price and reaches half the MFU. Its training costs
# <details><summary>half as much</summary>No: it also needs twice as many hours.</details>
# <details><summary>the same</summary>Yes: dollars = FLOPs / (peak · MFU) · price.</details>
#
# **4.** Someone shows that FP8 makes a model on an old card twice as fast. Which explanation is possible?
# <details><summary>the card multiplies FP8 faster than 16 bits</summary>No: it has no units for it.</details>
# <details><summary>the weights were read in half the bytes, and reading was the bottleneck</summary>Yes: that is decoding with few rows; prefill would show no gain.</details>
#
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Price the next model: save its `config.json` and open it with `cfg = minids.ModelConfig.from_hf("config.json")` (what is built as V2 or V3 opens, Kimi K2 too; for V3.2 and others fill in a `ModelConfig` by hand, as `accounting.published` does). Parameters, cache, GFLOPs per token at 4,096, dollars for 15 trillion tokens on H800 cards at an MFU of 0.4 and 2 dollars. Which figure of its own page can you reproduce?
# <details><summary>Expected</summary>Try your code on <code>minids.ModelConfig.preset("kimi-k2")</code>: 1,026.4 billion parameters, 31.7 active (32.9 with the embedding); 70,272 bytes; 205.5 GFLOPs; 2.16 million GPU-hours, 4.33 million dollars. Its README has 1T and 32B: without the embedding, as V3's.</details>
# 2. Take the next headline about a model's cost. Write its arithmetic in ten lines of Python, with a comment for each assumption that you had to make. Which one moves the result most?

# %%
status()
