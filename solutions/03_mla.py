# ---
# title: Multi-head Latent Attention
# promise: You replace the keys and values in the cache by one short vector per token, build the whole attention layer of DeepSeek around it, and race it against plain attention at equal size.
# minutes: 75
# difficulty: 3
# needs: [torch]
# objectives:
#   - see how few directions a trained model's keys and values need
#   - compress keys and values into one latent, and make them again for every head
#   - show why RoPE must stay away from the latent, and give it columns of its own
#   - build the whole layer, equal to that of minids, and count its cache on live tensors
#   - race it at equal size and equal cache, and say honestly what the race shows
# ---

# %%
import copy
import functools

import torch
import torch.nn.functional as F

import minids
from minids import accounting, layers
from minids.lab import check, explore, fast, hint, load_text, machine
from minids.lab import plots, predict, status, train_live

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: a smaller cache, by force
#
# In lesson 02 every token left $2Hd$ numbers in the cache of each layer: a key and a value for each of $H$ heads of width $d$. All of them are read again for every new token. Sharing heads (GQA) makes the cache smaller. What does that cost?
#
# First a model to try it on: two layers, $H = 8$ heads of width $d = 16$, a key and a value for each. The next two cells train it, on the text of lesson 01, and measure its **loss** on a sample of held-out files, in bits per byte as there. Reading the text and training take less than a minute, mostly.

# %% tags=["nbval-ignore-output"]
STEPS, SEEDS, PIECES = (4, 2, 4) if fast() else (80, 3, 32)
if fast():
    print("MINIDS_FAST is set: 4 steps instead of 80, so the losses below mean nothing")
text = load_text(vocab_size=2048)
unseen = minids.data.encode_files(text.tokenizer, text.corpus.heldout)
bytes_per_token = sum(map(len, text.corpus.heldout)) / len(unseen)
sample = minids.data.batch(unseen, 0, 0, PIECES, 256)  # pieces of 256 tokens, and what follows


def short(model, inputs, targets):
    """The loss of the first 128 tokens of each of the 16 pieces of a batch: half the work."""
    return model.loss(inputs[:, :128], targets[:, :128])


def train(model, seed):
    """The model after STEPS steps of training."""
    return train_live(model, text, steps=STEPS, seed=seed, loss=short, live=False).model


@torch.no_grad()
def bits(model):
    """Bits per byte on the held-out sample."""
    _, nats = model.loss(*sample)  # first the loss to differentiate, then the plain one per token
    return minids.data.bits_per_byte(nats.item(), tokens=1, nbytes=bytes_per_token)


# %% tags=["nbval-ignore-output"]
common = {"num_hidden_layers": 2, "num_attention_heads": 8, "n_routed_experts": 0}
cfg = minids.ModelConfig.preset("tiny", attention="mha", **common)
torch.manual_seed(0)
baseline = train(minids.Transformer(cfg), seed=0)
whole = bits(baseline)
print(f"{accounting.parameters(cfg).total:,} parameters, {STEPS} steps of training")
print(f"held out: {whole:.3f} bits per byte")

# %% [markdown]
# Now the force. Take 4, 2 or 1 heads for keys and values instead of 8, each the AVERAGE of those that it replaces. That is how the GQA paper shrinks a trained model (2305.13245, section 2.1), though it trains on afterwards, and we do not yet. Keys and values are products with the weights `k_proj` and `v_proj`, and RoPE turns all heads alike, so averaging those weights is enough. For comparison, the last row takes attention away: all keys and values are zero.


# %%
@torch.no_grad()
def edited(model, change):
    """A copy with change(W, layer) for each layer's W [256, 128]: k_proj above v_proj."""
    model = copy.deepcopy(model)
    for number, block in enumerate(model.layers):
        both = block.self_attn.k_proj.weight, block.self_attn.v_proj.weight
        for old, new in zip(both, change(torch.cat(both), number).chunk(2), strict=True):
            old.copy_(new)
    return model


def averaged(heads):
    """The change that leaves only `heads` different heads for keys, and as many for values."""

    def change(W, layer):
        grouped = W.view(2, heads, 8 // heads, 16, 128).mean(2, keepdim=True)
        return grouped.expand(2, heads, 8 // heads, 16, 128).reshape(256, 128)

    return change


# %% tags=["nbval-ignore-output"]
forced = {2 * heads * 16: bits(edited(baseline, averaged(heads))) for heads in (8, 4, 2, 1)}
nothing = bits(edited(baseline, lambda W, layer: torch.zeros_like(W)))
for numbers, loss in forced.items():
    print(f"{numbers:3d} numbers per token and layer: {loss:.3f} bits per byte")
print(f"no attention at all:               {nothing:.3f}")
lost = (forced[64] - whole) / (nothing - whole)
print(f"64 numbers: {lost:.0%} of what attention was good for is gone")

# %% [markdown]
# Read down the column: each row halves the cache, and that is its price. Is there a cheaper way?
#
# ### Your prediction
#
# Put a token's keys and values of one layer side by side: a vector of 256 numbers, a point in 256 dimensions. Choose $r$ fixed directions, the best that there are. Cache only the $r$ coordinates of the point along them, and rebuild the 256 numbers from those.
#
# How large must $r$ be for the loss to stay within 1% of the untouched model's? Look at what averaging did with 128 numbers, then write a number from 1 to 256 in place of `None`.

# %%
my_guess = None  # a number of directions, from 1 to 256
guess = predict("How many directions keep the loss within 1%?", my_guess, "directions")

# %% [markdown]
# ## Few directions carry it
#
# Which directions are best? The **singular value decomposition** (SVD) finds them. For a matrix with one row per token it gives directions in order: along the first the rows are longest together, along the second what is then left, and so on. The sum of the squares along a direction is its **energy**.
#
# The next cell takes the keys and values of 4,096 tokens of the training text, and finds each layer's directions.


# %% tags=["nbval-ignore-output"]
@torch.no_grad()
def keys_and_values(model, tokens):
    """For each layer, the keys before RoPE beside the values: [tokens, 256]."""
    x, rows = model.embed_tokens(tokens), []
    cos, sin = layers.rope_tables(model.cfg, torch.arange(tokens.shape[1]))
    for block in model.layers:
        h, attn = block.input_layernorm(x), block.self_attn
        rows.append(torch.cat([attn.k_proj(h), attn.v_proj(h)], -1).flatten(0, 1))
        x = block(x, cos, sin)
    return rows


tokens, _ = minids.data.batch(text.tokens, 0, 9, 32, 128)
rows = keys_and_values(baseline, tokens)
directions = [torch.linalg.svd(kv, full_matrices=False)[2] for kv in rows]  # best first


def along(basis, r):
    """The change that takes the coordinates along the first r directions, and rebuilds."""
    return lambda W, layer: basis[layer][:r].T @ (basis[layer][:r] @ W)


ranks = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
low_rank = {r: bits(edited(baseline, along(directions, r))) for r in ranks}

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(7, 3.8)
axes.plot(*zip(*low_rank.items(), strict=True))
axes.plot(*zip(*forced.items(), strict=True))
for name, kept, loss in (("best directions", 8, low_rank[8]), ("averaged heads", 64, forced[64])):
    axes.annotate(name, (kept, loss), xytext=(10, 4), textcoords="offset points")
for level, name in ((whole, "untouched"), (nothing, "no attention")):
    axes.axhline(level, color=plots.INK, linewidth=1, linestyle=":")
    axes.annotate(name, (1, level), xytext=(0, 3), textcoords="offset points")
axes.set(xscale="log", xlabel="numbers kept per token and layer", ylabel="bits per byte")
axes.set_xticks([1, 4, 16, 64, 256], [1, 4, 16, 64, 256])
axes.minorticks_off()
plots.show(fig, "Held-out loss over the numbers kept: best directions, averaged heads.")
enough = min((r for r in ranks if low_rank[r] <= 1.01 * whole), default=256)
if not fast():
    guess.compare(enough)
random = [torch.linalg.qr(torch.randn(256, 256))[0] for _ in rows]
at_random = bits(edited(baseline, along(random, 64)))
print(f"64 numbers: averaged heads {forced[64]:.3f}, 64 random directions {at_random:.3f},")
print(f"            64 best directions {low_rank[64]:.3f}, untouched {whole:.3f}")

# %% [markdown]
# Two warnings before you believe the figure.
#
# - Half of it is free: keys and values are both products with the same input of $D = 128$ columns, so they never fill more than 128 of the 256 dimensions.
# - Little loss does not mean that little energy was left out. The next cell counts the directions that hold 99% of the energy; compare that with the number that the loss asked for. The more there are between the two, the more of what keys and values contain makes no difference to the prediction.
#
# And a question for the next section: what happens to the count when RoPE turns the keys? The same key then points elsewhere at every position.


# %% tags=["nbval-ignore-output"]
def needed(matrix, share=0.99):
    """How many directions hold `share` of the energy of a matrix [tokens, columns]."""
    energy = torch.linalg.svdvals(matrix).square()
    return int((energy.cumsum(0) / energy.sum() < share).sum()) + 1


cos, sin = layers.rope_tables(cfg, torch.arange(128))
for number, kv in enumerate(rows):
    keys = kv[:, :128]
    turned = layers.apply_rope(keys.view(32, 128, 8, 16), cos, sin).reshape(-1, 128)
    print(f"layer {number}: keys and values together {needed(kv)} of at most 128 directions,")
    print(f"         keys alone {needed(keys)} of 128; turned by RoPE {needed(turned)} of 128")

# %% [markdown]
# ## The idea, and an obstacle
#
# DeepSeek-V2 (2405.04434, section 2.1.2) does not search for directions afterwards: it LEARNS them. From a token's input $x$ one matrix makes a short vector $c$, the **latent**, and two matrices make keys and values from it:
#
# $$c = W_{DKV}\, x, \qquad k = W_{UK}\, c, \qquad v = W_{UV}\, c$$
#
# ($D$ for down, $U$ for up.) Only $c$ is cached. Better still, keys need not be built at all. For a query $q$,
#
# $$q \cdot (W_{UK}\, c) = (W_{UK}^{T}\, q) \cdot c$$
#
# so one small product moves the matrix to the query, and the query meets the latents as they lie in the cache. This is called **absorbing**; lesson 04 lives on it.
#
# RoPE breaks it. It turns the query by its position $t$ and the key by its position $s$. What then stands between $q$ and $c$? The next cell builds that matrix, for one head.

# %%
W_uk = torch.randn(16, 48) / 48**0.5  # makes a key of 16 numbers from a latent of 48


def between(t, s):
    """The matrix [16, 48] between a query at position t and a latent at s, with RoPE."""
    # the queries are the 16 unit vectors, the keys those of the 48 unit latents
    cos, sin = layers.rope_tables(cfg, torch.tensor([t, s]))
    q = layers.apply_rope(torch.eye(16)[:, None, None], cos[:1], sin[:1]).flatten(1)
    k = layers.apply_rope(W_uk.T[:, None, None], cos[1:], sin[1:]).flatten(1)
    return q @ k.T


def moved(t, s):
    """How far between(t, s) is from W_uk, relative to the size of W_uk."""
    return ((between(t, s) - W_uk).norm() / W_uk.norm()).item()


for t, s in ((7, 7), (8, 7), (108, 107), (20, 7)):
    print(f"query at {t:3d}, latent at {s:3d}, distance {t - s:2d}: differs by {moved(t, s):.1%}")

# %%
fig, axes = plots.figure(7, 3)
axes.plot(range(65), [moved(distance, 0) for distance in range(65)], marker="")
axes.set(xlabel="distance from query to key", ylabel="change of the matrix / its size")
plots.show(fig, "How far RoPE moves the matrix between query and latent, over their distance.")

# %% [markdown]
# Lines 2 and 3 of the print agree: only the distance counts. But the matrix is another one for every distance, so no single one can move to the query: at each step all old keys would have to be made from their latents again, and turned again (2405.04434, section 2.1.3). Or the turned keys would have to be cached, for every head: that is MHA's cache again.
#
# The way out is **decoupled RoPE**. Each head's query and key get two kinds of columns:
#
# - **nope** columns ("no position embedding"): the key's are made from the latent and never turned;
# - **rope** columns: the key's come straight from $x$, are turned once and cached beside the latent. That is ONE short key for all heads; the queries have one per head.
#
# The score is the sum of both products:
#
# $$\mathrm{score}_{ts} = \left(q^{nope}_t \cdot k^{nope}_s + q^{rope}_t \cdot k^{rope}_s\right) \cdot \mathrm{scale}$$

# %% [markdown]
# Does that bring absorbing back? The next cell lets a query at position 63 meet 64 latents, in both ways: keys made from the latents and turned, and decoupled. Each time it compares the true scores with those of ONE matrix moved to the query: $W_{UK}$ itself, and for the turned keys also the mean of the 64 true matrices, which is nearest to all of them in squares.

# %%
cos, sin = layers.rope_tables(cfg, torch.arange(64))
c, q_nope, k_rope, q_rope = (torch.randn(64, width) for width in (48, 16, 16, 16))


def turn(x):
    """The rows of x [64, 16], each turned by its position."""
    return layers.apply_rope(x[:, None], cos, sin)[:, 0]


k_nope, at_once = c @ W_uk.T, c @ (W_uk.T @ q_nope[63])  # all keys; one matrix for all
by_rope = turn(k_rope) @ turn(q_rope)[63]
turned = turn(k_nope) @ turn(q_nope)[63]
nearest = sum(between(63, s) for s in range(64)) / 64
for name, true, absorbed in (
    ("keys of the latent turned", turned, at_once),
    ("the same, nearest matrix", turned, c @ (nearest.T @ q_nope[63])),
    ("decoupled", k_nope @ q_nope[63] + by_rope, at_once + by_rope),
):
    error = minids.numerics.relative_error(absorbed, true)
    print(f"{name:25}: one matrix is off by {error:.1e} of the largest score")

# %% [markdown]
# An error of about $10^{-7}$ is the rounding of float32: there the two ways are the same.
#
# ### The letters
#
# $B$, $T$, $D$, $H$ and $d = D/H$ are those of lessons 01 and 02. New ones, with the sizes of the model that you will race:
#
# | letter | meaning | config field | here |
# |---|---|---|---|
# | $T$, $S$ | query and key positions; equal in training | | 128 |
# | $C$ | width of the latent | `kv_lora_rank` | 48 |
# | $R$ | rope columns of a query, and of the shared key | `qk_rope_head_dim` | 16 |
# | $P$ | nope columns of a head's query and key | `qk_nope_head_dim` | 16 |
# | $V$ | columns of a head's value | `v_head_dim` | 16 |
#
# $P$, $R$ and $V$ may be chosen freely ($R$ even, for RoPE turns pairs); none of them has to be $d$. A query now has $P + R$ columns, and the scale is $1/\sqrt{P+R}$.

# %% [markdown]
# ## Exercise 1 · What is cached
#
# *8 minutes · difficulty ●●○○○*
#
# One matrix makes latent and rope key together. The latent then goes through RMSNorm, and the rope key through RoPE (V3 report, 2412.19437, eq. 1 and 3; the norm is in section 4.2):
#
# $$[\,\tilde c_t \mid \tilde k_t\,] = W\, x_t, \qquad c_t = \mathrm{RMSNorm}(\tilde c_t), \qquad k^{rope}_t = \mathrm{RoPE}_t(\tilde k_t)$$
#
# | name | shape | meaning |
# |---|---|---|
# | `x` | `[B, T, D]` | the layer's input |
# | `w_kv_a` | `[C+R, D]` | $W$, stored `[out, in]` as ever |
# | `norm_weight` | `[C]` | of the RMSNorm; its length tells $C$ |
# | `cos`, `sin` | `[T, R/2]` | RoPE's tables |
# | `eps` | a number | of the RMSNorm |
# | result | `[B, T, C]`, `[B, T, R]` | latent, rope key |
#
# Tools: `F.linear(x, w)`; `y.split([a, b], -1)` cuts the last dimension; from lesson 01 `layers.rms_norm(x, weight, eps)` and `layers.apply_rope(x, cos, sin)`, which wants a head axis: `[B, T, heads, R]`.


# %%
def compress_kv(x, w_kv_a, norm_weight, cos, sin, eps):
    """The latent [B, T, C] after its norm and the rope key [B, T, R], turned, of x [B, T, D]."""
    # BEGIN SOLUTION
    C, R = norm_weight.shape[0], 2 * cos.shape[-1]
    latent, rope_key = F.linear(x, w_kv_a).split([C, R], -1)
    rope_key = layers.apply_rope(rope_key.unsqueeze(-2), cos, sin)
    return layers.rms_norm(latent, norm_weight, eps), rope_key.squeeze(-2)
    # END SOLUTION


# %%
my_compress_kv = check(compress_kv)

# %% [markdown]
# ## Exercise 2 · Keys and values for every head
#
# *5 minutes · difficulty ●●○○○*
#
# $W_{UK}$ and $W_{UV}$ are two matrices in the paper (V3 eq. 2 and 5) and one in every checkpoint, `kv_b_proj`. It turns a latent into $H(P+V)$ columns, in this order:
#
# | head 0 | head 0 | head 1 | head 1 | … |
# |---|---|---|---|---|
# | $P$ of its key | $V$ of its value | $P$ of its key | $V$ of its value | … |
#
# | name | shape | meaning |
# |---|---|---|
# | `kv` | `[B, S, H*(P+V)]` | what `kv_b_proj` gives |
# | `heads`, `nope` | numbers | $H$ and $P$ |
# | result | `[B, S, H, P]`, `[B, S, H, V]` | keys without rope, values |
#
# Stuck? `hint("split_heads_kv")`, called again for more. A tool: `y.unflatten(-1, (a, b))` splits the last dimension into two, of which the second changes with every column; `-1` for one of them means "what is left".


# %%
def split_heads_kv(kv, heads, nope):
    """The nope keys [B, S, H, P] and values [B, S, H, V] in kv [B, S, H*(P+V)]."""
    # BEGIN SOLUTION
    per_head = kv.unflatten(-1, (heads, -1))
    return per_head[..., :nope], per_head[..., nope:]
    # END SOLUTION


# %%
my_split_heads_kv = check(split_heads_kv)

# %% [markdown]
# ## Exercise 3 · The queries
#
# *5 minutes · difficulty ●●○○○*
#
# Queries are not cached, so nothing forces them to be short; they come from $x$ by one matrix (V3 shortens them all the same, eq. 6, to save memory in training). Each head has its nope columns, then its rope columns, which are turned (V3 eq. 7 to 9):
#
# | name | shape | meaning |
# |---|---|---|
# | `q` | `[B, T, H*(P+R)]` | columns: head 0's $P$ nope, its $R$ rope, head 1's … |
# | `heads`, `nope` | numbers | $H$ and $P$ |
# | `cos`, `sin` | `[T, R/2]` | RoPE's tables |
# | result | `[B, T, H, P]`, `[B, T, H, R]` | nope part; rope part, turned |


# %%
def decoupled_rope(q, heads, nope, cos, sin):
    """The nope queries [B, T, H, P], and the rope queries [B, T, H, R], turned."""
    # BEGIN SOLUTION
    per_head = q.unflatten(-1, (heads, -1))
    return per_head[..., :nope], layers.apply_rope(per_head[..., nope:], cos, sin)
    # END SOLUTION


# %%
my_decoupled_rope = check(decoupled_rope)

# %% [markdown]
# ## Exercise 4 · Attention
#
# *12 minutes · difficulty ●●●○○*
#
# Now the whole of it: make keys and values from the latents, add the two scores, and go on as in lesson 01 (V3 eq. 10). This is the **expanded** form, the one for training.
#
# | name | shape | meaning |
# |---|---|---|
# | `q_nope`, `q_rope` | `[B, T, H, P]`, `[B, T, H, R]` | the queries |
# | `c_kv`, `k_rope` | `[B, S, C]`, `[B, S, R]` | what is cached |
# | `kv_b` | `[H, P+V, C]` | the weights of `kv_b_proj`, head by head |
# | `scale` | a number | factor of the scores |
# | result | `[B, T, H, V]` | |
#
# The $T$ queries are the LAST of the $S$ positions: query $t$ sees key $s$ where $s \le t + S - T$. There `torch.ones(T, S).tril(S - T)` is 1, elsewhere 0. `scores.masked_fill(hidden, value)` overwrites where the boolean `hidden` is True.
#
# `F.linear(c_kv, kv_b.flatten(0, 1))` is what exercise 2 cuts. In `torch.einsum` a letter that one factor lacks is shared: `"bthr,bsr->bhts"` lets all heads `h` meet the same key.


# %%
def attend_expanded(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    """Causal attention of the queries [B, T, H, ...] to S cached positions; [B, T, H, V]."""
    # BEGIN SOLUTION
    kv = F.linear(c_kv, kv_b.flatten(0, 1))
    k_nope, v = my_split_heads_kv(kv, kv_b.shape[0], q_nope.shape[-1])
    by_content = torch.einsum("bthp,bshp->bhts", q_nope, k_nope)
    by_position = torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    scores = (by_content + by_position) * scale
    T, S = scores.shape[-2:]
    seen = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)
    # END SOLUTION


# %%
my_attend_expanded = check(attend_expanded)

# %% [markdown]
# ## Your layer
#
# The next cell is a whole MLA layer in your functions; `attn`, a layer of minids, contributes its weights. Do both give the same? The weights are drawn large here, so that a mistake would show.


# %%
def my_mla(attn, x, cos, sin, cache=None):
    """Multi-head Latent Attention with the weights of `attn`: x [B, T, D] to [B, T, D]."""
    H, P = attn.cfg.num_attention_heads, attn.cfg.qk_nope_head_dim
    w_kv_a, norm = attn.kv_a_proj_with_mqa.weight, attn.kv_a_layernorm
    c_kv, k_rope = my_compress_kv(x, w_kv_a, norm.weight, cos, sin, norm.eps)
    q_nope, q_rope = my_decoupled_rope(attn.q_proj(x), H, P, cos, sin)
    kv_b = attn.kv_b_proj.weight.unflatten(0, (H, -1))
    heads = my_attend_expanded(q_nope, q_rope, c_kv, k_rope, kv_b, attn.scale)
    return attn.o_proj(heads.flatten(-2))


latent = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
cfg_mla = minids.ModelConfig.preset("tiny", attention="mla", **common, **latent)
layer = minids.mla.MLA(cfg_mla)
x, (cos, sin) = torch.randn(3, 50, 128), layers.rope_tables(cfg_mla, torch.arange(50))
with torch.no_grad():
    for weight in layer.parameters():
        weight.copy_(torch.rand_like(weight) if weight.dim() == 1 else weight * 4)
    mine = my_mla(layer, x, cos, sin)
    error = minids.numerics.relative_error(mine, layer(x, cos, sin))
print(f"largest difference: {error:.0e} of the size of the result")
assert error < 1e-5, "the layer is not yours all through: run the cells above again, in order"

# %% [markdown]
# ## Exercise 5 · How small is it?
#
# *3 minutes · difficulty ●○○○○*
#
# How many numbers does one MLA layer cache for one token? Fields of `cfg` that may be of use: `num_attention_heads` ($H$), `kv_lora_rank` ($C$), `qk_nope_head_dim` ($P$), `qk_rope_head_dim` ($R$), `v_head_dim` ($V$).


# %%
def latent_cache_elements(cfg):
    """How many numbers an MLA layer of the config `cfg` caches for one token."""
    # BEGIN SOLUTION
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim
    # END SOLUTION


# %%
my_latent_cache_elements = check(latent_cache_elements)

# %% [markdown]
# Is it true? The next cell builds three models: the baseline (MHA), one with 2 key and value heads for 8 query heads (GQA), and MLA. It runs 100 tokens through each, reads the bytes of the caches off the live tensors, and holds the result against `accounting`, which counts from the config alone, and against your function.
#
# GQA and MLA get the same cache. To make the race below fair, all three also get the same number of parameters: what attention saves goes into the width of the feed-forward.


# %%
def resized(cfg):
    """The config with a feed-forward so wide that the model is as large as the baseline."""
    spare = accounting.parameters(baseline.cfg).total - accounting.parameters(cfg).total
    width = cfg.intermediate_size + round(spare / (3 * cfg.hidden_size * cfg.num_hidden_layers))
    changes = {name: getattr(cfg, name) for name in ("attention", "num_key_value_heads")}
    return minids.ModelConfig.preset("tiny", **changes, **common, **latent, intermediate_size=width)


gqa = minids.ModelConfig.preset("tiny", attention="gqa", num_key_value_heads=2, **common)
configs = {"MHA": cfg, "GQA": resized(gqa), "MLA": resized(cfg_mla)}
for name, config in configs.items():
    model = minids.Transformer(config)
    cache = model.new_cache(batch=1, max_len=100)
    with torch.no_grad():
        model(torch.randint(2048, (1, 100)), cache)
    live = sum(layer.nbytes for layer in cache)
    assert live == 100 * accounting.kv_bytes_per_token(config, torch.float32)
    size = accounting.parameters(config).total
    print(f"{name}: {size:,} parameters, cache of 100 tokens in float32 {live:,} bytes")
mine = 100 * 2 * 4 * my_latent_cache_elements(configs["MLA"])
print(f"by your function, 100 tokens, 2 layers, 4 bytes: {mine:,} bytes")

# %% [markdown]
# ## The race
#
# Same data, same steps, same number of parameters; MHA has four times the cache of the others. Each runs from several **seeds** (the number that decides the first weights and the order of the data), because one run alone says nothing: a different seed gives a different loss. MLA trains with YOUR functions (or the references, where a check did not pass).
#
# The cell takes its time, minutes on two cores, and prints a line for each run.

# %% tags=["nbval-ignore-output"]
losses = {name: [] for name in configs}
for seed in range(SEEDS):
    for name, config in configs.items():
        torch.manual_seed(seed)
        model = minids.Transformer(config)
        if name == "MLA":
            for block in model.layers:
                block.self_attn.forward = functools.partial(my_mla, block.self_attn)
        known = (name, seed) == ("MHA", 0)  # the model from the beginning of this lesson
        losses[name].append(whole if known else bits(train(model, seed)))
        print(f"seed {seed}, {name}: {losses[name][-1]:.4f} bits per byte", flush=True)

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(7, 2.6)
for row, name in enumerate(losses):
    style = {"color": plots.COLORS[row], "marker": plots.MARKERS[row], "linestyle": ""}
    axes.plot(losses[name], [row] * SEEDS, **style)
    axes.plot([sum(losses[name]) / SEEDS], [row], marker="|", markersize=22, color=plots.INK)
axes.set_yticks(range(3), list(losses))
axes.set(xlabel="bits per byte, held out: further left is better", ylim=(2.5, -0.5))
plots.show(fig, "The held-out loss of each run and the mean, for MHA, GQA and MLA.")
for name in ("GQA", "MLA"):
    gaps = [mine - mha for mine, mha in zip(losses[name], losses["MHA"], strict=True)]
    low, high, mean = min(gaps), max(gaps), sum(gaps) / SEEDS
    verdict = "within the spread, so this race does not tell them apart"
    if fast():
        verdict = "after 4 steps, so it means nothing"
    elif low > 0 or high < 0:
        verdict = f"{'worse' if low > 0 else 'better'} with every seed"
    print(f"{name} against MHA: {mean:+.4f} on average, from {low:+.4f} to {high:+.4f}: {verdict}")
spread = max(max(runs) - min(runs) for runs in losses.values())
print(f"one kind, other seeds: up to {spread:.4f} apart")
print(f"the cache of GQA by force, without training: {forced[64] - whole:+.4f}")

# %% [markdown]
# How to read this:
#
# - Compare runs of the same seed: they saw the same data. What a seed changes for all kinds alike cancels out.
# - "With every seed" is weak evidence too. If two kinds were equally good, three seeds would agree by luck in one race out of four ($2 \cdot \tfrac12 \cdot \tfrac12 \cdot \tfrac12$).
# - A model that learns with few heads from the start can arrange itself with them: compare the gaps with the last line.
# - Two layers, seconds of training and pieces of 128 tokens ask little of attention. DeepSeek-V2 ranks in words, for far larger models, MLA above MHA, MHA above GQA, and GQA above MQA (its table 1); your race can neither confirm nor refute that. Lesson 13's ladder, larger and longer, may order them otherwise.
#
# What it can show is the size of what is at stake: a quarter of the cache, for the gap that is printed above.

# %% [markdown]
# ## What a smaller cache is worth
#
# In every decoding step the whole cache is read. Take the sizes of DeepSeek-V3 and 32,768 tokens of context in bfloat16 (2 bytes a number). How long does reading take at least, on this machine by its measured bandwidth, and on an H200 by its published one? That is the roofline of lesson 00, for bytes alone.

# %% tags=["nbval-ignore-output"]
here = machine.measure()
v3 = minids.ModelConfig.preset("deepseek-v3")


def as_heads(model, groups):
    """The bytes per token if `model` cached `groups` key and value heads of its width V."""
    return 2 * model.num_hidden_layers * 2 * groups * model.v_head_dim


kinds = {"MHA, 128 heads": as_heads(v3, 128), "GQA, 8 heads": as_heads(v3, 8)}
kinds["MLA, 512 + 64"] = accounting.kv_bytes_per_token(v3)
print(f"{here.name}: {here.bandwidth / 1e9:.1f} GB/s; H200: arithmetic, not measured")
for name, per_token in kinds.items():
    nbytes = 32768 * per_token
    print(f"{name:15} {per_token:9,} bytes per token, {nbytes / 1e9:6.2f} GB of cache:", end=" ")
    h200 = accounting.roofline_seconds(0, nbytes, "H200")
    print(f"{nbytes / here.bandwidth:6.2f} s here, {1e3 * h200:5.2f} ms on an H200")
machine.recorded("mla")

# %% [markdown]
# ## How wide may the latent be?
#
# **Question:** how wide could the latent get before GQA with 8 key and value heads, a common choice, would have the smaller cache? Move the sliders: what does `rope_columns` do to that width? And why do the lines cross at the same width for all three models?


# %%
def draw(figure, model, latent_width, rope_columns):
    cfg = minids.ModelConfig.preset(model)
    axes, depth = figure.subplots(), cfg.num_hidden_layers
    widths = range(0, 2049, 64)
    kB = [2 * depth * (width + rope_columns) / 1e3 for width in widths]
    axes.plot(widths, kB, label="MLA", marker="")
    for groups in (1, 2, 4, 8):
        name = "MQA" if groups == 1 else f"GQA, {groups} heads"
        axes.plot([0, 2048], [as_heads(cfg, groups) / 1e3] * 2, label=name, marker="")
    chosen = 2 * depth * (latent_width + rope_columns)
    axes.plot([latent_width], [chosen / 1e3], marker="o", color=plots.INK, label="_")
    equal = chosen / as_heads(cfg, 1)
    mha = as_heads(cfg, cfg.num_attention_heads)
    words = f"{chosen:,} bytes per token, as GQA with {equal:.2f} heads; MHA {mha:,}"
    axes.set(xlabel="width of the latent", ylabel="kB per token", title=words, ylim=(0, None))
    plots.label_lines(axes)


sliders = {"latent_width": (128, 2048, 128), "rope_columns": (16, 112, 16)}
published = ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite"]
explore(draw, alt="Cache bytes over the latent's width", model=published, **sliders)

# %% [markdown]
# <details><summary>the answer</summary>At 2·8·128 − R, which is 1,984 for R = 64, so each rope column takes one column from the latent: a GQA head caches a key and a value of 128 numbers in each layer. All three models have heads of 128, and the number of layers multiplies every line alike.</details>
#
# ## When does it not pay?
#
# - **MQA is smaller still.** One head for keys and values needs $2d$ numbers. Where its loss is good enough, nothing is gained by MLA.
# - **Short contexts.** A decoding step reads the weights too. While the cache is small beside them, shrinking it saves little; weights are read once for all users of a batch, caches once for each.
# - **Expanded, it costs more arithmetic.** Making all keys and values again at each step takes $SCH(P+V)$ multiplications and additions, where attention itself takes $SH(P+R+V)$. Only the absorbed form (lesson 04) avoids that.
# - **In training** there is no cache to save. Does it cost time?

# %% tags=["nbval-ignore-output"]
lite = minids.ModelConfig.preset("deepseek-v2-lite")
weights = 2 * accounting.parameters(lite).active  # bytes, 2 for each number
for users in (1, 64):
    mha, mla = as_heads(lite, lite.num_attention_heads), accounting.kv_bytes_per_token(lite)
    words = f"{weights / users / mha:,.0f} tokens for MHA, {weights / users / mla:,.0f} for MLA"
    print(f"V2-Lite, users: {users}: the caches outweigh the weights from {words}")
wide = v3.qk_nope_head_dim + v3.v_head_dim
factor = v3.kv_lora_rank * wide / (wide + v3.qk_rope_head_dim)
print(f"V3: expanding the cache is {factor:.0f} times the arithmetic of attention itself")
inputs, targets = minids.data.batch(text.tokens, 0, 0, 16, 128)
models = {name: minids.Transformer(config) for name, config in configs.items()}
times = {name: [] for name in models}
for _ in range(4):  # in turns, because machines drift
    for name, model in models.items():
        run = functools.partial(lambda m: m.loss(inputs, targets)[0].backward(), model)
        times[name].append(machine.median_seconds(run, rounds=1))
for name, seconds in times.items():
    print(f"{name}: {1e3 * min(seconds):.0f} ms for a training step, the fastest of 4")
share = min(times["MLA"]) / min(times["MHA"]) - 1
words = f"{abs(share):.0%} {'longer' if share > 0 else 'less'} than"
if abs(share) < 0.03:
    words = "about as long as"
print(f"so a step of MLA takes {words} one of MHA")

# %% [markdown]
# (For the 64 users the count treats each token as if it read the same weights as one user's; with experts, lesson 07, 64 tokens together read more of them, so the true figure lies higher.)
#
# ## In the real DeepSeek
#
# | | yours | DeepSeek-V3 (2412.19437, section 4.2) |
# |---|---|---|
# | heads $H$ | 8 | 128 |
# | latent $C$ and rope columns $R$ | 48 and 16 | 512 and 64 |
# | nope columns $P$, value $V$ | 16, 16 | 128, 128 |
# | query | straight from $x$ | by a latent of 1536 with a norm of its own |
# | norm of the latent | yes | yes |
#
# DeepSeek-V2's table 1 counts MLA as $(C + R)\,l$ numbers for $l$ layers. With $d_h = P = 128$, the head width (not $D/H$, which is 40 in V2), $C = 4 d_h$ and $R = d_h/2$: that is $4.5\,d_h\,l$, as much as GQA with 2.25 heads for keys and values.

# %% [markdown]
# ### A headline, checked
#
# DeepSeek-V2's abstract says that its cache is 93.3% smaller than that of the older DeepSeek 67B. The next cell counts: 60 layers of $512 + 64$ numbers, against 95 layers of GQA with 8 heads of 128 (that model's sizes are taken from what others wrote about it; its own paper was not read for this).

# %%
v2 = minids.ModelConfig.preset("deepseek-v2")
ours, older = accounting.kv_elements_per_token(v2), 95 * 2 * 8 * 128
print(f"in numbers: {ours:,} against {older:,}, {1 - ours / older:.1%} fewer")
print(f"both in 2 bytes: the same, {1 - 2 * ours / (2 * older):.1%}")
print(f"V2 in 6 bits, the older one in 2 bytes: {1 - 0.75 * ours / (2 * older):.1%}")
for name, model in (("V2", v2), ("V3", v3)):
    groups = accounting.kv_elements_per_token(model) / model.num_hidden_layers / (2 * 128)
    print(f"{name}: {accounting.kv_bytes_per_token(model):,} bytes per token in bfloat16,", end=" ")
    print(f"as GQA with {groups:.2f} heads; MHA would have {model.num_attention_heads}")

# %% [markdown]
# The headline holds only together with storing the cache in 6 bits a number, as the V2 paper says it does when deployed (section 3.2.3); MLA alone gives the first line. The 70,272 bytes of V3 stand in table 1 of DeepSeek's ISCA paper (2505.09343).
#
# What came after: V3.2 keeps MLA and attends to 2,048 chosen positions only; V4, by public code and posts, replaced MLA.

# %% [markdown]
# ## To remember
#
# 1. MLA caches one latent and one small rope key per token, $C + R$ numbers, however many heads there are.
# 2. RoPE would put another matrix between query and latent for every distance; so positions get columns of their own.
# 3. The cache shrinks by arithmetic; whether the loss suffers is a measurement, with a spread.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** You double the number of heads and keep $C$ and $R$. What happens to the cache?
# <details><summary>it doubles</summary>No: that would be MHA. Neither the latent nor the rope key belongs to a head.</details>
# <details><summary>nothing</summary>Yes: all heads make their keys and values from the same latent.</details>
#
# **2.** Why is there a rope key beside the latent?
# <details><summary>RoPE on keys made from the latent would prevent absorbing</summary>Yes: the matrix between query and latent would depend on the distance.</details>
# <details><summary>the latent is too narrow to hold positions</summary>No: its width does not matter, the turning does.</details>
#
# **3.** Which scale do the scores have?
# <details><summary>1/√C: the latent is what is multiplied</summary>No: keys have P + R columns, also where they are never built.</details>
# <details><summary>1/√(P+R)</summary>Yes, times a factor where YaRN, a method for longer texts, stretches the positions.</details>
#
# **4.** MLA's mean loss is 0.003 lower than MHA's, and seeds differ by 0.02. What do you report?
# <details><summary>MLA is better</summary>Not yet: compare seed by seed, and run more of them.</details>
# <details><summary>no difference is shown at a quarter of the cache</summary>Yes, with both numbers beside it.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Train MLA with `kv_lora_rank` 4, 8, 16 and 48, three seeds each (twelve runs; the race had eight), with this lesson's `train` and `bits`. A config is `dataclasses.replace(configs["MLA"], kv_lora_rank=4)`; `resized` would set 48 again. Where does the loss leave the spread, if it does? Compare that rank with the number of best directions that you found for the baseline.
# <details><summary>Expected</summary>Compare runs of the same seed, as in the race. The caches have 20, 24, 32 and 64 numbers per token and layer, for the 16 of the rope key stay; the model with 4 has 33,880 parameters fewer than that with 48. The loss may leave the spread nowhere: the baseline has shown how few directions such a short training uses. The two numbers need not agree: the baseline's keys are turned by RoPE afterwards, while MLA has its positions in the rope key.</details>
# 2. Write a function that finds, for a config with MLA, the GQA with the smallest cache that is not smaller than MLA's. Its heads are `v_head_dim` wide, and the number of key and value heads divides `num_attention_heads`. Which GQA replaces the MLA of Kimi K2 (`minids.ModelConfig.preset("kimi-k2")`), and how many bytes does a context of its `max_position_embeddings` tokens take in each, in bfloat16?
# <details><summary>Expected</summary>One with 4 heads: MLA caches 576 numbers in a layer, 2 heads of 128 cache 512, 3 do not divide 64, and 4 cache 1,024. With 131,072 tokens and 61 layers MLA takes 9.2 GB, that GQA 16.4 GB.</details>

# %%
status()
