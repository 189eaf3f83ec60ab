# ---
# title: Absorbing the weights
# promise: You make Multi-head Latent Attention decode without ever building a key or a value, prove that nothing but the cost changes, and find the number of tokens from which it no longer pays.
# minutes: 65
# difficulty: 3
# needs: [torch]
# objectives:
#   - move a matrix from the keys to the query, and from the values to the result
#   - write the absorbed attention, and generate the same tokens with it
#   - count the FLOPs of both forms, and compute where they cost the same
#   - measure that place on this machine
#   - tell which form a real DeepSeek uses when, and what bounds it there
# ---

# %%
import functools

import torch

import minids
from minids import accounting, layers
from minids.gqa import GQA, KVCache
from minids.lab import check, explore, fast, hint, machine, plots, predict, status
from minids.mla import MLA, LatentCache, reference

_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # nothing is trained in this lesson
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## The problem: a small cache, and slower than before
#
# Multi-head Latent Attention (**MLA**, lesson 03) caches for each position one **latent**, a short vector, and one rope key. One matrix makes the keys and values of all heads from a latent. The obvious program, "naive" below, does so when a new token arrives: it **expands** the whole cache into keys and values, then attends as ever.
#
# Is that faster than plain multi-head attention (**MHA**) with its larger cache? The next cells time ONE new token in ONE attention layer: MLA with the sizes of DeepSeek-V2-Lite, the smallest of its family, and MHA with as many heads (16, of width 128) for vectors of the same width (2048). Weights are random: time does not depend on them.
#
# Times are taken in turns, A B A B …, because machines drift; the median counts. This takes a moment.


# %%
def one_token(forward, cfg, cache, **options):
    """A function that runs a layer on one new token, which fills the last place of `cache`."""
    x = torch.randn(1, 1, cfg.hidden_size, device=device)
    cos, sin = layers.rope_tables(cfg, torch.tensor([cache.max_len - 1], device=device))

    def run():
        cache.length = cache.max_len - 1
        return forward(x, cos, sin, cache, **options)

    return run


# %% tags=["nbval-ignore-output"]
lite = minids.ModelConfig.preset("deepseek-v2-lite")
plain = minids.ModelConfig.preset("deepseek-v2-lite", attention="mha", rope_scaling=None)
mla, mha = MLA(lite).to(device), GQA(plain).to(device)
H, C, R = lite.num_attention_heads, lite.kv_lora_rank, lite.qk_rope_head_dim
contexts = (512, 2048, 8192) if not fast() else (64, 256)
rows = {}
for context in contexts:
    keys_values = KVCache(1, context, H, plain.attention_head_dim, device=device)
    latents = LatentCache(1, context, C, R, device=device)
    runs = {"MHA": one_token(mha, plain, keys_values)}
    runs["naive"] = one_token(mla, lite, latents, form="expanded")
    rows[context] = machine.race(runs)
    sizes = f"{keys_values.nbytes / 2**20:6.1f} MiB and {latents.nbytes / 2**20:5.1f} MiB of cache"
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in rows[context].items())
    print(f"{context:5d} positions: {sizes}; {times}")

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(7, 3.2)
for name, label in (("MHA", "MHA"), ("naive", "naive MLA")):
    axes.plot(contexts, [1e3 * rows[context][name] for context in contexts], label=label)
axes.set(xlabel="positions in the cache", ylabel="ms for one token", ylim=(0, None))
plots.label_lines(axes)
plots.show(fig, "Milliseconds for one token in one layer over the positions: MHA, naive MLA.")
last = rows[contexts[-1]]
factor, shrunk = last["naive"] / last["MHA"], keys_values.nbytes / latents.nbytes
verdict = f"{factor:.1f} times SLOWER" if factor > 1 else f"{1 / factor:.1f} times faster"
print(f"at {contexts[-1]} positions: a cache {shrunk:.1f} times smaller, and {verdict} than MHA")

# %% [markdown]
# A small cache brings no speed by itself. The naive program reads little, and then computes the keys and values of all positions anew, at every step.
#
# The cure needs no other weights and no approximation, only brackets in another place.
#
# ### Your prediction
#
# The other form, **absorbed**, costs less per cached position but more per new token. One new token is what decoding has; a prompt or a batch of training text has thousands. With 4,096 positions in the cache: from how many NEW tokens on will the expanded form be the faster one again, on this machine? Write a number in place of `None`.

# %%
my_guess = None  # a number of new tokens, such as 1000
guess = predict("At 4096 positions, expanding wins from how many tokens on?", my_guess, "tokens")

# %% [markdown]
# ## The letters, and what is cached
#
# | letter | meaning | V2-Lite |
# |---|---|---|
# | $B$ | sequences in a batch | |
# | $T$ | new tokens, each with a query | 1 in decoding |
# | $S$ | positions, cached and new; the $T$ are the last of them | |
# | $H$ | heads | 16 |
# | $C$ | width of a latent (`kv_lora_rank`) | 512 |
# | $P$ | columns of a head's query and key without RoPE ("nope") | 128 |
# | $R$ | columns of a query with RoPE, and of the one rope key of all heads | 64 |
# | $V$ | columns of a head's value | 128 |
#
# Cached for position $s$: the latent $c_s$ and the rope key $k^{rope}_s$. For each head $h$ there are two matrices, $W_{UK,h}$ of shape `[P, C]`, which makes the key $W_{UK,h} c_s$, and $W_{UV,h}$ of shape `[V, C]`, which makes the value. Both lie in one tensor, `kv_b` `[H, P+V, C]`: of each head's rows the first $P$ are $W_{UK,h}$, the other $V$ are $W_{UV,h}$.

# %% [markdown]
# ## Where the brackets stand
#
# A score needs the query $q$ (its part without RoPE, `[P]`) and the key of position $s$:
#
# $$q \cdot (W_{UK} c_s) = q^{T} W_{UK} c_s = (W_{UK}^{T} q) \cdot c_s$$
#
# On the left a matrix works on each of $S$ latents. On the right it works once, on the query; all $S$ latents are used as they are. The matrix is **absorbed** into the query (V2 report, 2405.04434, section 2.1.2).
#
# | form | per position | per new token | what is multiplied for a score |
# |---|---|---|---|
# | expanded | $c_s \to W_{UK} c_s$, `[C]` → `[P]` | nothing | `[P]` · `[P]` |
# | absorbed | nothing | $q \to W_{UK}^{T} q$, `[P]` → `[C]` | `[C]` · `[C]` |
#
# The columns with RoPE are left out of this: lesson 03 showed that a rotation between $q$ and $c_s$ would forbid it. They have a score of their own, which is added.

# %% [markdown]
# ## Exercise 1 · Absorb the query
#
# *5 minutes · difficulty ●●○○○*
#
# $$\tilde q_{bth} = W_{UK,h}^{T}\, q_{bth}$$
#
# | name | shape |
# |---|---|
# | `q_nope` | `[B, T, H, P]` |
# | `kv_b` | `[H, P+V, C]` |
# | result $\tilde q$ | `[B, T, H, C]` |
#
# `torch.einsum` fits well. Each letter of its text names a dimension. A letter that is missing behind the arrow is summed over; a letter in both inputs AND behind it pairs them: `torch.einsum("nij,njk->nik", a, b)` multiplies the $n$-th matrix of `a` by the $n$-th of `b`. Here each head meets its own matrix, and $P$ is summed.
#
# Nothing is trained in this lesson, yet the first three checks compare gradients too: what you write could train.


# %%
def absorb_query(q_nope, kv_b):
    """q_nope [B,T,H,P] times W_UK of their head, which is in kv_b [H,P+V,C]; gives [B,T,H,C]."""
    # BEGIN SOLUTION
    w_uk = kv_b[:, : q_nope.shape[-1]]
    return torch.einsum("bthp,hpc->bthc", q_nope, w_uk)
    # END SOLUTION


# %%
my_absorb_query = check(absorb_query)

# %% [markdown]
# ## Exercise 2 · Project the sum
#
# *4 minutes · difficulty ●●○○○*
#
# The values can wait in the same way. With $a_s$ for the weights that the softmax gives (they sum to 1), a head's result is
#
# $$o = \sum_s a_s\, (W_{UV} c_s) = W_{UV} \Big(\sum_s a_s\, c_s\Big)$$
#
# So the weights sum latents, and the sum, ONE vector for each query and head, is projected at the end. You write this last step:
#
# | name | shape | meaning |
# |---|---|---|
# | `latent` | `[B, T, H, C]` | $\sum_s a_s c_s$ |
# | `kv_b` | `[H, P+V, C]` | as above |
# | `nope` | a number | $P$: here nothing else says where $W_{UV}$ begins |
# | result | `[B, T, H, V]` | |


# %%
def project_values(latent, kv_b, nope):
    """latent [B,T,H,C] times W_UV of their head, which is in kv_b [H,nope+V,C]; gives [B,T,H,V]."""
    # BEGIN SOLUTION
    w_uv = kv_b[:, nope:]
    return torch.einsum("bthc,hvc->bthv", latent, w_uv)
    # END SOLUTION


# %%
my_project_values = check(project_values)

# %% [markdown]
# ## Exercise 3 · Absorbed attention
#
# *12 minutes · difficulty ●●●●○*
#
# $$a_{t\,\cdot} = \mathrm{softmax}_s\big((\tilde q_t \cdot c_s + q^{rope}_t \cdot k^{rope}_s) \cdot \mathrm{scale}\big), \qquad o_t = W_{UV} \sum_s a_{ts}\, c_s$$
#
# for each head ($q^{rope}$ is `q_rope`; V2 report, eq. 18, V3 report, 2412.19437, eq. 10, with the brackets moved). All heads look at the SAME row $[c_s, k^{rope}_s]$: it is **MQA** (many query heads, one key and value head, lesson 02) with a key of width $C+R$, whose first $C$ numbers are the value too.
#
# | name | shape |
# |---|---|
# | `q_nope`, `q_rope` | `[B, T, H, P]`, `[B, T, H, R]` |
# | `c_kv`, `k_rope` | `[B, S, C]`, `[B, S, R]` |
# | `kv_b` | `[H, P+V, C]` |
# | `scale` | a number, given |
# | result | `[B, T, H, V]` |
#
# Causal: query $t$ (from 0) stands at position $S-T+t$. `torch.ones(T, S, dtype=torch.bool, device=c_kv.device).tril(k)` is True up to `k` places right of the diagonal; `scores.masked_fill(hidden, value)` overwrites where `hidden` is True.
#
# An answer that builds keys would pass, for its numbers are right; the clock below will tell.


# %%
def attend_absorbed(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    """Attention of T queries over S latents, no key or value built; gives [B,T,H,V]."""
    # BEGIN SOLUTION
    T, S = q_nope.shape[1], c_kv.shape[1]
    scores = torch.einsum("bthc,bsc->bhts", my_absorb_query(q_nope, kv_b), c_kv)
    scores = (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * scale
    seen = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    latent = torch.einsum("bhts,bsc->bthc", weights, c_kv)
    return my_project_values(latent, kv_b, q_nope.shape[-1])
    # END SOLUTION


# %%
my_attend_absorbed = check(attend_absorbed)

# %% [markdown]
# Why is the scale no puzzle, although the product runs over $C+R = 576$ numbers now? Because the scores are the same numbers as before: the width of the key that they stand for is still $P+R = 192$, so plain MLA has $192^{-1/2}$ (V2-Lite multiplies that by a factor, for YaRN, a method that stretches RoPE to longer texts; hence the argument).
#
# ## The proof in numbers
#
# Two forms of one formula must agree to the last rounding. The next cell gives both the same random input, in float64 (about 16 decimal digits) and in float32 (about 7), and prints their largest difference, as a share of the largest value. What should you see? Tiny numbers, but not zeros. Float64 rounds each step at about $10^{-16}$ and float32 at about $6 \cdot 10^{-8}$, sums in another order round differently, and there are hundreds of steps.

# %% tags=["nbval-ignore-output"]
P, V, scale = lite.qk_nope_head_dim, lite.v_head_dim, layers.softmax_scale(lite)


def random_inputs(T, S, dtype=torch.float32):
    """The arguments of attend_absorbed for one sequence of V2-Lite's sizes."""
    shapes = [(1, T, H, P), (1, T, H, R), (1, S, C), (1, S, R), (H, P + V, C)]
    *others, kv_b = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return *others, kv_b * C**-0.5, scale


for dtype in (torch.float64, torch.float32):
    inputs = random_inputs(7, 300, dtype)
    a, b = reference.attend_expanded(*inputs), my_attend_absorbed(*inputs)
    error = minids.numerics.relative_error(b, a)
    print(f"{dtype}: largest difference {error:.0e}")
    assert error < minids.numerics.TOLERANCE[dtype], "the two forms differ by more than rounding"

# %% [markdown]
# ## The same tokens
#
# Does a model write the same with your functions? The next cell is a cached generation: the prompt in one pass, then token after token, all attention by you. From the layer it takes what lesson 03 built: `queries` gives both parts of the query, `latents` the row `[c, k_rope]` to cache.


# %%
def my_layer(attn, x, cos, sin, cache):
    """The attention layer `attn` on x [B,T,D] after what `cache` holds, by your functions."""
    cfg = attn.cfg
    q_nope, q_rope = attn.queries(x, cos, sin)
    cached = cache.append(attn.latents(x, cos, sin))[0]
    c_kv, k_rope = cached.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
    kv_b = attn.kv_b_proj.weight.unflatten(0, (cfg.num_attention_heads, -1))
    heads = my_attend_absorbed(q_nope, q_rope, c_kv, k_rope, kv_b, attn.scale)
    return attn.o_proj(heads.flatten(-2))


def my_generate(model, tokens, new):
    """Continue tokens [1,T] by the `new` likeliest ones, each from the cache."""
    cache, fresh = model.new_cache(1, tokens.shape[1] + new), tokens
    for _ in range(new):
        positions = torch.arange(cache[0].length, cache[0].length + fresh.shape[1])
        cos, sin = layers.rope_tables(model.cfg, positions)
        x = model.embed_tokens(fresh)
        for block, room in zip(model.layers, cache, strict=True):
            x = x + my_layer(block.self_attn, block.input_layernorm(x), cos, sin, room)
            x = x + block.mlp(block.post_attention_layernorm(x))
        fresh = model.lm_head(model.norm(x[:, -1:])).argmax(-1)
        tokens = torch.cat([tokens, fresh], 1)
    return tokens


# %% [markdown]
# The model is `tiny` with random weights, for this is a test of equality, not of language. `minids.generate` is the judge, once with its cache and once without any, where it reads everything again for each token, by the expanded form.

# %%
tiny = minids.ModelConfig.preset("tiny", initializer_range=0.1)  # larger: the tokens vary more
model = minids.Transformer(tiny).eval()
prompt = torch.randint(tiny.vocab_size, (1, 16))
yours = my_generate(model, prompt, 60)
for use_cache in (True, False):
    same = (yours == minids.generate(model, prompt, 60, use_cache=use_cache))[0, 16:]
    print(f"use_cache={use_cache}: {same.sum()} of {len(same)} tokens are the same as yours")
print("yours:", *yours[0, 16:28].tolist(), "…")

# %% [markdown]
# ## What did it bring?
#
# The first race again, with your functions in the layer as the third runner. Besides attention, yours and the naive layer do the same work. (Again it takes a moment.)
#
# What should you see? Yours beats the naive one by more, the longer the context. Whether and from where on it beats MHA depends on the machine: with few positions both mostly read their weights, with many MHA mostly reads its cache.

# %% tags=["nbval-ignore-output"]
for context in contexts:
    keys_values = KVCache(1, context, H, plain.attention_head_dim, device=device)
    latents = LatentCache(1, context, C, R, device=device)
    runs = {"MHA": one_token(mha, plain, keys_values)}
    runs["naive"] = one_token(mla, lite, latents, form="expanded")
    runs["yours"] = one_token(lambda *inputs: my_layer(mla, *inputs), lite, latents)
    rows[context] = machine.race(runs)
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in rows[context].items())
    print(f"{context:5d} positions: {times}")
last = rows[contexts[-1]]
for name in ("naive", "MHA"):
    factor = last[name] / last["yours"]
    words = f"{factor:.1f} times faster" if factor > 1 else f"{1 / factor:.1f} times slower"
    print(f"at {contexts[-1]} positions yours is {words} than {name}")

# %% [markdown]
# ## Exercise 4 · What each form costs
#
# *8 minutes · difficulty ●●●○○*
#
# Now the price. Count the FLOPs of one layer's attention for ONE sequence: $T$ new tokens, $S$ positions. Two FLOPs (lesson 00) for each multiplication with its addition. A product of shapes `[M, K]` and `[K, N]` has $M \cdot N \cdot K$ multiply-adds.
#
# | step | expanded | absorbed |
# |---|---|---|
# | with `kv_b` | keys and values of all $S$ positions | exercises 1 and 2, for the $T$ queries |
# | scores, each query with each position | over $P+R$ numbers | over ? numbers |
# | sums over the positions | of $V$ numbers | of ? numbers |
#
# Count every score, hidden ones too: a plain product computes them all. What both forms share (making queries and latents, `o_proj`) is left out. Do not forget that there are $H$ heads.


# %%
def decode_flops(form, H, C, R, P, V, T, S):
    """FLOPs of T queries over S positions in one layer; form is "expanded" or "absorbed"."""
    # BEGIN SOLUTION
    if form == "expanded":
        per_head = S * C * (P + V) + T * S * (P + R) + T * S * V
    else:
        per_head = T * C * (P + V) + T * S * (C + R) + T * S * C
    return 2 * H * per_head
    # END SOLUTION


# %%
my_flops = check(decode_flops)

# %% [markdown]
# ## Exercise 5 · Where they cost the same
#
# *6 minutes · difficulty ●●●○○*
#
# For few new tokens the expanded form loses: it works on all $S$ positions whatever $T$ is. For many it wins: its attention is narrower. In between lies the **crossover**: the $T$ at which your two counts are equal. Set them equal and solve for $T$. Two letters fall out, which is worth a thought.
#
# You may assume $2C > P+V$, as in all published models (V3: $1024 > 256$).
#
# | name | meaning |
# |---|---|
# | `C`, `P`, `V`, `S` | as above |
# | result | $T$, a number that need not be whole |


# %%
def crossover(C, P, V, S):
    """The number of new tokens T at which both forms have as many FLOPs, with S positions."""
    # BEGIN SOLUTION
    expanding = C * (P + V)  # a head, for one position; absorbing for one query costs as much
    wider = 2 * C - P - V  # more numbers in absorbed attention, for each query and position
    return S * expanding / (expanding + S * wider)
    # END SOLUTION


# %%
my_crossover = check(crossover)

# %% [markdown]
# $H$ and $R$ fell out: both forms have as many heads, and RoPE's part is the same product in both. And the crossover grows with the context at first, then levels off: for very long $S$ it comes near to $C(P+V)/(2C-P-V)$. The next cell prints both for V2-Lite, whose $C$, $P$ and $V$ V3 shares, and asks the layer of `minids`, which chooses its form by itself (`form="auto"`), where it changes.

# %%
for S in (64, 256, 1024, 4096, 65536):
    at = my_crossover(C, P, V, S)
    chosen = next(T for T in range(1, S + 1) if not minids.mla.layer.absorbing_pays(lite, T, S))
    print(f"{S:6d} positions: crossover at {at:5.1f} new tokens; minids expands from {chosen} on")
print(f"the limit, for ever more positions: {C * (P + V) / (2 * C - P - V):.1f} new tokens")

# %% [markdown]
# ## The measurement
#
# Arithmetic says: absorb below the crossover, expand above. Does the clock agree? The next cell times your `attend_absorbed` against `attend_expanded` of minids, written in the same plain style, for contexts of 64 to 4,096 positions and 1 to 256 new tokens. In turns again; it takes about a minute or less.

# %% tags=["nbval-ignore-output"]
many = (1, 16, 64, 128, 256)
measured = {}
for S in (64, 256, 1024, 4096) if not fast() else (64, 256):
    for T in many[: sum(T <= S for T in many)]:  # the new tokens are among the positions
        inputs = random_inputs(T, S)
        runs = {"expanded": functools.partial(reference.attend_expanded, *inputs)}
        runs["absorbed"] = functools.partial(my_attend_absorbed, *inputs)
        measured[S, T] = machine.race(runs)
longest = max(S for S, _ in measured)
print(f"{longest} positions:")
for T in many:
    times = ", ".join(
        f"{form} {1e3 * seconds:7.2f} ms" for form, seconds in measured[longest, T].items()
    )
    print(f"{T:4d} new tokens: {times}")


# %%
def ratios(S):
    """(numbers of new tokens, absorbed time over expanded time for each) with S positions."""
    times = {T: seconds for (length, T), seconds in measured.items() if length == S}
    return list(times), [seconds["absorbed"] / seconds["expanded"] for seconds in times.values()]


def meeting(S):
    """T where the measured ratio passes 1, by a straight line of logarithms; None if never."""
    x, y = (torch.tensor(values).double().log() for values in ratios(S))
    for i in range(len(x) - 1):
        if y[i] < 0 <= y[i + 1]:
            return (x[i] + (x[i + 1] - x[i]) * -y[i] / (y[i + 1] - y[i])).exp().item()
    return None


# %% [markdown]
# Left: the longest context, both forms. The expanded line is nearly flat at first, for expanding does not depend on the new tokens; the absorbed line rises from the start. Right: their ratio, for each context; below 1 absorbing wins. Your guess (if it lies in the figure) and the crossover of exercise 5 are drawn before any measured point.

# %% tags=["nbval-ignore-output"]
fig, (left, right) = plots.figure(9.5, 3.8, columns=2)
grey = {"color": plots.INK, "linewidth": 0.9, "marker": ""}
left.axvline(my_crossover(C, P, V, longest), linestyle=":", label="_", **grey)
if guess.guess and many[0] <= guess.guess <= many[-1]:
    left.axvline(guess.guess, linestyle="-", label="_", **grey)
for form in ("expanded", "absorbed"):
    left.plot(many, [1e3 * measured[longest, T][form] for T in many], label=form)
left.set(title=f"ms, {longest} positions", ylim=(0, None))
right.axhline(1, linestyle="-", label="_", **grey)
for length in sorted({length for length, _ in measured}):
    (line,) = right.plot(*ratios(length), label=f"S = {length}")
    spot = {"marker": "*", "markersize": 13, "linestyle": "", "color": line.get_color()}
    right.plot([my_crossover(C, P, V, length)], [1], label="_", zorder=3, **spot)
steps = (0.01, 0.03, 0.1, 0.3, 1, 3)
right.set(title="absorbed time / expanded time", yscale="log", yticks=steps, yticklabels=steps)
right.legend(loc="lower right", frameon=False)
for panel in (left, right):
    panel.set(xlabel="new tokens", xscale="log", xticks=many, xticklabels=many)
    panel.minorticks_off()
plots.label_lines(left)
plots.show(fig, "Time of both forms over new tokens; their ratio per context; computed crossovers.")
print("dotted line and stars: crossover by FLOPs; solid line: your guess, if within the figure")

# %% tags=["nbval-ignore-output"]
for length in sorted({length for length, _ in measured}):
    at, computed = meeting(length), my_crossover(C, P, V, length)
    clock = f"at {at:.0f}" if at else f"nowhere from 1 to {ratios(length)[0][-1]}"
    print(f"{length:5d} positions: by FLOPs at {computed:.0f} new tokens, by the clock {clock}")
if fast():
    print("MINIDS_FAST is set: nothing was timed at 4096 positions, which your guess is about")
elif meeting(longest):
    guess.compare(meeting(longest))
else:
    print("your guess: the two did not cross in this measurement")

# %% [markdown]
# ### Why the clock differs from the count
#
# FLOPs are not seconds: products of different shapes reach different speeds, and the softmax, which both forms have, counts nothing above. The next cell divides FLOPs by seconds, and sets that against the best product of this machine. One absorbed query makes few FLOPs of each byte, too few for the speed of a large product (lesson 00: memory-bound); the nearer its GB/s come to a copy's, the more it is the memory that sets its time, and not the calls. Expanding is a large product that keeps the processor busy (compute-bound): fast work, but work that need not be done.
#
# The bytes are the least there are: latents, rope keys and `kv_b` read once, and, when expanding, keys and values written and read. What lies in a cache of the processor may come faster than a copy through memory.

# %% tags=["nbval-ignore-output"]
here = machine.measure(torch.float32)
print(f"{here.name}: one large product reaches {here.flops / 1e9:.0f} GFLOP/s,", end=" ")
print(f"a copy {here.bandwidth / 1e9:.0f} GB/s")
for T in (1, many[-1]):
    for form, seconds in measured[longest, T].items():
        flops = my_flops(form, H, C, R, P, V, T, longest)
        nbytes = 4 * (longest * (C + R) + H * (P + V) * C)  # read once, in float32
        nbytes += 8 * longest * H * (P + V) if form == "expanded" else 0
        speed, rate = flops / seconds, nbytes / seconds
        print(f"{T:3d} new tokens, {form}: {flops / 1e9:6.2f} GFLOP", end="")
        print(f" at {speed / 1e9:4.0f} GFLOP/s ({speed / here.flops:.0%}),", end=" ")
        print(f"{nbytes / 1e6:4.0f} MB at {rate / 1e9:4.1f} GB/s ({rate / here.bandwidth:.0%})")
machine.recorded("mla")

# %% [markdown]
# ## On a GPU, at DeepSeek-V3's sizes
#
# What follows is arithmetic, not a measurement: bytes and FLOPs of ONE layer when 128 sequences with 4,096 positions each decode one token, put under the rooflines of named GPUs. Numbers take 2 bytes (bfloat16). The three ways:
#
# | way | FLOPs | bytes |
# |---|---|---|
# | MHA, its heads as wide as V3's | scores and sums | all keys and values, read once |
# | MLA, expanded | your count | latents read; keys and values written and read again |
# | MLA, absorbed | your count | latents read once, for all heads |
#
# Both ways of MLA read `kv_b` too, once for all sequences.

# %%
v3 = minids.ModelConfig.preset("deepseek-v3")
V3 = dict(H=v3.num_attention_heads, C=C, R=R, P=P, V=V)  # C, R, P, V are V2-Lite's
B, S, heads = 128, 4096, v3.num_attention_heads
weights = 2 * heads * (P + V) * C
work = {
    "MHA": (2 * B * heads * S * (P + R + V), 2 * B * S * heads * (P + R + V)),
    "MLA, expanded": (
        B * my_flops("expanded", **V3, T=1, S=S),
        2 * B * S * (C + R + 2 * heads * (P + V)) + weights,
    ),
    "MLA, absorbed": (B * my_flops("absorbed", **V3, T=1, S=S), 2 * B * S * (C + R) + weights),
}
for name, (flops, nbytes) in work.items():
    print(f"{name:14s} {flops / 1e9:8.0f} GFLOP {nbytes / 1e9:7.1f} GB", end=" ")
    print(f"{flops / nbytes:6.1f} FLOP per byte")
for gpu in ("H100", "H200", "A100", "RTX 4090"):
    times = (f"{name} {1e3 * accounting.roofline_seconds(*w, gpu):.2f}" for name, w in work.items())
    print(f"{gpu:9s} ridge {accounting.ridge(gpu):3.0f}; ms at least:", ", ".join(times))

# %%
lite_work = (
    B * my_flops("absorbed", H, C, R, P, V, 1, S),
    2 * B * S * (C + R) + weights * H / heads,
)
spots = {"MHA": work["MHA"], "absorbed, 16 heads": lite_work}
spots["absorbed, 128 heads"] = work["MLA, absorbed"]
fig, axes = plots.figure(7.5, 4.2)
plots.roofline(axes, ["H200", "RTX 4090"], spots)
axes.set_ylim(bottom=axes.get_ylim()[0] / 3)  # room for the names below the dots
for text in axes.texts:
    if text.get_text() == "absorbed, 16 heads":  # above its dot: a line runs below it
        text.set(ha="right", va="bottom")
        text.xyann = (-8, 4)
plots.show(
    fig, "Rooflines of H200 and RTX 4090 in bfloat16: MHA; absorbed MLA of 16 and 128 heads."
)
for name, row in (("MHA", heads * (P + R + V)), ("MLA", C + R)):
    total = 2 * B * S * v3.num_hidden_layers * row
    print(f"{name}'s cache, {v3.num_hidden_layers} layers: {total / 1e9:,.0f} GB")

# %% [markdown]
# Hollow dots are computed, on the H200's roof. MHA sits far down the slope, with 1 FLOP for each byte: it waits for memory. Absorbed MLA moves few bytes and does more with each, the more heads share a row; with V3's 128 heads it stands just right of the H200's corner (235.8 FLOP per byte, the ridge is 206): the arithmetic sets the time there, though the memory is nearly as busy.
#
# The expanded form has about as many FLOPs per byte as the absorbed one, so its dot would lie beside it. It runs as FAST, and takes far longer: a roofline shows speed, not whether the work is needed.
#
# MHA's time is fiction besides, for its cache fits into no GPU: an H200 has 141 GB.

# %% [markdown]
# ## Explore: who wins where?
#
# **Question:** one of the three sliders does not move the border at all. Which one, and why? And below which $C$ does the absorbed form win everywhere?
#
# The map shows the ratio of FLOPs for $S$ positions and $T$ new tokens ($T \le S$, so a corner is empty); the line is the border. It starts with V3's sizes. Move each slider to both of its ends.
#
# <details><summary>Answer</summary>H: both forms have as many heads, so it falls out of the ratio (C and the widths of keys and values do not). And where 2C is at most P+V, absorbed attention is no wider than the expanded one: nothing is left that could make it lose.</details>


# %%
def ratio_map(H, C, P, V):
    """log2 of absorbed over expanded FLOPs; a row for each T, a column for each S."""
    rows = torch.full((13, 14), float("nan"))
    for t in range(13):
        for s in range(max(4, t), 18):
            forms = ("absorbed", "expanded")
            absorbed, expanded = (my_flops(form, H, C, 64, P, V, 2**t, 2**s) for form in forms)
            rows[t, s - 4] = absorbed / expanded
    return rows.log2()


def draw(figure, H, C, P_plus_V):
    ratio, axes = ratio_map(H, C, P_plus_V // 2, P_plus_V // 2), figure.subplots()
    names = {"rows": [2**t for t in range(13)], "columns": [2**s for s in range(4, 18)]}
    label = "log2 of absorbed / expanded FLOPs"
    plots.heat(axes, ratio, label, **names, vmin=-8, vmax=8, cmap="PuOr_r", origin="lower")
    axes.text(8, 1, "absorbed wins", ha="center", color="white", weight="bold")
    if (ratio > 0).sum() > 12:
        axes.contour(ratio, levels=[0], colors=plots.INK, linewidths=2)
        axes.text(10.5, 11, "expanded wins", ha="center", weight="bold")
    axes.set(xlabel="positions S", ylabel="new tokens T", title=f"H {H}, C {C}, P + V {P_plus_V}")
    axes.tick_params(axis="x", rotation=60)


# %%
explore(
    draw,
    alt="Map of positions and new tokens: which form has fewer FLOPs",
    size=(7.5, 5),
    H=(8, 248, 8),
    C=(64, 1024, 64),
    P_plus_V=(64, 448, 32),
)

# %% [markdown]
# ## When does it not pay?
#
# **Many new tokens.** Reading a prompt (prefill) and training have $T = S$. The first lines below show what absorbing would cost there, at V3's sizes.
#
# **Many heads.** Each cached row, $2(C+R)$ bytes, meets $H$ queries: $2H(C+R+C)$ FLOPs. So the FLOPs per byte grow with the heads (128: 241.8, more than the 235.8 above, which also count `kv_b`), and with the new tokens of a step, and beyond the ridge absorbed decoding itself is compute-bound. Then a smaller cache makes it no faster. Two tokens a step are usual where one token is guessed ahead and checked with the next (multi-token prediction).

# %%
for S in (1024, 4096, 16384):
    counts = [my_flops(form, **V3, T=S, S=S) for form in ("absorbed", "expanded")]
    print(f"prompt of {S:5d} tokens: absorbing costs {counts[0] / counts[1]:.2f} times as much")
print()
gpus = ("A100", "H200", "H100")
for n_heads in (16, 64, 128):
    for T in (1, 2):
        intensity = T * 2 * n_heads * (C + R + C) / (2 * (C + R))
        bound = [g for g in gpus if intensity > accounting.ridge(g)]
        words = f"compute-bound on {', '.join(bound)}" if bound else "memory-bound on all three"
        print(f"{n_heads:3d} heads, {T} new: {intensity:5.1f} FLOP per byte, {words}")

# %% [markdown]
# **Multiplying the matrices together.** "Absorb" sounds as if $W_{UK}^{T}$ were multiplied into the matrix that makes the query, $W_{UQ}$ `[P, Q]` a head (V3 makes queries from a vector of $Q = 1536$ numbers, `q_lora_rank`). One may, and the result is right; but the product has shape `[C, Q]`: it can be much larger than its two factors, and as many numbers as a matrix has, so many multiply-adds it takes for each token. One after the other is cheaper at V3's sizes, which is why exercise 1 is a step of its own. In a model as small as `tiny` it saves PyTorch calls, whose time counts there, at the price of some more multiply-adds: so `minids` does merge them when it decodes such a model on a CPU.

# %%
for name, cfg in (("deepseek-v3", v3), ("tiny", tiny)):
    rank, nope = cfg.kv_lora_rank, cfg.qk_nope_head_dim
    width = cfg.q_lora_rank or cfg.hidden_size  # tiny makes its queries from x itself
    apart = cfg.num_attention_heads * (nope * width + rank * nope)
    merged = cfg.num_attention_heads * rank * width
    print(f"{name}: two matrices a head {apart / 1e6:.2f}M numbers,", end=" ")
    print(f"multiplied together {merged / 1e6:.2f}M, {merged / apart:.1f} times as many")

# %% [markdown]
# ## In the real DeepSeek
#
# - DeepSeek's reports name the two forms MHA mode and MQA mode of MLA. V3.1-Terminus trains and prefills in MHA mode (expanded) and decodes in MQA mode (absorbed): V3.2 report, appendix, figure 7.
# - The official `inference/model.py` of V3 has a switch `attn_impl`. "naive" caches full keys and values; "absorb", the default, is your exercise 3.
# - **FlashMLA** is DeepSeek's GPU kernel for the absorbed decode: keys of 576, values of 512 numbers, one for all heads. Its README reports up to 3,000 GB/s where memory-bound and 660 TFLOP/s where compute-bound, on an H800. You write such a kernel in lesson 06, after 05 has introduced Triton.
# - transformers (5.23.0 was read) caches latents, but expands the whole cache through `kv_b_proj` at every step: the naive runner of this lesson's first race.
# - V3.2 attends to 2,048 selected positions in MQA mode; V4, by public code and posts, replaced MLA.

# %% [markdown]
# ## To remember
#
# 1. $q \cdot (Wc) = (W^{T} q) \cdot c$: a matrix on every cached position becomes a matrix on one query, and not a number of the result changes.
# 2. Absorbed MLA is MQA over latents: few new tokens want it; many new tokens want keys and values.
# 3. A small cache alone makes nothing fast: what is done with each cached byte decides.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Which scale belongs to absorbed scores?
# <details><summary>(C+R)^-0.5</summary>No: the scores are the same numbers as before, so their scale is too.</details>
# <details><summary>(P+R)^-0.5, times YaRN's factor</summary>Yes.</details>
#
# **2.** Twice as many heads. Where is the crossover?
# <details><summary>at the same T</summary>Yes: both forms cost twice as much.</details>
# <details><summary>at half the T</summary>No: H falls out of the equation.</details>
#
# **3.** Why are the RoPE columns not absorbed?
# <details><summary>they are too few</summary>No: a rotation that depends on the distance would stand between query and latent.</details>
# <details><summary>the matrix would depend on the distance</summary>Yes: one matrix for each distance, lesson 03.</details>
#
# **4.** A model trains absorbed. What is wrong?
# <details><summary>the gradients</summary>No: they are the same too; the check compared them.</details>
# <details><summary>only the bill</summary>Yes: you saw the factor above.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. A prompt of 4,096 tokens is read in pieces of $n$ tokens, each after what is cached. With `minids.mla.reference.decode_flops` and V3's sizes, add up all pieces of one layer for $n$ = 16, 64, 256, 1024 and 4096, each piece in its cheaper form ($T = n$; $S$ is what is cached then, the piece itself too). Which $n$ is cheapest, and what does that say about reading prompts in small pieces?
# <details><summary>Expected</summary>1024, with 1.20 TFLOP; the others, in their order, take 2.48, 2.51, 1.90 and 1.51. Small pieces absorb, and that is dear for a prompt. Large ones expand: each expands what is cached before it again, and the largest computes the most scores that the mask hides. So pieces may be small enough for memory, but not smaller than about the crossover.</details>
# 2. Time `minids.mla.MLA` with the config `minids.ModelConfig.preset("small")` in `form="expanded"` and `form="absorbed"` for 1 to 512 new tokens, which are the last of 2,048 positions (like `one_token` above, with `cache.length = cache.max_len - T`). Compute its crossover first. Then take $C = 64$ (`kv_lora_rank=64`): what happens to the crossover, and does the clock agree?
# <details><summary>Expected</summary>C = 128 and P = V = 64: the crossover is at 120.5 new tokens. With C = 64, 2C − P − V is 0, and it is at S = 2,048: by FLOPs absorbing never loses. The clock may disagree, for the forms are made differently: the expanded one uses torch's fused attention, the absorbed one writes all H·T·S scores to memory, the more the more new tokens there are.</details>

# %%
status()
