# ---
# title: A working transformer
# promise: You write the four parts of a modern transformer and its yardstick, train it for five minutes on text that your machine already has, and find out whether it predicts Python better than gzip and xz do.
# minutes: 60
# difficulty: 2
# needs: [torch]
# objectives:
#   - normalise with RMSNorm, and see why it stands before every part of a block
#   - turn queries and keys by RoPE, so that attention knows distances
#   - write causal attention that cannot look ahead
#   - write the gated feed-forward SwiGLU
#   - measure a model in bits per byte, beside two compressors
# ---

# %%
import math
import time

import torch
import torch.nn.functional as F

import minids
from minids import layers
from minids.lab import check, explore, hint, load_text, machine
from minids.lab import minutes, plots, predict, status, train_live

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: how well can Python be guessed?
#
# Whoever predicts a text well can write it down in few bits: a token of probability $p$ costs $-\log_2 p$ bits. Divided by the bytes of the text, that is **bits per byte**, and any compressor has such a number too.
#
# The text is the standard library of the Python that runs this notebook. One file in ten is **held out**: no model ever trains on it. What do gzip and xz need for these files, and what does a model need that has learnt nothing yet?

# %% tags=["nbval-ignore-output"]
text = load_text(vocab_size=2048)
corpus = text.corpus
cfg = minids.ModelConfig.preset("tiny", attention="mha", n_routed_experts=0)
model = minids.Transformer(cfg)
unseen = minids.data.encode_files(text.tokenizer, corpus.heldout[:8])
with torch.no_grad():
    nats = model.loss(*minids.data.batch(unseen, 0, 0, 16, 256))[1].item()
untrained = nats / math.log(2) / (sum(map(len, corpus.heldout[:8])) / len(unseen))
size = minids.accounting.parameters(cfg).total
print(f"{len(corpus.train)} files to learn from, {len(corpus.heldout)} held out")
print(f"{len(text.tokens):,} tokens of {text.bytes_per_token:.2f} bytes each")
print(f"{size:,} parameters, untrained: {untrained:.2f} bits per byte")
print(f"gzip {corpus.gzip_bpb:.2f}, xz {corpus.xz_bpb:.2f} bits per byte")

# %% [markdown]
# Each number of bits is about files that no model has seen: all that are held out for gzip and xz, some of them for the untrained model. It knows only that a token is one of 2048, which costs $\log_2 2048 = 11$ bits, shared among about three bytes.
#
# ### Your prediction
#
# After five minutes of training on this machine, how many bits per byte will the model need for the held-out files? Write your guess in place of `None`; nobody marks it, and at the end you see how far off it was.

# %%
my_guess = None  # a number of your own, such as 2.0
guess = predict("Bits per byte after five minutes?", my_guess, "bits per byte")

# %% [markdown]
# ## From text to the next token
#
# A **token** is a piece of text, a few letters long; a vocabulary numbers 2048 of them. A transformer
#
# 1. looks up a vector of width $D$ for each token (the **embedding**),
# 2. passes the vectors through $L$ equal **blocks**,
# 3. gives each token of the vocabulary a score for coming next (the **head**; the scores are called **logits**),
# 4. turns scores into probabilities: $\mathrm{softmax}(z)_i = e^{z_i} / \sum_j e^{z_j}$.
#
# A block ADDS two things to its input $x$, each computed from a normalised copy:
#
# $$h = x + \mathrm{Attention}(\mathrm{RMSNorm}(x)), \qquad y = h + \mathrm{SwiGLU}(\mathrm{RMSNorm}(h))$$
#
# You write its four parts now (RoPE hides inside attention), the smallest first. DeepSeek-V3 has 61 blocks of this outline (V3 report, section 2.1).

# %% [markdown]
# ### The letters
#
# Shapes are written with the same letters in the whole course, here with the sizes of your model:
#
# | letter | meaning | here |
# |---|---|---|
# | $B$ | sequences in a batch | 16 |
# | $T$ | positions in a sequence | 256 |
# | $D$ | width of a token's vector | 128 |
# | $H$ | heads: attention is done $H$ times side by side | 4 |
# | $d = D/H$ | width of one head | 32 |

# %% [markdown]
# ## Exercise 1 · RMSNorm
#
# *5 minutes · difficulty ●○○○○*
#
# Blocks ADD to $x$, so its size may grow from layer to layer. Each part therefore reads a copy whose size is always about the same: RMSNorm (Zhang and Sennrich, 1910.07467, eq. 4) divides each position's vector by its root mean square:
#
# $$\mathrm{RMSNorm}(x)_i = \frac{x_i}{\sqrt{\frac1D \sum_j x_j^2 + \epsilon}}\; w_i$$
#
# | name | shape | meaning |
# |---|---|---|
# | `x` | `[..., D]` | any number of dimensions before the last |
# | `weight` | `[D]` | the learned $w$ |
# | `eps` | a number | keeps the root away from 0 |


# %%
def rms_norm(x, weight, eps):
    """x [..., D] over the root mean square of its last dimension, times weight [D]; [..., D]."""
    # BEGIN SOLUTION
    mean_square = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * weight
    # END SOLUTION


# %%
my_rms_norm = check(rms_norm)

# %% [markdown]
# Stuck? `hint("rms_norm")` gives a nudge; call it again for the idea, and a third time for a solution. A check of an exercise never blocks you: it hands back your function if it is right, and the reference if not, so every cell below runs either way.
#
# ## Exercise 2 · RoPE
#
# *8 minutes · difficulty ●●○○○*
#
# Attention by itself sees a set of tokens, not a sequence. RoPE (2104.09864, eq. 34) turns each pair of neighbouring columns $(x_{2i}, x_{2i+1})$ of a query or key by an angle $t f_i$ that grows with the position $t$, fast for the first pairs, slowly for the last:
#
# $$\begin{pmatrix} y_{2i} \\ y_{2i+1} \end{pmatrix} = \begin{pmatrix} \cos t f_i & -\sin t f_i \\ \sin t f_i & \cos t f_i \end{pmatrix} \begin{pmatrix} x_{2i} \\ x_{2i+1} \end{pmatrix}, \qquad f_i = 10000^{-2i/d}$$

# %% tags=["hide-input"]
fig, axes = plots.figure(7, 3, columns=2)
cos, sin = layers.rope_tables(cfg, torch.arange(6))
for panel, pair in zip(axes, (0, 10), strict=True):
    for t in range(6):
        x, y = cos[t, pair].item(), sin[t, pair].item()
        shade = {"color": plots.COLORS[0], "alpha": 0.3 + 0.14 * t}
        panel.plot([0, x], [0, y], marker="", linestyle="-", **shade)
        if pair == 0 or t == 5:
            panel.annotate(f"t={t}", (1.2 * x, 1.2 * y), ha="center", va="center")
    panel.set(title=f"pair {pair}", aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
    panel.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
plots.show(fig, "RoPE at positions 0 to 5: pair 0 goes almost all the way round, pair 10 stays.")

# %% [markdown]
# | name | shape | meaning |
# |---|---|---|
# | `x` | `[B, T, H, d]` | queries or keys; each head of width $d$ is turned alike |
# | `cos`, `sin` | `[T, d/2]` | `cos[t, i]` is $\cos(t f_i)$, computed for you |
#
# Keep the pairs where they are, as in DeepSeek's checkpoints: the result is `[B, T, H, d]` with the turned pair $i$ in columns $2i$ and $2i+1$.


# %%
def apply_rope(x, cos, sin):
    """Turn the pairs (2i, 2i+1) of x [B, T, H, d] by cos and sin [T, d/2]; gives [B, T, H, d]."""
    # BEGIN SOLUTION
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2)
    # END SOLUTION


# %%
my_rope = check(apply_rope)

# %% [markdown]
# Why turn at all? Because then the product of a query and a key depends on their DISTANCE alone. The next cell puts one query and one key at several places:

# %%
q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
for at_q, at_k in ((5, 3), (105, 103), (1005, 1003), (5, 4)):
    cos, sin = layers.rope_tables(cfg, torch.tensor([at_q, at_k]))
    product = (my_rope(q, cos[:1], sin[:1]) * my_rope(k, cos[1:], sin[1:])).sum()
    print(f"query at {at_q:4d}, key at {at_k:4d}, distance {at_q - at_k}: product {product:.3f}")

# %% [markdown]
# ## Exercise 3 · Causal attention
#
# *15 minutes · difficulty ●●●○○*
#
# Each position asks a question $q_t$; every earlier position offers a key $k_s$ and a value $v_s$. The answer is a mean of the values, weighted by how well the keys fit (1706.03762, eq. 1):
#
# $$o_t = \sum_{s \le t} a_{ts}\, v_s, \qquad a_{t\,\cdot} = \mathrm{softmax}_s\left(q_t \cdot k_s \cdot \mathrm{scale}\right)$$
#
# $s \le t$ is the whole honesty of a language model: a position that saw the next token would only copy it. Each head does this by itself, in $d$ columns.
#
# | name | shape |
# |---|---|
# | `q`, `k`, `v` | `[B, T, H, d]` |
# | `scale` | a number, $1/\sqrt d$ for plain attention |
# | result | `[B, T, H, d]` |
#
# Two tools that you may need: `torch.einsum("bthd,bshd->bhts", q, k)` multiplies and sums over the letters that are missing on the right; `scores.masked_fill(hidden, value)` overwrites where `hidden` is True.


# %%
def causal_attention(q, k, v, scale):
    """The softmax over s <= t of q_t . k_s * scale, times v_s; q, k, v and result [B, T, H, d]."""
    # BEGIN SOLUTION
    T = q.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
    # END SOLUTION


# %%
my_attention = check(causal_attention)

# %% [markdown]
# ## Exercise 4 · SwiGLU
#
# *5 minutes · difficulty ●○○○○*
#
# Attention moves information between positions; the feed-forward part works on each position alone. SwiGLU (2002.05202, section 2) has two projections to an inner width $W$. One passes through $\mathrm{silu}(z) = z \cdot \sigma(z)$ and acts as a **gate** that opens or shuts the other:
#
# $$\mathrm{SwiGLU}(x) = W_{down}\left(\mathrm{silu}(W_{gate}\,x) \odot W_{up}\,x\right)$$
#
# | name | shape |
# |---|---|
# | `x` | `[..., D]` |
# | `w_gate`, `w_up` | `[W, D]` |
# | `w_down` | `[D, W]` |
#
# Weights are stored as `nn.Linear` stores them, `[out, in]`; `F.linear(x, w)` multiplies by such a matrix.


# %%
def swiglu(x, w_gate, w_up, w_down):
    """down(silu(gate(x)) * up(x)); x and result [..., D], w_gate and w_up [W, D], w_down [D, W]."""
    # BEGIN SOLUTION
    gate = F.silu(F.linear(x, w_gate))
    return F.linear(gate * F.linear(x, w_up), w_down)
    # END SOLUTION


# %%
my_swiglu = check(swiglu)

# %% [markdown]
# ## Your transformer
#
# The next cell is the whole model, in your four functions: what `model` contributes is weights alone. Does it compute what `minids.Transformer` computes from the same weights?


# %%
def my_hidden(model, tokens):
    """The hidden states [B, T, D] behind the last norm, for tokens [B, T]."""
    x, eps = model.embed_tokens(tokens), cfg.rms_norm_eps
    cos, sin = layers.rope_tables(cfg, torch.arange(tokens.shape[1]))
    for block in model.layers:
        attn, mlp = block.self_attn, block.mlp
        h = my_rms_norm(x, block.input_layernorm.weight, eps)
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (proj(h).unflatten(-1, (attn.heads, -1)) for proj in projections)
        q, k = my_rope(q, cos, sin), my_rope(k, cos, sin)
        x = x + attn.o_proj(my_attention(q, k, v, attn.scale).flatten(-2))
        h = my_rms_norm(x, block.post_attention_layernorm.weight, eps)
        x = x + my_swiglu(h, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    return my_rms_norm(x, model.norm.weight, eps)


tokens = text.tokens[:100].long()[None]
with torch.no_grad():
    error = minids.numerics.relative_error(model.lm_head(my_hidden(model, tokens)), model(tokens))
print(f"largest difference of the logits: {error:.0e} of their size")
assert error < 1e-5, "the model is not yours all through: run the cells above again, in order"

# %% [markdown]
# ## Exercise 5 · Bits per byte
#
# *4 minutes · difficulty ●○○○○*
#
# `F.cross_entropy` gives the mean of $-\ln p$ over the tokens: **nats per token**. Two things keep it from being comparable: natural logarithms, and tokens, which are longer or shorter as the vocabulary likes. Turn it into bits per byte. One bit is $\ln 2$ nats.
#
# | name | meaning |
# |---|---|
# | `nats_per_token` | the mean loss |
# | `tokens`, `nbytes` | how many tokens, and how many bytes, the text has |


# %%
def bits_per_byte(nats_per_token, tokens, nbytes):
    """Bits for each of the nbytes bytes of a text, whose tokens cost nats_per_token nats each."""
    # BEGIN SOLUTION
    bits = nats_per_token * tokens / math.log(2)
    return bits / nbytes
    # END SOLUTION


# %%
my_bits_per_byte = check(bits_per_byte)

# %% [markdown]
# ## Train it
#
# Five minutes now, with your functions in every step. The optimizers are those of the whole course (Muon for matrices, AdamW for the rest; both turn gradients into steps). Watch the curve pass gzip; will it pass xz? The two level lines are for the held-out files, and the curve is for the files that it learns from, so the end of the story comes after it. Stop early with ■ if you must: what is trained stays.

# %% tags=["nbval-ignore-output"]


def my_loss(model, inputs, targets):
    """What to differentiate, and the loss to show: both are the cross-entropy here."""
    with torch.autocast("cpu", enabled=False):  # all in float32, in which your functions passed
        logits = model.lm_head(my_hidden(model, inputs)).flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten())
    return nats, nats.detach()


length = minutes(5)
run = train_live(model, text, minutes=length, loss=my_loss, sample_at=(10, 60, 240))

# %% [markdown]
# What it wrote on the way, each time continuing `def `:

# %% tags=["nbval-ignore-output"]
for seconds, words in run.samples:
    print(f"── after {seconds} seconds ──\n{words}\n")

# %% [markdown]
# ## Did it beat xz?
#
# Only the held-out files count. The next cell measures their loss (by the fast forward pass of minids, whose logits are yours, as shown above: less than a minute) and turns it into bits per byte by YOUR fifth function.

# %% tags=["nbval-ignore-output"]
began = time.perf_counter()
nats_per_token, n_tokens, nbytes = run.heldout()
seconds = time.perf_counter() - began
measured = my_bits_per_byte(nats_per_token, n_tokens, nbytes)
print(f"held out: {measured:.2f} bits per byte; gzip {corpus.gzip_bpb:.2f}, xz {corpus.xz_bpb:.2f}")
guess.compare(measured)

rows = {"untrained": untrained, "gzip -9": corpus.gzip_bpb}
rows |= {"xz -9e": corpus.xz_bpb, "yours": measured}
fig, axes = plots.figure(7, 2.6)
plots.bars(axes, rows, form=".2f")
axes.set(xlabel="bits per byte on the held-out files: shorter is better")
plots.show(fig, "Bits per byte on the held-out files: untrained, gzip, xz, your transformer.")

# %% [markdown]
# ## How fast was it?
#
# A training step costs about $6N$ floating-point operations per token (2 forward, 4 backward) for $N$ parameters, the embedding not counted, which is only looked up; attention comes on top. Set against what this machine reaches in one large matrix product, that says how much of it your code uses (where the machine is fastest in bfloat16, the product is in that format; your functions compute in float32). The rest goes into softmax, norms and reading and writing memory: the subject of lessons 05 and 06.

# %% tags=["nbval-ignore-output"]
per_token = minids.accounting.train_flops_per_token(cfg, 256)
here = machine.measure()
reached = per_token * run.tokens_per_second
print(f"{run.tokens_per_second:,.0f} tokens/s of {per_token / 1e6:.1f} MFLOP each")
print(f"that is {reached / 1e9:.0f} GFLOP/s; one large product reaches {here.flops / 1e9:.0f} here")
for name in ("H200", "RTX 4090"):
    limit = minids.accounting.peak(name, torch.bfloat16) / per_token
    print(f"{name}: at most {limit / 1e6:.0f}M tokens/s by its peak (arithmetic, not measured)")
machine.recorded("train")

# %% [markdown]
# ## What does it look at?
#
# **Question:** is there a head that mostly looks at the token just before? It would show as a bright line right below the diagonal. Each row is a query, and shows where its attention goes. Move the sliders; then change `line` and run its cell and the next one again.

# %%
line = "for name in names:\n    print(name, names[name])"


# %%
@torch.no_grad()
def attention_weights(line):
    """The trained model's attention weights [L, H, T, T] over a line, and its tokens as text."""
    ids = torch.tensor([text.tokenizer.encode(line).ids])
    x, weights = model.embed_tokens(ids), []
    cos, sin = layers.rope_tables(cfg, torch.arange(ids.shape[1]))
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for block in model.layers:
        h, attn = block.input_layernorm(x), block.self_attn
        both = (proj(h).unflatten(-1, (attn.heads, -1)) for proj in (attn.q_proj, attn.k_proj))
        q, k = (my_rope(t, cos, sin) for t in both)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * attn.scale
        weights.append(scores.masked_fill(future, float("-inf")).softmax(-1)[0])
        x = block(x, cos, sin)
    words = [text.tokenizer.decode([i]).strip() or "⏎" for i in ids[0].tolist()]
    return torch.stack(weights), words


# %%
def draw(figure, layer, head):
    weights, words = attention_weights(line)
    axes = figure.subplots()
    plots.heat(axes, weights[layer, head], "weight", rows=words, columns=words)
    axes.set(xlabel="key", ylabel="query")
    axes.tick_params(axis="x", rotation=60)


weights, _ = attention_weights(line)
before = weights.diagonal(-1, 2, 3).mean(-1)
layer, head = divmod(before.argmax().item(), before.shape[1])
print(f"layer {layer}, head {head} looks most at the token before: mean weight {before.max():.2f}")
explore(draw, alt="Attention weights of one head", size=(6.5, 5.5), layer=(0, 3), head=(0, 3))

# %% [markdown]
# ## When does it not pay?
#
# xz needs no training and no weights. As a compressor of one megabyte your transformer is absurd, whoever won above. It pays where the SAME model serves many texts, or where you want what no compressor has: a continuation.

# %% tags=["nbval-ignore-output"]
import lzma

began = time.perf_counter()
_ = lzma.compress(b"".join(corpus.heldout), preset=9 | lzma.PRESET_EXTREME)
by_xz = time.perf_counter() - began
print(f"xz: {nbytes / by_xz / 1e6:.2f} MB/s, no training")
print(f"yours: {nbytes / seconds / 1e6:.2f} MB/s to evaluate; {run.seconds:.0f} s of training")
saved = (corpus.xz_bpb - measured) * nbytes / 8e3
won = f"{saved:,.0f} kB smaller than xz" if saved > 0 else f"{-saved:,.0f} kB larger than xz"
print(f"the files by your model: {won}; its weights, 2 bytes each: {2 * size / 1e3:,.0f} kB")

# %% [markdown]
# ## In the real DeepSeek
#
# DeepSeek-V3 (2412.19437, sections 2.1 and 4.2) is this block, grown:
#
# | | yours | DeepSeek-V3 |
# |---|---|---|
# | layers, hidden width | 4, 128 | 61, 7168 |
# | heads | 4, each 32 wide | 128, each 192 wide for queries and keys |
# | attention | plain | Multi-head Latent Attention (lesson 03) |
# | feed-forward | SwiGLU of 384 | SwiGLU of 18432 in 3 layers, then 256 experts of 2048 (lesson 07) |
# | RoPE | on all of a head | on 64 of 192 columns, its slow turns stretched for long texts (YaRN) |
#
# RMSNorm, RoPE in interleaved pairs and SwiGLU stay what you wrote. Later models changed attention again: V3.2 added sparse attention, and V4, by public code and posts, replaced MLA by shared keys and values in compressed layers.

# %% tags=["nbval-ignore-output"]
for name in ("deepseek-v2-lite", "deepseek-v3"):
    total, active = minids.accounting.parameters(minids.ModelConfig.preset(name))
    print(f"{name}: {total / 1e9:.1f}B parameters, {active / 1e9:.1f}B active per token")

# %% [markdown]
# ## To remember
#
# 1. A block ADDS attention and a feed-forward to its input, each behind a norm.
# 2. RoPE turns queries and keys, so their product depends on their distance alone.
# 3. Bits per byte, on files that nobody trained on, compares any model with any compressor.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Which part of a block moves information between positions?
# <details><summary>the feed-forward</summary>No: it works on each position alone.</details>
# <details><summary>attention</summary>Yes, and nothing else does.</details>
#
# **2.** Your training loss is 0.01 bits per byte after a minute. What happened?
# <details><summary>the model is very good</summary>Hardly: you saw what xz needs.</details>
# <details><summary>the mask lets it see the next token</summary>Yes: then it only copies.</details>
#
# **3.** All positions move 1000 further. What changes in attention?
# <details><summary>everything: RoPE's angles are others</summary>The angles are, but not their differences.</details>
# <details><summary>nothing</summary>Yes: only distances count.</details>
#
# **4.** Model A has 3.0 nats per token, B 2.5. Which predicts better?
# <details><summary>B</summary>Only if both have the same vocabulary.</details>
# <details><summary>one cannot tell</summary>Yes: their tokens may differ in length. Ask for bits per byte.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`, `from minids.lab import load_text, train_live` and `text = load_text(vocab_size=2048)`. For a model, `run = train_live(model, text, minutes=5)` takes five minutes, and `run.heldout()` about one more; its three numbers go into `minids.data.bits_per_byte`.
#
# 1. Train the model of this lesson anew (`minids` is faster than your functions, so it gets more steps): `minids.Transformer(cfg)` with `cfg = minids.ModelConfig.preset("tiny", attention="mha", n_routed_experts=0)`. Then another with `attention="gqa", num_key_value_heads=1`, whose heads share one key and one value. What does that cost in bits per byte, and how much smaller is `minids.accounting.kv_bytes_per_token(cfg)`? (Lesson 02 tells why that matters.)
#    <details><summary>Expected</summary>512 bytes a token instead of 2,048: one K/V head for four query heads. The model is smaller as well (1,279,104 parameters, not 1,377,408), and its steps are cheaper, so the loss does not show sharing alone. Whether a difference is more than chance, a second seed tells: `torch.manual_seed(1)` before the model, `seed=1` in `train_live`.</details>
# 2. `minids.ModelConfig.preset("tiny")` by itself is the mini-DeepSeek, with latent attention and experts. Train it in the same way. Does it beat the first model in the same five minutes, and does `run.tokens_per_second` tell why? (`python -m minids.train --preset tiny --minutes 5 --out DIR` trains it too, but its five minutes include the measurement.)
#    <details><summary>Expected</summary>A token is multiplied with 1,056,176 of its 2,203,056 parameters, and with 1,115,264 of the first model's: nearly as much arithmetic, in more and smaller operations, so look at the tokens per second first. The cache has 640 bytes a token. The ladder in README.md has measured both steps, to latent attention and to experts, with three seeds.</details>

# %%
status()
