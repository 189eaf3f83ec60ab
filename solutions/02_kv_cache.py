# ---
# title: The cache of keys and values
# promise: You make a transformer write with a cache instead of reading everything again, shrink that cache by sharing heads, and find out why memory decides how many people one GPU can serve.
# minutes: 55
# difficulty: 2
# needs: [torch]
# objectives:
#   - decode one token at a time against a cache, and get the same tokens as without
#   - give RoPE the right position while decoding
#   - let several query heads share one key and value head (grouped-query attention, GQA; multi-query attention, MQA)
#   - compute the bytes of a cache from a config, and read them off live tensors
#   - tell how many users fit into a memory, and where a smaller cache saves nothing
# ---

# %%
import functools
import itertools
import statistics
import time

import torch

import minids
from minids import accounting, layers
from minids.lab import check, explore, fast, hint, machine, plots, predict, status

_ = torch.manual_seed(0)
torch.set_num_threads(1)  # the work for one token is too small to be shared among threads

# %% [markdown]
# ## The problem: writing gets slower and slower
#
# A language model writes one token at a time, and each is chosen by looking at all tokens before it. The model of lesson 01, as you wrote it, must read the WHOLE text again for each new token. The next cell lets a small model write, first that way, then with a **cache**, which this lesson is about, and draws the tokens per second over the length of the text.
#
# The weights are random: the text is nonsense, but speed does not depend on what is written. The model is `tiny` of lesson 01 with 8 heads of 64 columns instead of 4 of 32.


# %%
def sized(groups):
    """A model with 8 query heads and `groups` K/V heads; all are of about the same size."""
    width = 384 + round(
        2 * (8 - groups) * 64 / 3
    )  # what the K and V projections save goes into the feed-forward
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": groups,
        "head_dim": 64,
        "attention": "gqa",
    }
    cfg = minids.ModelConfig.preset(
        "tiny", n_routed_experts=0, intermediate_size=width, **heads, initializer_range=0.09
    )
    return minids.Transformer(
        cfg
    ).eval()  # initializer_range: large enough that attention has a say


model = sized(8)
cfg = model.cfg
prompt = torch.randint(cfg.vocab_size, (1, 16))
print(f"{accounting.parameters(cfg).total / 1e6:.1f}M parameters, {cfg.num_hidden_layers} layers")

# %% tags=["nbval-ignore-output"]


def writing_speed(new, use_cache, every=40):
    """Rows (tokens in the text, tokens per second) while `new` tokens are written."""
    times = []

    def note(_):
        times.append(time.perf_counter())

    minids.generate(model, prompt, new, use_cache=use_cache, stream=note)
    took = [after - before for before, after in itertools.pairwise(times)]
    ends = range(every, new, every)
    return [(16 + end, 1 / statistics.median(took[end - every : end])) for end in ends]


again = writing_speed(321 if not fast() else 81, use_cache=False)
cached = writing_speed(1281 if not fast() else 161, use_cache=True)
fig, axes = plots.figure(7, 3.4)
axes.plot(*zip(*again, strict=True), label="all is read again")
axes.plot(*zip(*cached, strict=True), label="with a cache")
axes.set(xlabel="tokens in the text", ylabel="tokens per second", ylim=(0, None))
plots.label_lines(axes)
plots.show(fig, "Tokens per second over the text's length: all read again, and with a cache.")
for name, rows in {"all is read again": again, "with a cache": cached}.items():
    (first, fast_at), (last, slow_at) = rows[0], rows[-1]
    print(f"{name}: {fast_at:.0f} tokens/s at {first} tokens, {slow_at:.0f} at {last}")

# %% [markdown]
# Two questions. Why does the first line fall so quickly? And why should the second one fall at all, although it computes nothing twice? (In short texts it hardly does; below it is measured up to 2,048 tokens.)
#
# ### Your prediction
#
# When the text has 2,048 tokens: how many times more tokens per second will this model write with the cache than without? Write a number in place of `None`.

# %%
my_guess = None  # a number of your own, such as 5
guess = predict("At 2,048 tokens, how many times faster is the cache?", my_guess, "times")

# %% [markdown]
# ## What can be kept
#
# The newest token stands at position $t$. Its attention needs its own query, and the keys and values of all positions up to $t$:
#
# $$o_t = \sum_{s \le t} a_{ts}\, v_s, \qquad a_{t\,\cdot} = \mathrm{softmax}_s\left(q_t \cdot k_s \cdot \mathrm{scale}\right)$$
#
# A position never sees a later one. So nothing that was computed for position $s$ changes when position $t$ is added: $k_s$ and $v_s$ can be KEPT, and the old queries are never needed again. What is kept is the **KV cache**. A step then computes one position instead of $t$.
#
# In shapes: $B$ sequences, $H$ heads of width $d$, and room for $S$ positions, of which the first `length` are filled.

# %% [markdown]
# ## Exercise 1 · One query against the cache
#
# *5 minutes · difficulty ●○○○○*
#
# The newest token's query meets all that is filled, its own key included. The formula is the one above (arXiv 1706.03762, eq. 1), for one $t$. Which mask does a query need that may see everything?
#
# | name | shape | meaning |
# |---|---|---|
# | `q` | `[B, 1, H, d]` | the newest token's query |
# | `k`, `v` | `[B, S, H, d]` | room for S positions |
# | `length` | a number | so many are filled, the newest included; the rest is left-over memory and may hold anything, inf and NaN too |
# | `scale` | a number | factor of the scores |
# | result | `[B, 1, H, d]` | |


# %%
def decode_attention(q, k, v, length, scale):
    """Attention of q [B,1,H,d] to the first `length` positions of k, v [B,S,H,d]: [B,1,H,d]."""
    # BEGIN SOLUTION
    k, v = k[:, :length], v[:, :length]
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * scale).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
    # END SOLUTION


# %%
my_decode_attention = check(decode_attention)

# %% [markdown]
# ## Exercise 2 · A whole decoding step
#
# *9 minutes · difficulty ●●●○○*
#
# Now the token arrives, and the cache grows. Its query and key are rotated ("turned") by RoPE (lesson 01), by the angles of ITS position; keys are cached rotated, so each is rotated once in its life.
#
# | name | shape | meaning |
# |---|---|---|
# | `q`, `k`, `v` | `[B, 1, H, d]` | of the new token, not yet rotated |
# | `k_cache`, `v_cache` | `[B, S, H, d]` | the rotated keys, and the values |
# | `length` | a number | how many positions are filled BEFORE this token |
# | `cos`, `sin` | `[S, d/2]` | row $s$ has the angles of position $s$ |
# | `scale` | a number | factor of the scores |
# | result | three tensors | output `[B, 1, H, d]`, and both caches with the token in |
#
# Give back COPIES of the caches (`.clone()`); `minids` writes in place instead. `layers.apply_rope(x, cos, sin)` rotates `x` `[B, T, H, d]` by tables `[T, d/2]`; here $T = 1$.


# %%
def decode_step(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    """One token after `length` others: attention [B,1,H,d], copies of both caches with it."""
    # BEGIN SOLUTION
    row = slice(length, length + 1)
    q, k = layers.apply_rope(q, cos[row], sin[row]), layers.apply_rope(k, cos[row], sin[row])
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[:, row], v_cache[:, row] = k, v
    return my_decode_attention(q, k_cache, v_cache, length + 1, scale), k_cache, v_cache
    # END SOLUTION


# %%
my_decode_step = check(decode_step)

# %% [markdown]
# ## Your generation
#
# The next cell is a whole cached generation from your step: every token passes through the model once, alone (`minids` lets the whole prompt pass at once, which is called **prefill**). `minids.generate` without a cache is the judge: the tokens must be the SAME.


# %%
@torch.no_grad()
def my_generate(model, tokens, new):
    """Continue tokens [B,T] by the `new` likeliest ones, token by token; gives [B,T+new]."""
    end, cfg = tokens.shape[1] + new, model.cfg
    cos, sin = layers.rope_tables(cfg, torch.arange(end))
    room = torch.zeros(len(tokens), end, cfg.num_attention_heads, cfg.attention_head_dim)
    caches = [(room, room) for _ in model.layers]  # one `room` for all: a step never writes into it
    for length in range(end - 1):
        x = model.embed_tokens(tokens[:, length : length + 1])
        for index, block in enumerate(model.layers):
            h, attn = block.input_layernorm(x), block.self_attn
            projections = attn.q_proj, attn.k_proj, attn.v_proj
            token = [p(h).unflatten(-1, (-1, attn.width)) for p in projections]
            step = my_decode_step(*token, *caches[index], length, cos, sin, attn.scale)
            o, *caches[index] = step
            x = x + attn.o_proj(o.flatten(-2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        if length + 1 == tokens.shape[1]:  # past the prompt: the likeliest token comes next
            tokens = torch.cat([tokens, model.lm_head(model.norm(x)).argmax(-1)], 1)
    return tokens


# %%
prompts = torch.randint(cfg.vocab_size, (3, 11))
mine, theirs = my_generate(model, prompts, 50), minids.generate(model, prompts, 50, use_cache=False)
same = (mine == theirs)[:, 11:]
print(f"{same.sum()} of {same.numel()} new tokens are the same, in 3 texts")
assert same.all()

# %% [markdown]
# ## Why it must fall
#
# Nothing is computed twice any more. But to choose ONE token, every key and value in the cache has to be READ, and so has every weight. How many bytes is that, and how long does this machine take just to read them? `minids` keeps one cache for each layer; the next cell counts the bytes of its live tensors.

# %% tags=["nbval-ignore-output"]
here = machine.measure()
print(f"{here.name}: copies {here.bandwidth / 1e9:.1f} GB/s,", end=" ")
print(f"and can do {here.ridge:.1f} operations in the time of one byte")
weights = 4 * accounting.parameters(cfg).active  # what a token multiplies with, in fp32
for context in (64, 512, 2048):
    live = sum(layer.nbytes for layer in model.new_cache(1, context))
    least = (weights + live) / here.bandwidth
    sizes = f"{weights / 1e6:.1f} MB of weights + {live / 1e6:5.1f} MB of cache"
    print(f"{context:5d} tokens: {sizes}: {1e3 * least:4.1f} ms to read")

# %% [markdown]
# The weights are the same for each token; the cache grows with the text, and soon outweighs them. For each number read, which is 4 bytes, there are two operations (multiply, add): half an operation per byte, far below the **ridge** (operations per byte where arithmetic becomes the limit, lesson 00). By the roofline such work waits for memory: it is **memory-bound**, and there is one cure: less to read. Whether it reaches that limit here is measured further down.
#
# ## Fewer keys and values
#
# $H$ query heads ask different questions, but must each have keys and values of their own? Let $G$ be the number of **K/V heads**:
#
# | | $G$ | source |
# |---|---|---|
# | multi-head attention, MHA | $H$ | arXiv 1706.03762, section 3.2.2 |
# | grouped-query attention, GQA | between | arXiv 2305.13245, section 2.2 |
# | multi-query attention, MQA | 1 | arXiv 1911.02150, section 3 |
#
# The cache is $H/G$ times smaller. Each K/V head is read once and serves $H/G$ query heads.

# %% tags=["hide-input"]
fig, panels = plots.figure(7, 1.9, columns=3)
for panel, (name, groups) in zip(
    panels, {"MHA": 6, "GQA, G = 2": 2, "MQA": 1}.items(), strict=True
):
    for h in range(6):
        g = h // (6 // groups)
        at, colour = (g + 0.5) * 6 / groups - 0.5, plots.COLORS[g]
        panel.plot([h, at], [1, 0], color=colour, marker="", linestyle="-", linewidth=1, zorder=1)
        ends = [(h, 1, "o", h)] + [(at, 0, "s", g)] * (h % (6 // groups) == 0)
        for x, y, shape, number in ends:
            style = {"markersize": 13, "markerfacecolor": plots.CARD, "zorder": 3}
            panel.plot([x], [y], shape, color=colour, **style)
            panel.text(x, y, str(number), ha="center", va="center", fontsize=9, zorder=4)
    panel.set(title=name, xlim=(-0.7, 5.7), ylim=(-0.4, 1.4), xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
panels[0].set_yticks([0, 1], ["K, V", "query"])
panels[0].tick_params(axis="y", length=0)
panels[0].grid(False)
plots.show(
    fig,
    "Six query heads above K/V heads: six in MHA, two in GQA, one in MQA; neighbours share.",
)

# %% [markdown]
# ## Exercise 3 · Grouped attention
#
# *8 minutes · difficulty ●●●○○*
#
# Neighbours share: query head $h$ uses K/V head $\lfloor h / (H/G) \rfloor$, as in the picture (arXiv 2305.13245, figure 2). For one query per head, and a cache that is filled to its end ($S$ positions):
#
# $$o_h = \sum_s \mathrm{softmax}_s\left(q_h \cdot k_{s,\,g(h)} \cdot \mathrm{scale}\right) v_{s,\,g(h)}, \qquad g(h) = \lfloor h\,G/H \rfloor$$
#
# | name | shape |
# |---|---|
# | `q` | `[B, 1, H, d]` |
# | `k`, `v` | `[B, S, G, d]`, where $G$ divides $H$ |
# | `scale` | a number |
# | result | `[B, 1, H, d]` |
#
# Repeating `k` and `v` to $H$ heads is right, and is what many write. It copies what the cache saved; can you do without?


# %%
def grouped_attention(q, k, v, scale):
    """Attention of q [B,1,H,d] to k, v [B,S,G,d]; head h uses K/V head h // (H/G)."""
    # BEGIN SOLUTION
    B, _, H, d = q.shape
    G = k.shape[2]
    q = q.reshape(B, G, H // G, d)  # the queries of a group side by side
    weights = (torch.einsum("bgnd,bsgd->bgns", q, k) * scale).softmax(-1)
    return torch.einsum("bgns,bsgd->bgnd", weights, v).reshape(B, 1, H, d)
    # END SOLUTION


# %%
my_grouped_attention = check(grouped_attention)

# %% [markdown]
# Does the copy matter? Eight query heads, one K/V head, 2,048 positions, medians of 20 calls. The cost has parts: making the copies; then attention, which reads eight times as much. How the copies lie in memory counts too, so the third line has them as `[B, H, S, d]`, each head's keys side by side. The last line is your function, without copies:

# %% tags=["nbval-ignore-output"]
q, k, v = torch.randn(1, 1, 8, 64), torch.randn(1, 2048, 1, 64), torch.randn(1, 2048, 1, 64)


def copies():
    return k.repeat_interleave(8, 2), v.repeat_interleave(8, 2)


ready = copies()
laid = [tensor.transpose(1, 2).contiguous() for tensor in ready]


def on_laid():
    return (q.transpose(1, 2) @ laid[0].mT * 0.125).softmax(-1) @ laid[1]


times = {
    "making the copies": copies,
    "attention on ready copies": lambda: my_decode_attention(q, *ready, 2048, 0.125),
    "the same as [B, H, S, d]": on_laid,
    "attention in groups": lambda: my_grouped_attention(q, k, v, 0.125),
}
for name, run in times.items():
    print(f"{name}: {1e6 * machine.median_seconds(run, 20):.0f} µs")

# %% [markdown]
# ## Exercise 4 · Bytes per token
#
# *3 minutes · difficulty ●○○○○*
#
# How many bytes does the cache keep for ONE token, over all layers? Count from the config alone: a key and a value (2), for each layer, each K/V head, each column; then bytes instead of numbers (arXiv 2405.04434, table 1, has the same count; it writes $2 n_g d_h l$).
#
# | name | meaning |
# |---|---|
# | `cfg.num_hidden_layers` | layers |
# | `cfg.num_attention_heads` | query heads, $H$ |
# | `cfg.kv_heads` | K/V heads, $G$ |
# | `cfg.attention_head_dim` | width of a head, $d$ |
# | `dtype.itemsize` | bytes of one number: 2 for `torch.bfloat16` |


# %%
def kv_bytes_per_token(cfg, dtype):
    """Bytes that the cache of a model `cfg` keeps for one token, over all layers, in `dtype`."""
    # BEGIN SOLUTION
    numbers = 2 * cfg.num_hidden_layers * cfg.kv_heads * cfg.attention_head_dim
    return numbers * dtype.itemsize
    # END SOLUTION


# %%
my_kv_bytes = check(kv_bytes_per_token)

# %% [markdown]
# Three models now, of about the same number of parameters. What the K and V projections save goes into the feed-forward, as in arXiv 1911.02150, section 4.1. Your formula, beside the bytes of live tensors:

# %%
models = {"MHA": model, "GQA (G = 2)": sized(2), "MQA": sized(1)}
for name, one in models.items():
    formula = my_kv_bytes(one.cfg, torch.float32)
    live = sum(layer.nbytes for layer in one.new_cache(1, 2048))
    count = accounting.parameters(one.cfg).total / 1e6
    print(f"{name:14} {count:.2f}M parameters; by formula {formula:6,} bytes a token,", end=" ")
    print(f"× 2048 = {2048 * formula / 1e6:4.1f} MB; live tensors: {live / 1e6:4.1f} MB")
    assert live == 2048 * formula

# %% [markdown]
# ## Measured: tokens per second over the context
#
# A few decoding steps each, at contexts from 64 to 2,048 tokens. Models and contexts take turns, so that whatever else this machine does meets all of them alike; each figure is a median. The next two cells measure; you need not read their code.

# %% tags=["hide-input", "nbval-ignore-output"]


STEPS = 4


def steps(one, context):
    """What runs STEPS tokens, one by one, after `context` tokens that are in the cache."""
    cache, token = one.new_cache(1, context + STEPS), torch.zeros(1, 1, dtype=torch.int64)
    for tensor in (tensor for layer in cache for tensor in layer.tensors):
        tensor.normal_()

    def run():
        for layer in cache:  # each round begins at the same place
            layer.length = context
        for _ in range(STEPS):
            one(token, cache)

    return run


# %% tags=["hide-input", "nbval-ignore-output"]
contexts, runs = [64, 2048] if fast() else [64, 128, 256, 512, 1024, 2048], {}
for context in contexts:
    text = torch.zeros(1, context + 1, dtype=torch.int64)
    runs |= {(context, name): steps(one, context) for name, one in models.items()}
    runs[context, "no cache"] = functools.partial(model, text, last_only=True)
with torch.no_grad():
    medians = machine.race(runs, 1 if fast() else 9)
rows = [{} for _ in contexts]
for (context, name), seconds in medians.items():
    rows[contexts.index(context)][name] = (1 if name == "no cache" else STEPS) / seconds
for context, row in zip(contexts, rows, strict=True):
    line = "; ".join(f"{name}: {rate:,.{0 if rate >= 10 else 1}f}" for name, rate in row.items())
    print(f"after {context} tokens, tokens per second: {line}")

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(7, 3.8)
for name in rows[0]:
    axes.plot(contexts, [row[name] for row in rows], label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens in the text", ylabel="tokens per second")
axes.set_xticks(contexts, [str(c) for c in contexts])
axes.minorticks_off()
plots.label_lines(axes)
plots.show(fig, "Tokens per second over the context: least without a cache, most with MQA.")
guess.compare(rows[-1]["MHA"] / rows[-1]["no cache"], how="here")

# %% [markdown]
# The first question is answered: without a cache a step computes all positions again. For the second, hold each step against its bytes: in the next cell, the time of a step, and how long a copy of as many bytes takes here.
#
# Beside it, what a GPU would need at best: the bytes of weights and cache over the bandwidth of its memory (computed, in bf16, for one user). The last line is for the same benchmark on a real H200; it stays empty until one has been run.

# %% tags=["nbval-ignore-output"]
shares = {}
for name, one in models.items():
    active = accounting.parameters(one.cfg).active
    nbytes = 2 * active + 2048 * my_kv_bytes(one.cfg, torch.bfloat16)
    flops = 2 * active + 4 * 2048 * 8 * 64 * one.cfg.num_hidden_layers
    times = {gpu: accounting.roofline_seconds(flops, nbytes, gpu) for gpu in ("H200", "RTX 4090")}
    words = ", ".join(f"{gpu} {1e6 * seconds:.0f} µs" for gpu, seconds in times.items())
    least = 2 * nbytes / here.bandwidth  # fp32 has twice the bytes of bf16
    shares[name] = least * rows[-1][name]
    print(f"{name}: {nbytes / 1e6:.1f} MB in bf16, at best {words};", end=" ")
    print(f"here, in fp32: {1e3 / rows[-1][name]:.1f} ms, a copy {1e3 * least:.1f} ms")
print(f"MHA's copy would take {shares['MHA']:.0%} of its step:", end=" ")
if shares["MHA"] < 0.5:
    print("here arithmetic and layout dominate.")
    ordered = rows[-1]["MHA"] < rows[-1]["GQA (G = 2)"] < rows[-1]["MQA"]
    print("The trend follows" if ordered else "Not even the trend follows", end=" ")
    print("the bytes; that the memory sets the time is a GPU's case.")
else:
    print("here, too, the memory sets most of the time.")
machine.recorded("decode")

# %% [markdown]
# ## Under the roofline
#
# Attention over $S$ cached positions does $4 S H d$ operations (two products, multiply and add) and in bf16 reads $4 S G d$ bytes: $H/G$ operations per byte. MHA: 1, however long the text. A GPU can do far more for each byte, up to the ridge of its roof. With $H = 128$, $d = 128$, on the H200's roof (an operation is a FLOP). The points are computed, not measured: nothing can be faster, so read them as "at best".

# %% tags=["hide-input"]
S, H, d = 32768, 128, 128
points = {}
for name, G in {"MHA": 128, "GQA, 8 groups": 8, "MQA": 1}.items():
    points[name] = (4 * S * H * d, 4 * S * G * d)
points["MHA, prefill"] = (2 * S * S * H * d, 8 * S * H * d)  # half the pairs; q, k, v, o once each
fig, axes = plots.figure(7, 3.8)
plots.roofline(axes, ["H200", "RTX 4090"], points)
plots.show(fig, "Decoding with MHA lies far left, MQA near the ridge, prefill far right.")
for gpu in ("H200", "RTX 4090"):
    made = accounting.GPUS[gpu]
    speeds = f"{made.bandwidth / 1e12:.2f} TB/s, {made.flops[torch.bfloat16] / 1e12:.0f} TFLOP/s"
    print(f"{gpu}: {speeds} in bf16, ridge at {accounting.ridge(gpu):.0f} FLOP per byte")
    print(f"    ({made.source})")

# %% [markdown]
# ## Exercise 5 · How many users fit?
#
# *3 minutes · difficulty ●○○○○*
#
# A server holds the weights ONCE, and a cache for each user.
#
# $$\mathrm{users} = \left\lfloor \frac{\mathrm{memory} - \mathrm{weights}}{\mathrm{bytes\ per\ token} \cdot \mathrm{context}} \right\rfloor, \quad \mathrm{or}\ 0$$
#
# | name | unit |
# |---|---|
# | `memory`, `weights` | bytes |
# | `bytes_per_token` | bytes |
# | `context` | tokens of one user |


# %%
def users_that_fit(memory, weights, bytes_per_token, context):
    """How many users with `context` tokens each fit into `memory` beside `weights` (bytes)."""
    # BEGIN SOLUTION
    left = memory - weights
    return max(0, left // (bytes_per_token * context))
    # END SOLUTION


# %%
my_users = check(users_that_fit)

# %% [markdown]
# Three published models. Their bytes per token stand in table 1 of DeepSeek's ISCA paper (arXiv 2505.09343): 70,272, 327,680 and 516,096. Here they come from each config, two of them by your function. DeepSeek-V3 caches something else than keys and values: $512 + 64$ numbers per layer, which is lesson 03.


# %%
def dense(layers, heads, **sizes):
    """The config of a model without experts, with 8 K/V heads of width 128."""
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    return minids.ModelConfig(attention="gqa", head_dim=128, n_routed_experts=0, **sizes)


qwen = dense(80, 64, hidden_size=8192, intermediate_size=29568, vocab_size=152064)
llama = dense(126, 128, hidden_size=16384, intermediate_size=53248, vocab_size=128256)
v3 = minids.ModelConfig.preset("deepseek-v3")
published = {  # bytes of cache per token (bf16), bytes of all weights (V3: fp8, else bf16)
    "DeepSeek-V3": (accounting.kv_bytes_per_token(v3), accounting.parameters(v3).total),
    "Qwen2.5-72B": (my_kv_bytes(qwen, torch.bfloat16), 2 * accounting.parameters(qwen).total),
    "LLaMA-3.1-405B": (my_kv_bytes(llama, torch.bfloat16), 2 * accounting.parameters(llama).total),
}
for name, (per_token, size) in published.items():
    fit = my_users(80 * 10**9, 0, per_token, 32768)
    print(f"{name:14} {per_token:7,} bytes per token, {size / 1e9:4.0f} GB of weights;", end=" ")
    print(f"in 80 GB for caches alone: {fit:2.0f} users of 32K tokens")

# %% [markdown]
# ## Who serves more?
#
# **Question:** DeepSeek-V3 has nine times the parameters of Qwen2.5-72B (in bytes 4.6 times: V3's weights are FP8, one byte each, Qwen's are bf16, two), and a cache 4.7 times smaller. The weights must fit first. From which memory on does V3 serve more users, and does the context change that? Move the sliders: a server of eight H200 has 1,128 GB. An 8-bit cache has one byte per number instead of two.


# %%
def draw(figure, memory_GB, context, cache_bits):
    axes, gigabytes, words = figure.subplots(), range(40, 2001, 20), []
    for name, (per_token, size) in published.items():
        per_token = per_token * cache_bits // 16
        line = [my_users(gb * 10**9, size, per_token, context) for gb in gigabytes]
        fit = my_users(memory_GB * 10**9, size, per_token, context)
        axes.plot(gigabytes, line, marker="", label=name)
        words.append(f"{name} {fit:,}")
    axes.axvline(memory_GB, color=plots.INK, linewidth=1, linestyle=":", marker="", label="_")
    axes.set(
        xlabel="memory in GB, weights included",
        ylabel=f"users of {context:,} tokens",
        ylim=(0, None),
        title=f"{memory_GB:,} GB: {', '.join(words)}",
    )
    plots.label_lines(axes)


alt = "Users that fit over the memory: Qwen2.5-72B starts early, DeepSeek-V3 late but rises most."
contexts_of_users, bits = [32768, 2048, 8192, 131072], [16, 8]
explore(draw, alt, memory_GB=(80, 2000, 8), context=contexts_of_users, cache_bits=bits)

# %% [markdown]
# ## When does it NOT pay?
#
# The cache is not all: V3's weights must fit too. Two crossovers: the memory from which V3 serves more users than Qwen; the context at which one step reads as many bytes of cache as of weights (below it a smaller cache cannot even halve the time). And what the cache brought here, for a short text and a long one.

# %% tags=["nbval-ignore-output"]
(b3, w3), (bq, wq) = published["DeepSeek-V3"], published["Qwen2.5-72B"]
equal = (w3 / b3 - wq / bq) / (1 / b3 - 1 / bq)  # there (memory - weights) / bytes is the same
print(f"V3 serves more users than Qwen2.5-72B from {equal / 1e9:.0f} GB on, at any context")
for users in (1, 8, 64):
    even = {name: size / (users * per_token) for name, (per_token, size) in published.items()}
    del even["DeepSeek-V3"]  # of its weights a step reads some only: lesson 07
    words = ", ".join(f"{name} {context:,.0f} tokens" for name, context in even.items())
    print(f"users at once: {users:2d}; cache = weights at {words} each")
for context, row in ((contexts[0], rows[0]), (contexts[-1], rows[-1])):
    gain, shared = row["MHA"] / row["no cache"], row["MQA"] / row["MHA"]
    print(f"here at {context} tokens: the cache makes it {gain:.1f} times faster, MQA {shared:.2f}")

# %% [markdown]
# So a smaller cache saves little time where
#
# - texts are short and users few: the weights are most of what is read;
# - a prompt is read (prefill): all its positions pass at once, each key serves many queries, and arithmetic is the limit, as the roofline shows.
#
# And fewer K/V heads cost some quality. A T5 of the XXL size scored 47.2 with MHA (the average of ROUGE-1, BLEU and F1 over seven tasks: summaries, translation, questions); converted, and trained 5% longer, 47.1 with 8 groups and 46.6 with MQA, at 1.51, 0.28 and 0.24 seconds per sample (arXiv 2305.13245, table 1). Sharing trades quality for bytes. Is there a way to a small cache without giving up heads?

# %% [markdown]
# ## In the real DeepSeek
#
# There is: Multi-head Latent Attention (arXiv 2405.04434, section 2.1; arXiv 2412.19437, section 2.1.1). V3 keeps ONE vector of 512 numbers from which the keys and values of all heads can be computed, and one rotated key of 64 for all heads: lesson 03.
#
# | | your MHA | DeepSeek-V3 |
# |---|---|---|
# | layers | 4 | 61 |
# | query heads | 8 | 128 |
# | kept per token and layer | 2 · 8 · 64 numbers | 512 + 64 numbers |
# | positions | 4,096 | 163,840 |
#
# A layer of V3, with 16 times the heads, keeps less than a layer of yours.
#
# What came after: V3.2, by its report (arXiv 2512.02556), attends to 2,048 chosen positions only.

# %%
wide = minids.ModelConfig.preset("deepseek-v3", attention="mha", head_dim=128)
as_mha, latent = my_kv_bytes(wide, torch.bfloat16), accounting.kv_bytes_per_token(v3)
print(f"V3 with MHA of 128 heads of 128: {as_mha:9,} bytes per token")
print(f"V3 with MLA, 61 · 576 · 2:       {latent:9,} bytes, {as_mha / latent:.0f} times fewer")
print(f"163,840 tokens, one user: {163840 * as_mha / 1e9:.0f} GB or {163840 * latent / 1e9:.1f} GB")

# %% [markdown]
# ## To remember
#
# 1. Keys and values of old positions never change, so they are kept: a step computes one position.
# 2. Each new token reads all weights and the whole cache: on a GPU, that sets the time.
# 3. $G$ K/V heads instead of $H$ make the cache $H/G$ times smaller, for every token of every user.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Why are old queries not cached?
# <details><summary>nobody asks for them again</summary>Yes: position t needs its own query, and all keys and values.</details>
# <details><summary>they change with each new token</summary>No: they stay as they are.</details>
#
# **2.** 40 tokens are in the cache. By which position is the next one rotated?
# <details><summary>0: it is the only one in this step</summary>No: then all distances would be wrong.</details>
# <details><summary>40</summary>Yes: they stand at 0 to 39.</details>
#
# **3.** H = 8, G = 2. Which K/V head does query head 3 use?
# <details><summary>1, for 3 % 2 is 1</summary>No: neighbours share.</details>
# <details><summary>0, for 3 // 4 is 0</summary>Yes: heads 0 to 3 share head 0.</details>
#
# **4.** You replace MHA by MQA. What gets faster most?
# <details><summary>writing after a long prompt, for many users</summary>Yes: then caches are most of what is read.</details>
# <details><summary>reading a long prompt</summary>No: arithmetic is the limit there.</details>

# %% [markdown]
# ## Homework
#
# Begin a new notebook with `import minids, torch`; for the first, add `from minids.numerics import relative_error`, `torch.manual_seed(0)`, `model = minids.Transformer(minids.ModelConfig.preset("tiny", attention="gqa", n_routed_experts=0)).eval()` and `tokens = torch.randint(2048, (1, 50))`.
#
# 1. Keep the cache in fewer bits. `cache = model.new_cache(1, 64)` is in float32; give `dtype=torch.bfloat16`, then `dtype=torch.float8_e4m3fn`. Each time pass the 50 tokens one by one, `model(tokens[:, t : t + 1], cache)`, under `torch.no_grad()`. How far are the last logits from those of float32 (`relative_error`), and how many of the 50 likeliest tokens change?
#    <details><summary>Expected</summary>bfloat16: some thousandths of their size, and hardly a token changes. FP8: some hundredths, and a few change, where two logits were close. E4M3 keeps 3 binary digits behind the first, bfloat16 7: the error should grow by about 2^4 = 16.</details>
# 2. Take the `config.json` of a model without experts that you use, and build its `minids.ModelConfig(attention="gqa", n_routed_experts=0, …)` from the fields of the same names: `vocab_size`, the two sizes, the layers, the heads, and `head_dim` if it is there. How many bytes per token, and how many users with 8,192 tokens fit into your GPU beside the weights?
#    <details><summary>Expected</summary>For LLaMA-3.1-8B (`minids.accounting.published("llama-3.1-8b")`): 131,072 bytes per token and 16.1 GB of weights in bfloat16. A card of 24 GB serves 7 such users, an H200 of 141 GB serves 116.</details>

# %%
status()
