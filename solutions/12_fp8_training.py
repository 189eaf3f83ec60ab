# ---
# title: Training in FP8
# promise: You write the three FP8 products of a Linear, make them a layer that trains, race it against BF16 over several seeds, and measure what must stay in more bits, and when.
# minutes: 75
# difficulty: 4
# needs: [torch]
# objectives:
#   - say along which dimension each tensor of a Linear must be quantised, and why one layout cannot serve all
#   - write Fprop, Dgrad and Wgrad in FP8, and a forward and backward pass made of them
#   - measure what an FP8 Linear keeps for its backward pass
#   - test the report's claim "within 0.25% of BF16" over several seeds, and say what the seeds allow to say
#   - show when blocks ruin gradients, and when the weights' updates vanish
# ---

# %%
import copy
import math

import torch

import minids
from minids import accounting, fp8, optim
from minids.fp8 import reference
from minids.fp8.emulate import quantize_blocks, quantize_tiles
from minids.fp8.reference import dequantize_blocks, dequantize_tiles, matmul_blockscaled
from minids.lab import check, explore, fast, hint, load_text, machine
from minids.lab import plots, predict, status, train_live
from minids.layers import product_dtype
from minids.numerics import has_fast_bf16

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: three products, three sums
#
# A **Linear** layer multiplies: $y = x\,W^T$, with $M$ tokens, $K$ inputs and $N$ outputs. Training needs two products more. The backward pass brings $dy$, the gradient of the loss with respect to $y$; from it come the gradients $dx$, for the layer before, and $dW$, for the optimizer.
#
# | name | product | shapes | sums over |
# |---|---|---|---|
# | **Fprop** | $y = x\,W^T$ | `[M,K]` · `[K,N]` | $K$, inputs |
# | **Dgrad** | $dx = dy\;W$ | `[M,N]` · `[N,K]` | $N$, outputs |
# | **Wgrad** | $dW = dy^T x$ | `[N,M]` · `[M,K]` | $M$, tokens |
#
# In FP8 (lesson 10) 128 neighbours share a **scale**. Lesson 11: a scale can be taken out of a sum only if the neighbours lie along that sum. So each tensor occurs in two products that want different neighbours.

# %% tags=["hide-input"]


def draw_product(axes, name, first, second, shared, title):
    """Two factors and their result as boxes; tiles along the summed dimension are coloured."""
    sizes, boxes = {"M": 3.4, "N": 2.0, "K": 2.7}, []
    (a, (rows, _)), (b, (_, columns)) = first, second
    boxes.append((a, 0, 0, sizes[shared], sizes[rows], "h"))
    boxes.append((b, sizes[shared] + 0.5, sizes[rows] + 0.5, sizes[columns], sizes[shared], "v"))
    boxes.append((name, sizes[shared] + 0.5, 0, sizes[columns], sizes[rows], ""))
    for text, x, y, wide, high, way in boxes:
        axes.bar(x + wide / 2, high, wide, bottom=y, color=plots.CARD, ec=plots.INK)
        for n in range(2):
            color = {"color": plots.COLORS[n], "alpha": 0.45, "ec": plots.CARD}
            if way == "h":
                axes.bar(x + wide * (0.25 + n / 2), 0.45, wide / 2, bottom=y + high - 0.45, **color)
            if way == "v":
                axes.bar(x + 0.22, high / 2, 0.44, bottom=y + high * (1 - n) / 2, **color)
        axes.text(x + wide / 2 + 0.15, y + high / 2 - 0.15, text, ha="center", va="center")
    axes.set(xlim=(-0.3, 7.2), ylim=(-0.3, 6.7), title=f"{title}: sums over {shared}")
    axes.axis("off")


fig, panels = plots.figure(9, 3, columns=3)
draw_product(panels[0], "y\n[M,N]", ("x\n[M,K]", "MK"), ("Wᵀ\n[K,N]", "KN"), "K", "Fprop")
draw_product(panels[1], "dx\n[M,K]", ("dy\n[M,N]", "MN"), ("W\n[N,K]", "NK"), "N", "Dgrad")
draw_product(panels[2], "dW\n[N,K]", ("dyᵀ\n[N,M]", "NM"), ("x\n[M,K]", "MK"), "M", "Wgrad")
plots.show(fig, "The three products of a Linear; coloured: tiles along the dimension of the sum.")

# %% [markdown]
# Coloured: two neighbouring tiles, each with a scale of its own, as a product needs them: along its sum. $x$ is cut along a token in the first product, and **across** the tokens in the third.
#
# To feel it we need real tensors: a model of two layers with $D = 128$ columns, trained for some seconds. It is the first of the race below.

# %% tags=["nbval-ignore-output"]
STEPS, SEEDS, ROWS, T = (4 if fast() else 72), (2 if fast() else 3), 8, 64
if fast():
    print("MINIDS_FAST is set: 4 steps and 2 seeds, so the figures below mean nothing")
BASE = "BF16" if has_fast_bf16(torch.device("cpu")) else "FP32"
print(f"products of the baseline here: {BASE}")
text = load_text(vocab_size=1024)
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention": "mha"}
sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 320}
cfg = minids.ModelConfig(**sizes, **heads, num_hidden_layers=2, n_routed_experts=0)


def short(model, inputs, targets):
    """The loss of ROWS pieces of T tokens of a batch."""
    return model.loss(inputs[:ROWS, :T], targets[:ROWS, :T])


def train(seed, change=lambda model: model, loss=short):
    """A model trained for STEPS steps; `change` gets it new, as the seed alone makes it."""
    torch.manual_seed(seed)
    model = change(minids.Transformer(cfg))
    return train_live(model, text, steps=STEPS, seed=seed, loss=loss, live=False).model


plain = train(0)
print(f"{accounting.parameters(cfg).total:,} parameters, {STEPS} steps of {ROWS * T} tokens")


# %%
def linears(model):
    """{name: Linear} of attention and feed-forward: not the head."""
    return {n: m for n, m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)}


def tensors_of(model, inputs, targets):
    """{name: (x, W, dy)} of each Linear, in one pass forward and back, in float32."""
    seen = {}

    def keep(name):
        return lambda _, args, y: seen.update({name: (args[0], y)})

    def flat(t):
        return t.detach().float().flatten(0, -2)

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in linears(model).items()]
    loss = model.loss(inputs, targets)[0]
    for hook in hooks:
        hook.remove()
    dys = torch.autograd.grad(loss, [y for _, y in seen.values()])
    weights = {name: layer.weight.detach() for name, layer in linears(model).items()}
    pairs = zip(seen.items(), dys, strict=True)
    return {name: (flat(x), weights[name], flat(dy)) for (name, (x, _)), dy in pairs}


inputs, targets = minids.data.batch(text.tokens, 999, 0, 16, T)
real = tensors_of(plain, inputs, targets)
x, w, dy = real["1.mlp.down_proj"]
for name, t in {"x": x, "W": w, "dy": dy}.items():
    print(f"{name:2} {list(t.shape)}, the largest {t.abs().max():.1e}")

# %% [markdown]
# This is the last Linear before the head, $K = 320$ and $N = 128$. The forward pass quantises $x$ in 1×128 tiles along $K$, and keeps codes and scales. $dW$ sums over the 1,024 tokens, 128 of them under **one** scale; but in the kept $x$ these 128 have 128 different scales. What if you take one of them for all: the first token's, or the largest?
#
# Below, the error is $\lVert \text{got} - \text{exact} \rVert / \lVert \text{exact} \rVert$, with $\lVert t \rVert$ the root of the sum of all squares of $t$; exact is the product in float32.


# %%
def off(got, exact):
    """The error of a tensor relative to its size."""
    return ((got - exact).norm() / exact.norm()).item()


def wrong_wgrad(scales_of):
    """dW of x's forward codes, with scales [ceil(K/128), ceil(M/128)] made of 128 tokens' each."""
    parts = x_scale.split(128)
    scales = torch.stack([scales_of(part) for part in parts], 1)
    return matmul_blockscaled(*quantize_tiles(dy.T), x_fp8.T, scales)


x_fp8, x_scale = quantize_tiles(x)
exact = dy.T @ x
y = matmul_blockscaled(x_fp8, x_scale, *quantize_blocks(w))
print(f"y  of these codes and scales:              {off(y, x @ w.T):6.1%} off")
ways = {"that of the first": lambda part: part[0], "the largest": lambda part: part.amax(0)}
for name, way in ways.items():
    print(f"dW, a scale for 128 tokens: {name:14} {off(wrong_wgrad(way), exact):6.1%} off")
again = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T)
dw = matmul_blockscaled(*quantize_tiles(dy.T), *again)
print(f"dW of x quantised anew, along the tokens:  {off(dw, exact):6.1%} off")

# %% [markdown]
# The layout decides, not the format: a code means what its own scale says, and under another token's scale it is another number. Below you write all three products, then a layer out of them.
#
# `matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale)` is lesson 11's: first factor times second **transposed**, summed over the **last** dimension of both, 128 products at a time. The second one's scales may be those of 128×128 blocks, `[⌈rows/128⌉, ⌈columns/128⌉]`, or of 1×128 tiles, `[rows, ⌈columns/128⌉]`; the first one's are tiles'. Scales of other shapes are refused. (Its errors call the factors x and w, whatever you give it.)
#
# DeepSeek-V3's layouts (2412.19437, section 3.3.2): **activations and gradients in 1×128 tiles, weights in 128×128 blocks.**

# %% [markdown]
# ## Exercise 1 · Fprop
#
# *4 minutes · difficulty ●○○○○*
#
# $$y_{mn} = \sum_k x_{mk}\, W_{nk}$$
#
# | name | shape | |
# |---|---|---|
# | `x_fp8`, `x_scale` | `[M, K]`, `[M, ⌈K/128⌉]` | 1×128 tiles |
# | `w_fp8`, `w_scale` | `[N, K]`, `[⌈N/128⌉, ⌈K/128⌉]` | 128×128 blocks |
# | result | `[M, N]`, float32 | |
#
# Fprop asks one question only: which dimension is last, and is it the one that is summed?


# %%
def fprop(x_fp8, x_scale, w_fp8, w_scale):
    """y [M,N] = x W^T of x [M,K] in tiles and W [N,K] in blocks."""
    # BEGIN SOLUTION
    return matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale)
    # END SOLUTION


# %%
my_fprop = check(fprop)

# %% [markdown]
# ## Exercise 2 · Dgrad
#
# *8 minutes · difficulty ●●○○○*
#
# $$dx_{mk} = \sum_n dy_{mn}\, W_{nk}$$
#
# | name | shape | |
# |---|---|---|
# | `dy_fp8`, `dy_scale` | `[M, N]`, `[M, ⌈N/128⌉]` | 1×128 tiles |
# | `w_fp8`, `w_scale` | `[N, K]`, `[⌈N/128⌉, ⌈K/128⌉]` | the same blocks as in the forward pass |
# | result | `[M, K]`, float32 | |
#
# Now the sum goes over $N$. $W$ has $N$ first, so it must be turned. What happens to a tile of 1×128 when it is turned, and what to a square block? That is why weights have blocks: nothing is quantised anew here.


# %%
def dgrad(dy_fp8, dy_scale, w_fp8, w_scale):
    """dx [M,K] = dy W of dy [M,N] in tiles and W [N,K] in blocks."""
    # BEGIN SOLUTION
    return matmul_blockscaled(dy_fp8, dy_scale, w_fp8.T, w_scale.T)
    # END SOLUTION


# %%
my_dgrad = check(dgrad)

# %% [markdown]
# ## Exercise 3 · Wgrad
#
# *14 minutes · difficulty ●●●●○*
#
# $$dW_{nk} = \sum_m dy_{mn}\, x_{mk}$$
#
# | name | shape | |
# |---|---|---|
# | `dy` | `[M, N]` | as it came, **not** quantised |
# | `x_fp8`, `x_scale` | `[M, K]`, `[M, ⌈K/128⌉]` | what the forward pass kept; $x$ itself is gone |
# | `power_of_2` | | for every quantiser that you call |
# | result | `[N, K]`, float32 | |
#
# Both factors need tiles along the tokens, 128×1, as seen from $x$. The report's recipe for $x$: dequantise, transpose, quantise anew (section 3.3.2).
#
# `quantize_tiles(t, power_of_2)` and `dequantize_tiles(t_fp8, t_scale)` are lesson 10's.


# %%
def wgrad(dy, x_fp8, x_scale, power_of_2=False):
    """dW [N,K] = dy^T x of dy [M,N], not quantised, and x [M,K] in tiles along K."""
    # BEGIN SOLUTION
    dy_t = quantize_tiles(dy.T, power_of_2)
    x_t = quantize_tiles(dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    return matmul_blockscaled(*dy_t, *x_t)
    # END SOLUTION


# %%
my_wgrad = check(wgrad)

# %% [markdown]
# ## What the second rounding costs
#
# $x$ is rounded twice: once along $K$, once along the tokens. Does the second time hurt? With scales of amax/448 the grid of FP8 numbers shifts with each new scale, so a number that was on the old grid lies between two of the new one. With **powers of 2** the grids are the same, but for the ends: dividing by $2^k$ changes the exponent only. What should you see? In the row of powers of 2, no second error.

# %%
print(f"{'scales':12} x, rounded once    twice    dW from x    dW from x twice rounded")
for power in (False, True):
    codes = quantize_tiles(x, power)
    once = dequantize_tiles(*codes)
    twice = dequantize_tiles(*quantize_tiles(once.T, power)).T
    straight = matmul_blockscaled(*quantize_tiles(dy.T, power), *quantize_tiles(x.T, power))
    kind = "powers of 2" if power else "amax / 448"
    print(f"{kind:12}{off(once, x):14.2%} {off(twice, x):11.2%}", end="")
    print(f"{off(straight, exact):12.2%} {off(my_wgrad(dy, *codes, power), exact):20.2%}")

# %% [markdown]
# So for $dW$ powers of 2 are no compromise: what they lose the first time they save the second. For $y$, with one rounding, they are (first column). V3 used them for just three kinds of tensors; from V3.1 on every scale is one. The layer below is run with `power_of_2=True`; your functions take either.
#
# ## A Linear that trains
#
# A layer in PyTorch needs two functions: one for the forward pass, which also says what is **kept** for backward; one for the backward pass, which gets $dy$ and what was kept. What is kept sets the memory of training: a model keeps something of every layer until backward has come by.

# %% [markdown]
# ## Exercise 4 · Forward
#
# *7 minutes · difficulty ●●○○○*
#
# Quantise $x$ and $W$, each in its layout, and multiply.
#
# | name | shape | |
# |---|---|---|
# | `x` | `[M, K]` | activations |
# | `w` | `[N, K]` | the weight as the optimizer knows it, the **master weight** |
# | result | five tensors | $y$ `[M, N]` float32, then `x_fp8, x_scale, w_fp8, w_scale`, to be kept |
#
# Neither `x` nor `w` is among the results.


# %%
def linear_forward(x, w, power_of_2=False):
    """(y, x_fp8, x_scale, w_fp8, w_scale) of y [M,N] = x W^T, x [M,K], w [N,K]."""
    # BEGIN SOLUTION
    kept = *quantize_tiles(x, power_of_2), *quantize_blocks(w, power_of_2)
    return my_fprop(*kept), *kept
    # END SOLUTION


# %%
my_linear_forward = check(linear_forward)

# %% [markdown]
# ## Exercise 5 · Backward
#
# *8 minutes · difficulty ●●●○○*
#
# | name | shape | |
# |---|---|---|
# | `dy` | `[M, N]` | float32, as it came |
# | `x_fp8`, `x_scale`, `w_fp8`, `w_scale` | | what forward kept |
# | result | `(dx, dw)` | `[M, K]` and `[N, K]`, float32 |
#
# $dy$ is used twice, and quantised twice: in tiles along $N$ for one product, along the tokens for the other. Both times from `dy` as it came.


# %%
def linear_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    """(dx [M,K], dw [N,K]) of dy [M,N] and what linear_forward kept."""
    # BEGIN SOLUTION
    dx = my_dgrad(*quantize_tiles(dy, power_of_2), w_fp8, w_scale)
    return dx, my_wgrad(dy, x_fp8, x_scale, power_of_2)
    # END SOLUTION


# %%
my_linear_backward = check(linear_backward)

# %% [markdown]
# The frame around your two functions is given. `autograd` is the part of PyTorch that calls `backward`. **Autocast** is its switch for products in bfloat16; it is off inside, for your products have chosen their format already.


# %%
class Fp8Product(torch.autograd.Function):
    """Your forward and backward as one operation that autograd knows."""

    @staticmethod
    def forward(ctx, x, w, backward):
        y, *kept = my_linear_forward(x, w, True)
        ctx.save_for_backward(*kept)
        ctx.by, ctx.dtype = backward, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dw = ctx.by(dy, *ctx.saved_tensors, True)
        return dx.to(ctx.dtype), dw, None


class MyFp8Linear(torch.nn.Linear):
    by = staticmethod(my_linear_backward)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            y = Fp8Product.apply(x.flatten(0, -2), self.weight, self.by)
        return y.unflatten(0, x.shape[:-1]).to(product_dtype(x))


# %%
def in_fp8(model, kind=None):
    """The model with all Linears of attention and feed-forward made FP8 ones; the head stays."""
    for layer in linears(model).values():
        layer.__class__ = kind or MyFp8Linear
    return model


def both_gradients(layer, x, dy):
    """(y, dx, dW) of a layer."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight], dy)


layers = {kind: kind(w.shape[1], w.shape[0], bias=False) for kind in (torch.nn.Linear, MyFp8Linear)}
layers[fp8.Fp8Linear] = fp8.Fp8Linear(w.shape[1], w.shape[0])
for layer in layers.values():
    layer.weight.data.copy_(w)
wide, yours, shipped = (both_gradients(layer, x, dy) for layer in layers.values())
for name, a, b, c in zip(("y", "dx", "dW"), wide, yours, shipped, strict=True):
    print(f"{name:2} yours: {off(b, a):.2%} off float32, {off(b, c):.0e} off minids' Fp8Linear")

# %% [markdown]
# Three errors of nearly the same size. Rounding to three bits of mantissa errs by up to 1/16, in the root mean square by what the table after exercise 3 says for $x$, and both factors are rounded: $\sqrt 2$ times that is the size to expect. The length of the sum does not matter: errors and results both grow as its root, as long as signs are mixed.
#
# (minids' own `Fp8Linear` takes Triton kernels on a GPU with FP8, and such an emulation elsewhere. It warns about that once.)
#
# ## What is kept
#
# `saved_tensors_hooks` shows each tensor that autograd keeps. A Linear of 1024 tokens and 512×512 weights, in BF16 and yours:


# %%
def kept_tensors(run):
    """The tensors that autograd keeps of run(), each once, and the result."""
    kept = {}

    def note(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = run()
    return list(kept.values()), result  # the result too, so that nothing is freed meanwhile


some = torch.randn(1024, 512, requires_grad=True)
for kind in (torch.nn.Linear, MyFp8Linear):
    layer = kind(512, 512, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = kept_tensors(lambda layer=layer: layer(some))
    print(f"{kind.__name__}: {sum(t.nbytes for t in kept):,} bytes")
    for t in kept:
        print(f"    {list(t.shape)!s:12} {str(t.dtype)[6:]:14} {t.nbytes:9,} bytes")

# %% [markdown]
# One byte a number instead of two, and 4 bytes of scale for 128 of them in $x$, $4/128 = 3.1\,\%$ more. And the whole model, all its layers, for one step of training?

# %%
totals = {}
for name, change in {"BF16": lambda m: m, "FP8": in_fp8, "minids": fp8.convert}.items():
    model = change(copy.deepcopy(plain))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = kept_tensors(lambda model=model: short(model, inputs, targets)[0])
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    totals[name] = sum(t.nbytes for t in kept)
    ours = sum(t.nbytes for t in kept if t.dtype == torch.float8_e4m3fn)
    print(f"{name:6}: {totals[name]:,} bytes kept, of them {ours:,} in FP8 codes")
print(f"yours: {totals['FP8'] / totals['BF16']:.0%} of BF16's; minids': ", end="")
print(f"{totals['minids'] / totals['BF16']:.0%}")

# %% [markdown]
# The rest is what norms, SwiGLU, attention and the head keep: nothing of it is FP8 here. minids is ahead of you where several Linears read the same $x$ (queries, keys and values): it quantises and keeps it once.
#
# ## The race
#
# The report's claim: the relative difference of the loss against BF16 stays **below 0.25%** (2412.19437, section 3.3). Same first weights, same batches, several **seeds** (the number that decides both):
#
# | | products of attention and feed-forward |
# |---|---|
# | base | BF16 (or FP32, where this processor has no BF16; see above) |
# | FP32 | float32: how much does ANY rounding change? (nothing, where the base is FP32 too) |
# | FP8 | your functions |
# | blocks | yours, but $dy$ in 128×128 blocks for Dgrad |
#
# The last one is the layout with which a 16B model **diverged** (its loss ran away from BF16's), after about 300 billion tokens (appendix B of the report).

# %% [markdown]
# ### Your prediction
#
# By how many percent is the held-out loss of FP8 above the base's, after training as short as here? (Negative: below.) Write a number in place of `None`.

# %%
my_guess = None  # percent, such as 1
guess = predict("FP8's loss against the base's, mean over the seeds?", my_guess, "%")

# %% tags=["nbval-ignore-output"]
unseen = minids.data.encode_files(text.tokenizer, text.corpus.heldout)
bytes_per_token = sum(map(len, text.corpus.heldout)) / len(unseen)
sample = minids.data.batch(unseen, 0, 0, 16 if fast() else 64, 128)


@torch.no_grad()
def bits(model):
    """Bits per byte on the held-out sample, in the products that the model was trained with."""
    with torch.autocast("cpu", torch.bfloat16, BASE == "BF16"):
        nats = model.loss(*sample)[1].item()
    return minids.data.bits_per_byte(nats, tokens=1, nbytes=bytes_per_token)


def wide_loss(model, inputs, targets):
    with torch.autocast("cpu", enabled=False):
        return short(model, inputs, targets)


def blocks_backward(dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
    """Your backward, but for dx dy has one scale for 128×128 numbers."""
    dw = my_wgrad(dy, x_fp8, x_scale, power_of_2)
    return my_dgrad(*as_tiles(*quantize_blocks(dy, power_of_2)), w_fp8, w_scale), dw


def as_tiles(codes, scale):
    """Blocks as tiles: each of a block's rows gets its scale."""
    return codes, scale.repeat_interleave(128, 0)[: len(codes)]


# %% tags=["nbval-ignore-output"]
class BlocksLinear(MyFp8Linear):
    by = staticmethod(blocks_backward)


kinds = {"base": {}, "FP32": {"loss": wide_loss}, "FP8": {"change": in_fp8}}
kinds["blocks"] = {"change": lambda model: in_fp8(model, BlocksLinear)}
models, found = {}, {name: [] for name in kinds}
for seed in range(SEEDS):
    for name, how in kinds.items():
        first = (name, seed) == ("base", 0)
        models[name, seed] = plain if first else train(seed, **how)
        found[name].append(bits(models[name, seed]))
    print(f"seed {seed}:", ", ".join(f"{n} {b[-1]:.4f}" for n, b in found.items()), flush=True)

# %% tags=["nbval-ignore-output"]
results = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
gaps = {name: 100 * (b / results["base"] - 1) for name, b in results.items() if name != "base"}
print("against the base, same seed:   mean       from         to")
for name, gap in gaps.items():
    print(f"{name:28} {gap.mean():+.3f}%    {gap.min():+.3f}%    {gap.max():+.3f}%")
b = results["base"]
print(f"the base alone, other seeds: {100 * (b.max() / b.min() - 1):.1f}% apart")
gap, rounding = gaps["FP8"], gaps["FP32"].abs().max()
if not fast():
    inside = (gap.abs() < 0.25).sum().item()
    print(f"FP8 is within 0.25% of {BASE} with {inside} of {SEEDS} seeds.")
    if gap.min() > 0 or gap.max() < 0:
        print(f"It is {'worse' if gap.min() > 0 else 'better'} with every seed", end="")
        beside = f", {abs(gap.mean()) / rounding:.1f} times what FP32 differs at most"
        print(f"{beside if rounding > 0 else ''}.")  # 0 where the base is FP32 itself
    else:
        print("Its sign changes with the seed: below the spread, this size cannot tell.")
    guess.compare(gap.mean().item())
    more = gaps["blocks"] - gap
    apart = "told apart" if more.min() > 0 or more.max() < 0 else "not told apart"
    print(f"blocks against tiles: {more.min():+.3f}% to {more.max():+.3f}%, {apart}")

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(7, 2.6)
axes.axvspan(-0.25, 0.25, color=plots.COLORS[2], alpha=0.12)
axes.axvline(0, color=plots.INK, linestyle=":")
for row, gap in enumerate(gaps.values()):
    style = {"color": plots.COLORS[row], "marker": plots.MARKERS[row], "linestyle": ""}
    axes.plot(gap, [row] * len(gap), **style)
    axes.plot(gap.mean(), row, linestyle="", marker="|", color=plots.INK, markersize=18)
axes.set_yticks(range(len(gaps)), list(gaps))
edge = max(0.3, 1.15 * max(gap.abs().max().item() for gap in gaps.values()))
axes.set(xlabel="loss against the base with the same seed, %", ylim=(len(gaps) - 0.5, -0.5))
axes.set(xlim=(-edge, edge), title="each seed (|: mean); shaded: the report's 0.25%")
plots.show(fig, "Relative loss differences of FP32, FP8 and FP8 with gradient blocks, each seed.")

# %% [markdown]
# How to read this: a point is one seed, and only differences on the same seed count, for seeds differ from each other far more than number formats do. FP8's price is small here, and of one sign if your line above says so. What you have NOT shown: that it stays so for trillions of tokens, which is what the claim is about. A model of this size, trained for seconds, can refute a recipe but hardly confirm it.
#
# And the blocks? Nothing ran away: **the divergence is not reproduced at this size.** So let us look not at the loss but at the numbers themselves.

# %% [markdown]
# ## Why blocks fail, where it can be seen
#
# A row of $dy$ is a token's gradient: what this token wants changed. A token that is predicted well wants little. In a block of 128×128 it shares a scale with 127 other tokens. Its own error is the question, so: the error of $dx$, **token by token**, over the size of the token's gradient. All Linears of the model, 1,024 tokens of training text. ($dx$ is compared with $dy\,W$ of the same rounded $W$, so that only the rounding of $dy$ counts.)


# %%
def token_errors(w, dy, quantise):
    """(size of each token's gradient, relative error of its dx), for a way to quantise dy."""
    blocks = quantize_blocks(w, True)
    got, exact = my_dgrad(*quantise(dy), *blocks), dy @ dequantize_blocks(*blocks)
    size = dy.norm(dim=1)
    there = size > 0  # a token without a gradient has no error either
    return size[there], ((got - exact).norm(dim=1) / exact.norm(dim=1))[there]


WAYS = {
    "1×128 tiles": lambda dy: quantize_tiles(dy, True),
    "128×128 blocks": lambda dy: as_tiles(*quantize_blocks(dy, True)),
}


# %%
def all_errors(tensors, quantise):
    """token_errors of all Linears; sizes relative to the Linear's largest."""
    pairs = []
    for _, w, dy in tensors.values():
        size, error = token_errors(w, dy, quantise)
        pairs.append(torch.stack([size / size.max(), error]))
    return torch.cat(pairs, 1)


def say(title, tensors):
    print(title)
    for name, way in WAYS.items():
        size, error = all_errors(tensors, way)
        share = (error > 0.1).float().mean()
        print(f"    {name:15} median {error.median():.1%}, worst hundredth", end=" ")
        print(f"{error.quantile(0.99):.1%}, worst {error.max():.0%}; {share:.2%} above 10%")
    half, few = (-size.quantile(q).log2().item() for q in (0.5, 0.01))
    print(f"    half of the tokens are 2^{half:.0f} times or more below the largest,", end=" ")
    print(f"a hundredth 2^{few:.0f} times")


say("the model of the race, training text:", real)

# %% [markdown]
# Nearly no difference: gradients of unlike size, and blocks do not mind. Lesson 10 says why: FP8 is a **floating-point** format. E4M3 has full precision from 448 down to $2^{-6}$, a factor of 28,672, nearly $2^{15}$. A token whose gradient is a hundredth of its neighbour's just takes smaller exponents.
#
# So a block fails only when tokens differ by more than that. When do they? Gradients shrink with what is left to learn: a token that is predicted with a probability of 0.9999 has a ten-thousandth of the gradient of one that comes as a surprise. A small model, after seconds, is never that sure. But you can make it sure: let it learn 8 pieces of text **by heart**. Then mix them with new text, in turns.

# %% tags=["nbval-ignore-output"]
known, sure = [t[:ROWS, :T] for t in (inputs, targets)], copy.deepcopy(plain)
by_heart = train_live(
    sure,
    text,
    steps=4 if fast() else 60,
    loss=lambda model, *_: model.loss(*known),
    live=False,
)
fresh = [t[:ROWS, :T] for t in minids.data.batch(unseen, 1, 0, 16, T)]
mixed = [torch.stack([a, b], 1).flatten(0, 1) for a, b in zip(known, fresh, strict=True)]
for name, (i, t) in {"known": known, "new": fresh}.items():
    nats = sure.loss(i, t)[1].item()
    print(f"{name} text: {nats:.4f} nats per token, a probability of {math.exp(-nats):.2%}")
hard = tensors_of(sure, *mixed)
say("a model that knows half of the text by heart:", hard)

# %% tags=["nbval-ignore-output"]
fig, panels = plots.figure(9.5, 3.6, columns=2)
cases = {"the model of the race": real, "half of the text known by heart": hard}
for axes, (title, tensors) in zip(panels, cases.items(), strict=True):
    for row, (name, way) in reversed(list(enumerate(WAYS.items()))):
        size, error = all_errors(tensors, way)
        style = {"color": plots.COLORS[3 * row], "marker": "o", "linestyle": "", "markersize": 1.5}
        axes.plot(size, error, label=name, markevery=1, **style)
    axes.set(xscale="log", yscale="log", xlim=(2e-7, 2), ylim=(0.008, 3), title=title)
    axes.set(xlabel="a token's gradient / the largest one", ylabel="relative error of its dx")
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["1%", "3%", "10%", "30%", "100%"])
handles, names = panels[0].get_legend_handles_labels()
fig.legend(handles, names, loc="outside lower center", ncols=2, markerscale=4, frameon=False)
plots.show(fig, "Errors of dx by token: they rise for small gradients with blocks, not with tiles.")

# %% [markdown]
# There it is. Tiles do not care about a token's size; with blocks the smallest lose their digits (an error as large as the gradient: it has become 0, or noise). The share of such tokens grows as a model gets surer of its text. That this is what stopped the 16B model is **our reading**: the experiment shows the mechanism, not that run.
#
# Why does a loss not notice at once? Small gradients weigh little in a sum: the error of ALL of $dx$ together, in the explorer's title, stays where it was.

# %% [markdown]
# ## Explore: how unequal may tokens be?
#
# Made-up tensors: 512 tokens, $K = N = 256$. The gradient of a token is random, times $2^{-s}$ with $s$ drawn evenly from 0 to `spread`. Points are tokens. E5M2 is FP8's other format, with one bit more of exponent and one less of mantissa (lesson 10). Dotted: how far below a format's largest number its full precision ends.
#
# **Question:** from which spread on do blocks ruin small tokens in E4M3, and in E5M2? Why do tiles never care? What is E5M2's price?
#
# <details><summary>Answer</summary>E4M3: up to a spread of 12 blocks and tiles are alike. From 13 on the smallest tokens leave the line of the others (at 2^-13, before the dotted 2^-15, for a block's largest number is some powers of 2 above a typical one); the title counts those above a tenth, more and more with the spread. One scale for all fails at the same spread, for each block holds loud tokens already. E5M2 holds out until about 28: its full precision spans a factor of 2^30 instead of 2^15. Its price is twice the error for every token, at any spread, for it has one bit less. That is the bargain of earlier recipes, E5M2 for gradients; V3 takes E4M3 and gives the range to the scales instead. A tile holds one token's numbers only, so its scale follows the token. The error of all of dx does not move: small tokens weigh nothing in it.</details>


# %%
def quantise_as(dy, rows, columns, dtype):
    """Codes of dy in a format of FP8, and scales as of tiles; rows × columns numbers share one."""
    parts = dy.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = parts.abs().amax((1, 3), keepdim=True) / torch.finfo(dtype).max
    scale = reference.power_of_two_scale(largest)
    codes = (parts / scale).flatten(2).flatten(0, 1).to(dtype)
    scales = scale.expand(-1, rows, -1, -1).flatten(2).flatten(0, 1)
    return codes, scales.repeat_interleave(columns // 128, 1)


LAYOUTS = {"128×128 blocks": (128, 128), "1×128 tiles": (1, 128), "one scale": (512, 256)}
FORMATS = {"E4M3": (torch.float8_e4m3fn, 2.0**-15), "E5M2": (torch.float8_e5m2, 2.0**-30)}


# %%
def draw(figure, spread, layout, format):
    numbers = torch.Generator().manual_seed(3)
    w = torch.randn(256, 256, generator=numbers)
    sizes = 2.0 ** (-spread * torch.rand(512, 1, generator=numbers))
    dy = torch.randn(512, 256, generator=numbers) * sizes
    dtype, range_of_format = FORMATS[format]

    def quantise(dy):
        return quantise_as(dy, *LAYOUTS[layout], dtype)

    size, error = token_errors(w, dy, quantise)
    axes, blocks = figure.subplots(), quantize_blocks(w, True)
    axes.plot(size / size.max(), error, linestyle="", markersize=2.5, markevery=1)
    axes.axvline(range_of_format, color=plots.INK, linestyle=":", marker="")
    axes.set(xscale="log", yscale="log", xlim=(2.0**-34, 2), ylim=(0.008, 3))
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["1%", "3%", "10%", "30%", "100%"])
    axes.set(xlabel="a token's gradient / the largest", ylabel="relative error of its dx")
    total = off(my_dgrad(*quantise(dy), *blocks), dy @ dequantize_blocks(*blocks))
    worse = (error > 0.1).float().mean()
    words = f"{worse:.0%} of tokens above 10%; all of dx together {total:.1%}"
    axes.set_title(f"{format}, {layout}: {words}")


# %%
alt = "Error of dx by token over the size of its gradient, for a layout and a format"
controls = {"layout": [*LAYOUTS], "format": [*FORMATS]}
explore(draw, alt, (7.5, 3.8), spread=(0, 32), **controls)

# %% [markdown]
# ## What must stay in more bits: the master weights
#
# Products are FP8. Why not keep the weights themselves in FP8, or in BF16? Because an **update** is small: a step of the optimizer changes a weight by about the **learning rate** or less, and near 0.03 the numbers of BF16 are 0.0001 apart, those of E4M3 0.002. An update below half of that is rounded away, however often it comes.
#
# The next cell takes a real update of the model, shrinks it to several learning rates, and counts the weights that stay exactly what they were. V3's rate fell from 2.2e-4 to 2.2e-5 (section 4.2).
#
# ### Your prediction
#
# At a rate of 1e-4: what share of the updates is lost by BF16 weights?

# %%
my_second_guess = None  # percent, such as 10
question = "Rate 1e-4, weights in BF16: which share of updates vanishes?"
vanished = predict(question, my_second_guess, "%")


# %%
def in_e4m3(w):
    """w as its codes and block scales say it."""
    return dequantize_blocks(*quantize_blocks(w, True))


MASTERS = {"FP32": lambda w: w, "BF16": lambda w: w.bfloat16().float(), "E4M3": in_e4m3}
UNIT = 0.01  # the rate of the update that is measured


def one_update(model):
    """[(weight, its update at the rate UNIT)] of the Linears, by minids' optimizer."""
    model = copy.deepcopy(model)
    before = [layer.weight.detach().clone() for layer in linears(model).values()]
    optimizers = optim.build_optimizers(model, UNIT, UNIT, 0.0)
    short(model, inputs, targets)[0].backward()
    for optimizer in optimizers:
        optimizer.step()
    after = [layer.weight.detach() for layer in linears(model).values()]
    return [(b, a - b) for b, a in zip(before, after, strict=True)]


def lost(updates, keep, rate):
    """The share of weights that an update of `rate` leaves as they were."""
    same = [(keep(keep(w) + u * (rate / UNIT)) == keep(w)).flatten() for w, u in updates]
    return torch.cat(same).float().mean().item()


# %% tags=["nbval-ignore-output"]
updates, rates = one_update(plain), [10 ** (-2 - i / 4) for i in range(17)]
typical = torch.cat([u.flatten() for _, u in updates]).square().mean().sqrt() / UNIT
print(f"a typical update here is {typical:.2f} times the rate")
fig, axes = plots.figure(7.5, 3.4)
for name, keep in MASTERS.items():
    axes.plot(rates, [100 * lost(updates, keep, rate) for rate in rates], label=name)
axes.axvspan(2.2e-5, 2.2e-4, color=plots.INK, alpha=0.1)
axes.text(7e-5, 104, "V3's rates", ha="center", va="bottom")
axes.set(xscale="log", xlim=(1e-2, 1e-6), ylim=(-3, 115), xlabel="learning rate")
axes.set(ylabel="updates that vanish, %")
plots.label_lines(axes)
plots.show(fig, "Share of updates that vanish over the rate, for weights in three formats.")
for name, keep in MASTERS.items():
    print(f"rate 1e-4, weights in {name}: {lost(updates, keep, 1e-4):.1%} of the updates vanish")
vanished.compare(100 * lost(updates, MASTERS["BF16"], 1e-4))

# %% [markdown]
# Does it matter for the loss? The trained models of the race go on for some steps at the rate 1e-4, with **all** matrices rounded to the format before each step; products as in the base (and once more before the loss is measured). What should you see? FP32 gains most, E4M3 little or nothing.

# %% tags=["nbval-ignore-output"]
RATE, MORE = 1e-4, 4 if fast() else 40


@torch.no_grad()
def round_all(model, keep):
    """Round all matrices of the model to a format, in place."""
    for p in model.parameters():
        if p.dim() == 2:
            p.copy_(keep(p))


def kept_in(keep):
    """The loss of a model whose matrices are kept in a format between the steps."""

    def loss(model, inputs, targets):
        round_all(model, keep)
        return short(model, inputs, targets)

    return loss


gains = {name: [] for name in MASTERS}
for seed in range(SEEDS):
    for name, keep in MASTERS.items():
        model, options = copy.deepcopy(models["base", seed]), {"seed": 7, "live": False}
        train_live(model, text, steps=MORE, loss=kept_in(keep), rate=RATE, **options)
        round_all(model, keep)
        gains[name].append(100 * (1 - bits(model) / found["base"][seed]))
for name, gain in gains.items():
    line = ", ".join(f"{g:+.2f}%" for g in gain)
    print(f"weights in {name}: the loss falls by {sum(gain) / len(gain):+.2f}% (by seed {line})")

# %% [markdown]
# A warning about short experiments: from scratch, at the rate 0.01 of the race, do E4M3 weights lose at all? Compare `bits(train(0, loss=kept_in(in_e4m3)))` with `found["base"][0]`. There many updates are larger than the gap between two numbers (look at the left end of the figure), and what rounding does to the others is noise, which may even help for a while. At the rates of a long training it does harm.
#
# The same holds for every **long sum of small numbers**, such as gradients added up over many batches. Products may be rough; what is kept and added to may not. The optimizer's averages (moments) are no such sums: a step renews $1 - 0.95 = 5\,\%$ or $1 - 0.9 = 10\,\%$ of them (V3's two β), far more than half a gap of BF16, $1/256 = 0.4\,\%$ at most. V3 saw no loss with BF16 there (section 3.3.3).
#
# What DeepSeek-V3 keeps (section 3.3):
#
# | | kept in |
# |---|---|
# | factors of Fprop, Dgrad, Wgrad | FP8, E4M3 |
# | embedding, head, gates (routers), norms, attention's own operations | BF16 or FP32 |
# | master weights, gradients while they add up | FP32 |
# | the optimizer's two averages (moments) | BF16 |

# %% [markdown]
# ## Time: what does it cost to quantise?
#
# A CPU only emulates FP8. So the time is arithmetic here: the roofline of lessons 00 and 11, a whole Linear, forward and backward, at published peaks. A product takes the longer one of its FLOPs' and its bytes' time; a quantiser moves bytes:
#
# | | bytes |
# |---|---|
# | $x$, before Fprop | reads $2MK$, writes $MK$ |
# | $W$, once in a step, as it is and turned | reads $2NK$, writes $2NK$ |
# | $dy$, in both layouts | reads $2MN$, writes $2MN$ |
# | $x$ again, turned, before Wgrad | reads $MK$, writes $MK$ |
#
# ($W$ turned is the same codes in another order: Hopper's FP8 units read along the sum only. $W$ counts as BF16; making that from FP32 master weights is left out, on both sides. So are scales: 4 bytes for 128 of $x$ and $dy$.)


# %%
def linear_seconds(M, N, K, gpu="H200"):
    """(BF16, FP8 products, quantising): the least seconds of a Linear, forward and backward."""
    flops, bf16, fp8_type = 2 * M * N * K, torch.bfloat16, torch.float8_e4m3fn
    narrow = [(M * K + N * K, M * N), (M * N + N * K, M * K), (M * N + M * K, 2 * N * K)]
    moved = {1: [a + 2 * b for a, b in narrow], 2: [2 * a + 2 * b for a, b in narrow]}
    wide, quick = (
        sum(accounting.roofline_seconds(flops, n, gpu, dtype) for n in moved[dtype.itemsize])
        for dtype in (bf16, fp8_type)
    )
    extra = (3 + 2) * M * K + 4 * N * K + 4 * M * N
    return wide, quick, extra / accounting.gpu_named(gpu).bandwidth


print("H200, M = 16,384 tokens, N = K: arithmetic at the published peaks")
for width in (256, 512, 1024, 2048, 4096, 7168):
    wide, quick, extra = linear_seconds(16384, width, width)
    print(f"{width:5} columns: products alone {wide / quick:.2f} times as fast,", end=" ")
    share = extra / (quick + extra)
    print(f"with quantising {wide / (quick + extra):.2f}; that takes {share:3.0%}")

for gpu in ("H200", "H100", "RTX 4090"):
    tried = ((width, *linear_seconds(16384, width, width, gpu)) for width in range(64, 8192, 64))
    wins = next((n for n, wide, quick, extra in tried if quick + extra < wide), None)
    print(f"{gpu}: FP8 ahead from {wins} columns on")

# %% tags=["nbval-ignore-output"]
machine.recorded("fp8")

# %% [markdown]
# ## When does it not pay?
#
# - **Small matrices:** below the widths above quantising eats the gain, even with kernels that reach their peaks; with others (lesson 11) the limit is far higher.
# - **A training step is more than Linears:** attention, norms, the optimizer, waiting for other GPUs. Published gains end to end, not measured here: [torchao's README](https://github.com/pytorch/ao/tree/main/torchao/float8) has up to 25% for a model of 8 billion parameters; [nanochat's log](https://github.com/karpathy/nanochat/blob/master/dev/LOG.md) 17% at depth 26, about 5% at equal quality, and a loss of speed at depth 12.
# - **Old cards:** without FP8 units (before sm_89: A100, RTX 30) it is only more work.
# - **Memory:** codes of $W$ come on top of the master weights; only activations get smaller.
# - **Doubt:** a run that diverges is lost whole; FP8 saves a part of one.

# %% tags=["nbval-ignore-output"]
steps = {}
for name, change in {BASE: lambda m: m, "yours": in_fp8, "minids": fp8.convert}.items():
    model = change(copy.deepcopy(plain))

    def step(model=model):
        with torch.autocast("cpu", torch.bfloat16, BASE == "BF16"):
            short(model, inputs, targets)[0].backward()

    steps[name] = step
for name, seconds in machine.race(steps, rounds=3).items():
    print(f"{name:6}: {1e3 * seconds:5.0f} ms for a step forward and back on this processor")

# %% [markdown]
# ## In the real DeepSeek
#
# From the V3 report, section 3.3, and what came after:
#
# - All three products take E4M3, and give BF16 or FP32; scales from the amax of the tensor at hand, as here.
# - Powers of 2 only for: inputs of the Linear after attention, activations before the experts' up-projection, gradients before their down-projection. From V3.1 on: all scales.
# - Sums promoted to FP32 every 128 products (lesson 11).
# - The claim: relative loss error against BF16 below 0.25%.
# - The official code runs trained models only. `minids.fp8` trains:
#
# ```python
# model = minids.fp8.convert(minids.Transformer(cfg))  # all Linears but head and gates; experts too
# ```
#
# and in a shell `python -m minids.train --precision fp8`.

# %% [markdown]
# ## To remember
#
# 1. A Linear's three products sum over inputs, outputs and tokens; each needs its tiles along its own sum, so $x$ and $dy$ are quantised twice, and $W$'s square blocks once.
# 2. Factors may be rough, for their errors have both signs; what is kept and added to, such as master weights, may not.
# 3. Small gradients beside large ones need scales of their own: a loss after seconds of training does not show it.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Why may W be used in Fprop and in Dgrad with the same codes?
# <details><summary>its blocks are square</summary>Yes: turned, a block is still 128 along the sum.</details>
# <details><summary>weights have no outliers</summary>No: that is not what decides.</details>
#
# **2.** Why does Wgrad get dy itself, not its codes?
# <details><summary>the codes' tiles lie along N</summary>Yes: here the sum goes over tokens, and rounding twice can be avoided, for dy is still there.</details>
# <details><summary>dW must not be FP8</summary>No: both its factors are.</details>
#
# **3.** FP8 is 0.05% worse with each of three seeds. What does that show?
# <details><summary>too little to call it a price</summary>Yes: by luck alone, three of one sign come up in one of four trials. It is a hint, at this size and length.</details>
# <details><summary>the 0.25% claim holds for V3</summary>No: that one is about other sizes and trillions of tokens.</details>
#
# **4.** Learning rate 1e-5: what do E4M3 weights learn?
# <details><summary>almost nothing</summary>Yes: nearly all updates are smaller than half a gap.</details>
# <details><summary>the same, more slowly</summary>No: what is rounded away does not add up.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Train twice from a shell: `python -m minids.train --steps 300 --checkpoint-every 3600 --precision bf16 --out A` (or `fp32`, if that is the base here), and with `--precision fp8` into `B`; FP8, emulated, takes longer. Read both `log.jsonl` with `minids.report.read_log`, and plot the relative difference of `bits_per_byte` over `step`. (A row is the mean over 10 steps; a checkpoint ends one early: hence 3600 seconds.) Does the difference grow? Do it for a second `--seed` before you say so.
#    <details><summary>Expected</summary>Weights and batches come from the seed, so the two runs begin alike and differ by rounding alone. That it grows shows only where the mean of many rows moves away from 0, further than single rows lie apart, and to the same side with both seeds. And 300 steps are short: quiz question 3.</details>
# 2. `minids.fp8.convert(model, power_of_2=False)` takes scales of amax/448. Convert two copies of one model (`copy.deepcopy(plain)`), one with either kind of scale, run a batch forward and back through both and through an unconverted copy, and compare the gradients of the weights matrix by matrix. Which kind is nearer to float32, and is it the one that you expect from the table after exercise 3?
#    <details><summary>Expected</summary>The two are close, and which is nearer changes from matrix to matrix. The table's last column is about one product alone. In a model, dy comes with the errors of all Linears, forward and back; most tensors there are rounded once, which is better with amax/448. The head shows it: no product of its own is FP8, and its gradient is off all the same.</details>

# %%
status()
