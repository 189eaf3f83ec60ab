# ---
# title: A product of 8-bit numbers
# promise: You imitate the short sums of an FP8 tensor core, see where they go wrong and how DeepSeek-V3 saves them every 128 products, write the block-scaled product as a kernel, and compute from which shape on it can pay.
# minutes: 90
# difficulty: 4
# needs: [torch, triton]
# objectives:
#   - imitate a sum that keeps 14 bits, and say why its error grows with the number of terms
#   - measure what promoting the sum every 128 products saves, against the error of FP8 itself
#   - multiply FP8 matrices with scales of tiles and blocks, in torch and as a Triton kernel
#   - read in the compiled code why such a kernel is slow, and what makes it faster
#   - compute from which shape on FP8 can beat BF16, with the quantisation paid for
# ---

# %%
import functools
import math
import os
import re
import textwrap

import torch

if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
    os.environ["TRITON_INTERPRET"] = "1"  # a GPU without FP8: kernels are interpreted

import minids
from minids import accounting, triton_env
from minids.fp8 import reference
from minids.lab import check, compiled, explore, hint, machine, plots, predict, status
from minids.lab.exercises import l11
from minids.lab.tiles import count, instead, missing, tl, triton
from minids.numerics import relative_error

if not missing():
    from minids.fp8 import kernels
print(missing() or f"Triton's kernels run here: {triton_env.mode()}")
_ = torch.set_grad_enabled(False)  # nothing is trained in this lesson
TILE, FP8, BF16 = reference.TILE, torch.float8_e4m3fn, torch.bfloat16

# %% [markdown]
# ## The problem: a sum that loses its end
#
# Training is made of matrix products (also called **GEMM**, general matrix multiply). Each number of $y = x\,w^T$ is a sum of $K$ products. Lesson 10 made the factors small: FP8, format E4M3, 8 bits each. The product of two such numbers is exact in float32.
#
# The *sum* is the trouble. A GPU multiplies matrices in **tensor cores**, units for small matrix products, and those of Hopper (H100, H200, H800) add FP8 products with about 14 bits only (DeepSeek-V3 report, 2412.19437, section 3.3.2). float32 has 24.
#
# `reference.matmul_limited` imitates such a sum on any machine; you will write it yourself. Here is the product of two matrices of 32 rows, with positive numbers. The error is the largest one, relative to the largest number of the result.


# %%
def numbers(kind, K, rows=32):
    """[rows,K] random numbers for E4M3, before they are rounded to it: at most about 448."""
    drawn = torch.rand(rows, K) * 448 if kind == "positive" else torch.randn(rows, K) * 100
    return drawn.clamp(-448, 448)


def fp8_pair(kind, K):
    """Two such matrices, rounded to E4M3, and their product in float64."""
    torch.manual_seed(K)
    a, b = (reference.round_to_e4m3(numbers(kind, K)) for _ in range(2))
    return a, b, a.double() @ b.double().T


for K in (128, 256, 512):
    a, b, want = fp8_pair("positive", K)
    error = relative_error(reference.matmul_limited(a, b, bits=14), want)
    print(f"{K} products in a sum of 14 bits: {error:.2%} off")

# %% [markdown]
# More products, more error. In a transformer $K$ is a width: 7,168 in DeepSeek-V3, up to 18,432 inside its dense layers.
#
# ### Your prediction
#
# How many percent is the sum of 4,096 positive products off? Write a number in place of `None`.

# %%
my_guess = None  # percent, such as 0.1
guess = predict("4,096 products in a sum of 14 bits: how far off?", my_guess, "%")

# %% [markdown]
# ## What 14 bits mean
#
# To add numbers of different size, an adder writes them below each other, point below point. A tensor core has so many places and no more: they begin at the leading bit of the **largest** term. What stands further right is dropped.
#
# Below, a sum of three terms in an adder of 6 bits. The largest, 44.5, has its leading bit at $2^5$ = 32, so the last place that is kept, the **unit**, is $2^0$ = 1.

# %% tags=["hide-input"]


def draw_adder(axes, terms, bits):
    """The binary digits of `terms`: those that an adder of `bits` bits keeps, and the others."""
    top = math.frexp(max(map(abs, terms)))[1] - 1  # the place of the leading bit
    for row, term in enumerate(terms):
        left = abs(term)
        for place in range(top, top - bits - 5, -1):
            digit, left = divmod(left, 2.0**place)
            kept = place > top - bits
            shade = plots.COLORS[0 if kept else 3] if digit else plots.CARD
            axes.bar(top - place, 0.86, 0.94, bottom=row - 0.43, color=shade, alpha=0.45)
            axes.text(top - place, row, f"{digit:.0f}", ha="center", va="center")
    axes.axvline(bits - 0.5, color=plots.INK, linestyle="--")
    places = range(bits + 5)
    axes.set_xticks(places, [f"$2^{{{top - p}}}$" for p in places])
    axes.set_yticks(range(len(terms)), [f"{term:g}".replace("-", "−") for term in terms])
    axes.set(ylim=(len(terms) - 0.5, -0.5), xlim=(-0.6, bits + 4.6))
    axes.tick_params(length=0)
    axes.grid(False)


TERMS = (44.5, 5.6875, -3.875)
fig, axes = plots.figure(7.5, 2.2)
draw_adder(axes, TERMS, 6)
axes.set_title("kept by an adder of 6 bits: left of the dashed line")
plots.show(fig, "Binary digits of 44.5, 5.6875 and -3.875; places right of the unit are dropped.")

# %% [markdown]
# What is kept is 44 + 5 − 3 = 46; the exact sum is 46.3125. Each term is cut **towards 0**, before the addition.
#
# With terms $t_i$ and $b$ bits, let $e$ be the whole number with $2^{e-1} \le \max_i |t_i| < 2^e$. Then the unit $u$ and the sum are
#
# $$u = 2^{e-b}, \qquad \sum_i \mathrm{trunc}(t_i / u) \cdot u$$
#
# where trunc drops what is behind the point. A step of Hopper's FP8 instruction adds 32 products to the **old sum** (the accumulator), which is a term like the others.
#
# This is an imitation. The report says that 32 products are aligned by the largest exponent, that what lies beyond 14 bits is cut off, and that the old sum has 14 bits too (section 3.5.2). That it is aligned together with the products, and cut towards 0, is our assumption. So a new sum is cut when the next step takes it as its old one, not before.

# %% [markdown]
# ## Exercise 1 · One step of the adder
#
# *12 minutes · difficulty ●●●○○*
#
# | argument | shape | |
# |---|---|---|
# | `acc` | `[...]` | the old sums |
# | `products` | `[..., n]` | $n$ products for each of them |
# | `bits` | | $b$ |
# | result | `[...]` | the new sums |
#
# `[...]` stands for any dimensions. Each sum has its own largest term, so its own unit.
#
# `torch.frexp(t)` takes numbers apart, $t = m \cdot 2^e$ with $\tfrac12 \le |m| < 1$: its `.exponent` is the $e$ of the formula, exactly, and 0 for $t = 0$. `x.trunc()` drops what is behind the point; dividing by a power of two is exact.


# %%
def add_limited(acc, products, bits):
    """acc [...] plus products [...,n], all cut to `bits` places, which begin with the largest's."""
    # BEGIN SOLUTION
    terms = torch.cat([acc.unsqueeze(-1), products], -1)
    e = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent
    unit = 2.0 ** (e - bits)
    return ((terms / unit).trunc() * unit).sum(-1).to(acc.dtype)
    # END SOLUTION


# %%
my_add_limited = check(add_limited)

# %%
three = torch.tensor(TERMS)
for bits in (4, 6, 8, 10):
    print(f"{bits:2d} bits: {my_add_limited(three[0], three[1:], bits):.4f}", end="   ")
print(f"exact: {three.sum():.4f}")

# %% [markdown]
# ## Promotion
#
# The remedy of DeepSeek-V3: a tensor core's sum never gets old. After $N_C$ products it goes into a second sum, in float32, and starts anew at 0. The second sum is made by the GPU's ordinary arithmetic units (CUDA cores). The report calls this **promotion**; it takes $N_C = 128$ (section 3.3.2, figure 7b), 4 steps of 32.
#
# ```
# products:     32 32 32 32 | 32 32 32 32 | 32 …
# 14 bits:      →  →  →  acc| →  →  →  acc| →
# float32:              +=  |         +=  |
# ```

# %% [markdown]
# ## Exercise 2 · A product of matrices, with promotion
#
# *12 minutes · difficulty ●●●○○*
#
# $y = a\,b^T$ with $a$ `[M,K]`, $b$ `[N,K]`, $y$ `[M,N]`:
#
# 1. 32 products at a time go into `acc` by `my_add_limited`; `a[:, None, k:k+32] * b[None, :, k:k+32]` makes them for all of $y$, `[M,N,32]`. (`None` in an index adds a dimension of size 1, which is stretched.) The last slice may be shorter.
# 2. Whenever `promote` products are in `acc`, it is added to `total` by `+`, and starts anew at 0. `promote` is a multiple of 32, or `None`: never.
# 3. At the end nothing may be lost.


# %%
def matmul_limited(a, b, bits, promote):
    """y [M,N] = a b^T in sums of `bits` bits, promoted after `promote` products (None: never)."""
    # BEGIN SOLUTION
    total, acc = torch.zeros(len(a), len(b)), torch.zeros(len(a), len(b))
    for k in range(0, a.shape[1], 32):
        acc = my_add_limited(acc, a[:, None, k : k + 32] * b[None, :, k : k + 32], bits)
        if promote and (k + 32) % promote == 0:
            total, acc = total + acc, torch.zeros_like(acc)
    return total + acc
    # END SOLUTION


# %%
my_matmul_limited = check(matmul_limited)

# %% [markdown]
# ## The measurement: error over $K$
#
# Two kinds of numbers, positive and of both signs; without promotion, and promoted every 128 products. Beside them the error that is there before any sum: the one of **rounding the factors** to E4M3, with exact sums. What should you see? Is the sum's error the larger one, or the rounding's?


# %%
def errors(kind, K):
    """{name: error} of a product of `numbers`: of sums of 14 bits, and of rounding the factors."""
    a, b, want = fp8_pair(kind, K)
    torch.manual_seed(K)
    x, w = (numbers(kind, K).double() for _ in range(2))  # the seed's same numbers, not rounded
    exact = x @ w.T
    return {
        "14 bits": relative_error(my_matmul_limited(a, b, 14, None), want),
        "promoted every 128": relative_error(my_matmul_limited(a, b, 14, 128), want),
        "rounding the factors": relative_error(want, exact),
    }


KS = [128 * 2**i for i in range(8)]
curves = {kind: [errors(kind, K) for K in KS] for kind in ("positive", "both signs")}
fig, panels = plots.figure(11, 4, columns=2)
for axes, (kind, rows) in zip(panels, curves.items(), strict=True):
    for name in rows[0]:
        axes.plot(KS, [100 * row[name] for row in rows], label=name)
    axes.set(xscale="log", yscale="log", xlim=(100, 20000), ylim=(0.005, 50), title=kind)
    axes.set(xlabel="K, products in a sum", ylabel="error, %")
    axes.set_xticks(KS[::2], [f"{K:,}" for K in KS[::2]])
    plots.label_lines(axes)
plots.show(fig, "Error over K: without promotion it grows, with positive numbers to a quarter.")

# %%
print(f"{'K':>6}  positive: 14 bits, promoted, rounding   both signs: the same")
for at, K in enumerate(KS):
    print(f"{K:6}", end="")
    for rows in curves.values():
        print("".join(f"{value:12.3%}" for value in rows[at].values()), end="  ")
    print()
at_4096 = curves["positive"][KS.index(4096)]
guess.compare(100 * at_4096["14 bits"], how="imitated")

# %% [markdown]
# **Positive numbers:** the sum grows like $K$, and the unit with it. Each product loses on average half a unit, always in the same direction, so the losses add up. Rounding the factors is different: it goes up as often as down, so its errors cancel, more and more with growing $K$. Soon the short sum is by far the worst of all errors.
#
# **Both signs:** the sum grows like $\sqrt K$ only, and the losses have both signs too: they cancel. Here the rounding of the factors is worse than the sum at every $K$, and by far at the largest.
#
# So promotion is a cure for **bias**, an error that always pulls the same way. For $K$ = 4096 the report gives nearly 2% as the largest relative error, from a test of random matrices: between the errors of our two kinds.

# %%
print("positive numbers, 14 bits: the unit beside one product")
for K in (128, 1024, 4096, 16384):
    a, b, want = fp8_pair("positive", K)
    unit = 2.0 ** (math.frexp(want.mean().item())[1] - 14)
    print(f"K {K:6}: sum {want.mean():.1e}, unit {unit:7.0f}, product {want.mean() / K:.0f}")

# %% [markdown]
# At 16,384 products the unit is larger than a mean product: at the end most of them are dropped whole.
#
# ## How often to promote, and how many bits?
#
# ### Your prediction
#
# Positive numbers, $K$ = 4096. Promotion every 128 products: how many times smaller does the error get?

# %%
my_second_guess = None  # a factor, such as 5
factor = predict("Promotion every 128 makes the error how many times smaller?", my_second_guess)

# %%
N_C = [32 * 2**i for i in range(8)]
BITS = list(range(10, 25, 2))
sets = {kind: fp8_pair(kind, 4096) for kind in ("positive", "both signs")}
fig, (left, right) = plots.figure(11, 4, columns=2)
for kind, (a, b, want) in sets.items():
    by_n = [100 * relative_error(my_matmul_limited(a, b, 14, n), want) for n in N_C]
    left.plot(N_C, by_n, label=kind)
    for promote in (None, 128):
        by_bits = [100 * relative_error(my_matmul_limited(a, b, n, promote), want) for n in BITS]
        right.plot(BITS, by_bits, label=kind + (", promoted" if promote else ""))
left.set(xscale="log", yscale="log", xlabel="$N_C$, products until promotion", ylabel="error, %")
left.set(title="14 bits, K = 4096", xlim=(28, 5000))
left.axvline(128, color=plots.INK, linestyle=":", marker="")
left.set_xticks(N_C[::2], [str(n) for n in N_C[::2]])
right.set(yscale="log", xlabel="bits of the sum", ylabel="error, %", title="K = 4096")
right.axvline(14, color=plots.INK, linestyle=":", marker="")
for axes in (left, right):
    plots.label_lines(axes)
plots.show(fig, "Error over the promotion interval and over the bits of the sum, K = 4096.")
factor.compare(at_4096["14 bits"] / at_4096["promoted every 128"], how="imitated")

# %% [markdown]
# Left: the rarer the promotion, the larger the error; nothing special happens at 128. Right: 24 bits, those of float32, need no promotion; 14 do.
#
# So why 128, not 32? Each promotion costs one multiplication with addition on the CUDA cores for each number of $y$, while the tensor cores do $N_C$ of them. CUDA cores are slower; the next cell takes the published peaks of an H200.

# %%
tensor, cuda = accounting.peak("H200", FP8), accounting.peak("H200", torch.float32)
print(f"H200: tensor cores, FP8 {tensor / 1e12:.0f} TFLOP/s; CUDA cores {cuda / 1e12:.0f}")
a, b, want = sets["positive"]
for n in (32, 64, 128, 256, 512):
    busy = (2 / cuda) / (2 * n / tensor)
    error = relative_error(my_matmul_limited(a, b, 14, n), want)
    print(f"N_C {n:3}: promoting takes {busy:4.0%} of the multiplying's time; error {error:.4%}")

# %% [markdown]
# At 32 the CUDA cores would have nearly as much to do as the tensor cores; at 128 less than a quarter of it, and the error is below that of rounding the factors. The report calls 128 the smallest interval that improves precision significantly without substantial overhead. And 128 is the width of a tile in lesson 10: at its end the scales must be applied anyway.
#
# ## Scales in the sum
#
# What lesson 10 left behind, for $y = x\,w^T$:
#
# | name | shape | |
# |---|---|---|
# | `x_fp8` | `[M, K]` | codes of the activations |
# | `x_scale` | `[M, ⌈K/128⌉]` | one scale for each tile of 1×128 |
# | `w_fp8` | `[N, K]` | codes of the weights |
# | `w_scale` | `[⌈N/128⌉, ⌈K/128⌉]` | one for each block of 128×128 |
#
# $\lceil \cdot \rceil$ rounds up: the last tile may be shorter. A number is code times scale.

# %% [markdown]
# ## Exercise 3 · The block-scaled product
#
# *12 minutes · difficulty ●●●○○*
#
# Write $t$ for a tile, and $\lfloor \cdot \rfloor$ for rounding down. A tile's scales are the same for 128 products, so they can be taken out of that part of the sum, and out of no longer one:
#
# $$y_{mn} = \sum_t s^x_{m,t}\; s^w_{\lfloor n/128 \rfloor,\,t} \sum_{k \in t} x_{mk}\, w_{nk}$$
#
# (V3 report, section 3.3.2, figure 7). Here $x$ and $w$ are codes, $s^x$ and $s^w$ scales. The inner sum is the tensor core's, the outer one is in float32. Decode a slice with `.float()`: where torch's `@` takes FP8 at all, it rounds its result to FP8, too. $M$, $N$ and $K$ are any numbers.


# %%
def matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale):
    """y [M,N] of x_fp8 [M,K], x_scale [M,T], w_fp8 [N,K], w_scale [⌈N/128⌉,T]; T is ⌈K/128⌉."""
    # BEGIN SOLUTION
    y = torch.zeros(len(x_fp8), len(w_fp8))
    w_rows = w_scale.repeat_interleave(128, 0)[: len(w_fp8)]
    for t in range(x_scale.shape[1]):
        tile = slice(128 * t, 128 * (t + 1))
        partial = x_fp8[:, tile].float() @ w_fp8[:, tile].float().T
        y += partial * x_scale[:, t, None] * w_rows[:, t]
    return y
    # END SOLUTION


# %%
my_matmul_blockscaled = check(matmul_blockscaled)

# %% [markdown]
# ## The kernel
#
# Lessons 05 and 06 have the words: program, block, lane, mask. One **program** makes a block of $y$, `BLOCK_M` × `BLOCK_N` numbers, and walks along $K$ tile by tile:
#
# | in a round | shape | from |
# |---|---|---|
# | `a`, codes of $x$ | `[BLOCK_M, TILE]` | `x`, row `m` begins at `m * K` |
# | `b`, codes of $w$, transposed | `[TILE, BLOCK_N]` | `w`, row `n` begins at `n * K` |
# | $s^x$ | `[BLOCK_M, 1]` | `x_scale`, row `m` begins at `m * tiles` |
# | $s^w$ | `[1, BLOCK_N]` | `w_scale`, row `n // TILE` |
#
# `tl.dot(a, b)` multiplies FP8 blocks as they are, and gives a block of float32 that has begun at 0. So `acc += tl.dot(a, b) * …` **is** the promotion.

# %% tags=["hide-input"]
fig, axes = plots.figure(8.5, 3.6)
boxes = {"x  [M, K]": (0, 0, 4, 3), "wᵀ  [K, N]": (5, 3.9, 4, 4), "y  [M, N]": (5, 0, 4, 3)}
for name, (x0, y0, wide, high) in boxes.items():
    axes.bar(x0 + wide / 2, high, wide, bottom=y0, color=plots.CARD, ec=plots.INK)
    axes.text(x0 + wide / 2, y0 + high + 0.08, name, ha="center", va="bottom")
for i in range(4):
    axes.bar(i + 0.5, 1, 1, bottom=1, color=plots.COLORS[i], ec=plots.CARD, alpha=0.5)
    axes.bar(7, 1, 1, bottom=6.9 - i, color=plots.COLORS[i], ec=plots.CARD, alpha=0.5)
    axes.text(i + 0.5, 1.5, f"t = {i}", ha="center", va="center", fontsize=8.5)
    axes.text(7, 7.4 - i, f"t = {i}", ha="center", va="center", fontsize=8.5)
axes.bar(7, 1, 1, bottom=1, color=plots.INK, alpha=0.35)
axes.text(7, 1.5, "acc", ha="center", va="center")
axes.set(xlim=(-0.3, 13.6), ylim=(-0.2, 8.7))
lines = ["a round, one colour:", "4 loads", "acc += tl.dot(a, b) · sx · sw"]
for i, line in enumerate(lines):
    axes.text(9.6, 6.3 - 0.9 * i, line)
axes.axis("off")
plots.show(fig, "A program walks along tiles of x and of w transposed; acc is its block of y.")

# %% [markdown]
# ## Exercise 4 · Exercise 3 as a kernel
#
# *20 minutes · difficulty ●●●●○*
#
# | there | |
# |---|---|
# | `m`, `n` | this program's rows `[BLOCK_M, 1]` and columns `[1, BLOCK_N]` of $y$ |
# | `k` | lanes of a tile, `[TILE]`; `k[None, :]` is a row, `k[:, None]` a column |
# | `tiles` | how many tiles $K$ has, the last one perhaps shorter |
#
# Write the loop `for t in range(0, tiles)` and the store to `y + m * N + n`.
#
# Rows beyond `M`, columns beyond `N` and lanes beyond `K` need masks (`&` joins two), and in loads `other=0.0`. `//` divides and rounds down. Do not convert `a` and `b`: FP8 is what the tensor core multiplies. Scales as `[BLOCK_M, 1]` and `[1, BLOCK_N]` stretch over a block by themselves.
#
# The check counts bytes too. It allows an error of 1e-3, for on a GPU the sums are as short as in exercise 2.


# %%
@triton.jit
def blockscaled_kernel(x, x_scale, w, w_scale, y, M, N, K, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """y [M,N] float32 = x w^T, x [M,K] in 1xTILE tiles, w [N,K] in TILExTILE blocks."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k, tiles = tl.arange(0, TILE), tl.cdiv(K, TILE)
    # BEGIN SOLUTION
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, tiles):
        at = t * TILE + k
        a = tl.load(x + m * K + at[None, :], mask=(m < M) & (at < K)[None, :], other=0.0)
        b = tl.load(w + n * K + at[:, None], mask=(n < N) & (at < K)[:, None], other=0.0)
        sx = tl.load(x_scale + m * tiles + t, mask=m < M, other=0.0)
        sw = tl.load(w_scale + n // TILE * tiles + t, mask=n < N, other=0.0)
        acc += tl.dot(a, b) * sx * sw
    tl.store(y + m * N + n, acc, mask=(m < M) & (n < N))
    # END SOLUTION


# %%
my_kernel = check(blockscaled_kernel)

# %% [markdown]
# ## All of it together
#
# Float32 matrices, quantised as in lesson 10, multiplied by your function, by your kernel and by the one that minids ships. What should you see? All agree to rounding (on a GPU to about 14 bits); against the product of the *unrounded* matrices they are some percent off, as the rounding of the factors says.
#
# The traffic meter counts what a kernel loads. Loaded **for the first time** are the codes and the scales: half of what $x$ and $w$ have in bfloat16, and little more. The rest is loaded again: $x$ for each column of programs, $w$ for each row of them. `minids` takes 128 rows at a time here, so it loads $w$ once; and it pads $K$ to 1,024.


# %%
def my_launch(x_fp8, x_scale, w_fp8, w_scale, block_m=64, block_n=128):
    """y [M,N] by my_kernel."""
    (M, K), N = x_fp8.shape, len(w_fp8)
    y = torch.empty(M, N, device=x_fp8.device)
    grid = triton.cdiv(M, block_m), triton.cdiv(N, block_n)
    sizes = dict(BLOCK_M=block_m, BLOCK_N=block_n, TILE=TILE)
    my_kernel[grid](x_fp8, x_scale, w_fp8, w_scale, y, M, N, K, **sizes)
    return y


torch.manual_seed(0)
x, w = torch.randn(100, 1000), torch.randn(300, 1000)
quantised = *reference.quantize_tiles(x), *reference.quantize_blocks(w)
in_torch, exact = my_matmul_blockscaled(*quantised), x.double() @ w.double().T
print(f"exercise 3 against the unrounded product: {relative_error(in_torch, exact):.1%}")
for name in ("yours", "minids") if not missing() else ():
    launch = my_launch if name == "yours" else kernels.matmul_blockscaled
    made, m = count(launch, *quantised, *(() if name == "yours" else (torch.float32,)))
    print(f"{name}, against exercise 3: {relative_error(made.cpu(), in_torch):.0e}")
    if m:
        print(f"    bytes loaded {m.loaded:,}, of them {m.distinct_loaded:,} for the first time")
wide = 2 * sum(one.nbytes for one in (quantised[0], quantised[2]))
print(f"x and w in bfloat16 have {wide:,} bytes")
if missing():
    print(f"their codes and scales {sum(one.nbytes for one in quantised):,}; {instead()}")

# %% [markdown]
# ## What the compiler makes of it
#
# No GPU is needed to compile (lesson 06): **registers** hold a thread's numbers, 255 at most, what does not fit **spills**; **wgmma** is Hopper's instruction for tensor cores.
#
# Three kernels for Hopper, sm_90, alike but for the line that adds (all of `minids.lab.exercises.l11` but yours):
#
# | | adds by | |
# |---|---|---|
# | plain | `acc = tl.dot(a, b, acc)` | no scales; all of $K$ stays in the tensor core's sum, never promoted |
# | yours | | scales of rows and of columns |
# | one scale | `acc += tl.dot(a, b) * (sx * s)` | `s` is ONE scale of $w$: where `BLOCK_N` divides `TILE`, all columns of a program have the same |

# %%
CODES = {"x": "*fp8e4nv", "w": "*fp8e4nv", "y": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
SCALES = {"x_scale": "*fp32", "w_scale": "*fp32"}


def wanted(kernel, block_m, block_n, warps, arch=90):
    """What to compile: M, N, K divisible by 16; tiles of 3 rounds (stages) in shared memory."""
    types = {name: (CODES | SCALES)[name] for name in kernel.arg_names if name in CODES | SCALES}
    sizes = dict(BLOCK_M=block_m, BLOCK_N=block_n, TILE=128)
    return compiled.request(kernel, types, sizes, arch, warps, 3, aligned=("M", "N", "K"))


found = {}
if not missing():
    names = {"plain": l11.plain_kernel, "yours": my_kernel, "one scale": l11.one_scale_kernel}
    tiles = [(64, 128, 4), (128, 128, 4), (128, 128, 8)]
    cases = [(name, *tile) for tile in tiles for name in names]
    requests = [wanted(names[name], *tile) for name, *tile in cases]
    requests.append(wanted(my_kernel, 64, 128, 4, arch=80))
    *made, refused = compiled.facts_of_all(requests)
    found = dict(zip(cases, made, strict=True))
    reason = f"for an A100, sm_80: {str(refused).strip().splitlines()[-1]}"
    print(textwrap.fill(reason, 100, subsequent_indent="    "))
else:
    print(instead())

# %% [markdown]
# An A100 has no FP8: Triton names E4M3 `fp8e4nv`, and refuses. (From sm_89 on, RTX 40 and Hopper, it compiles.)
#
# The next table adds two columns. **FMA**: multiplications (with or without addition) in the loop, of one thread in one round: the cost of scales and promotion. **spilled**: bytes for which a thread lacks registers. **fit**: how many programs fit on one SM (a Hopper processor: 65,536 registers, 227 KiB of shared memory).


# %%
def loop_of(ptx):
    """The lines of the code's innermost loop: the part between two labels that multiplies."""
    parts = re.split(r"(?m)^\$L__BB", ptx)
    return max(parts, key=lambda part: part.count("wgmma.mma_async")).splitlines()


FMA = r"\b(fma|mul)\.(rn\.)?f32"  # a multiplication, with or without an addition


def seen_in(lines, pattern):
    return sum(bool(re.search(pattern, line)) for line in lines)


print(instead() or f"{'':27}wgmma  FMA  registers  spilled  shared KiB  fit")
for (name, block_m, block_n, warps), one in found.items():
    if isinstance(one, compiled.DoesNotCompile):
        print(f"{name}: {str(one)[-200:]}")
        continue
    fma = seen_in(loop_of(one.ptx), FMA)
    fit = min(65536 // (one.registers * 32 * warps), 227 * 1024 // one.shared)
    print(f"{block_m:3}×{block_n} {warps} warps {name:10}", end="")
    row = f"{one.wgmma:5} {fma:4} {one.registers:10} {one.spills:8}"
    print(f"{row} {one.shared / 1024:11.0f} {fit:4}")

# %% [markdown]
# How to read it:
#
# - A wgmma multiplies 64 rows, 128 columns and 32 of $K$: four for a tile of 64×128×128. These are the four steps of exercise 2.
# - **plain**: no FMA at all. **yours**: two for each of a thread's 64 numbers, times $s^x$, then times $s^w$ and add. **one scale**: a single FMA, for $s^x s^w$ is one number for each row. It also needs fewer registers.
# - **128×128 with 4 warps**: a thread holds 128 numbers of `acc` and 128 of the partial sum. Both together are more than 255: it spills. Promotion needs the place twice.
#
# Now the loop itself. The tensor core works on its own while the program goes on; `wgmma.wait_group n` waits until at most $n$ groups of its orders are still open. 0 means: until all is done.

# %%
if missing():
    print(instead())
WORDS = {"wgmma.mma_async": "multiply", "wgmma.commit_group": "send", "wgmma.wait_group": "wait"}
for name in ("plain", "yours"):
    one = found.get((name, 64, 128, 4))
    if not isinstance(one, compiled.CompiledFacts):
        continue
    print(f"{name}, one round of 64×128×128:")
    lines = [line.strip() for line in loop_of(one.ptx)]
    for line in lines:
        word = next((WORDS[key] for key in WORDS if key in line), None)
        if word == "multiply":
            start = "from 0" if line.rstrip(";").split(", ")[-3] == "0" else "adds"
            print(f"    multiply  {start:8}{re.search(r'm64n[0-9]+k[0-9]+[.a-z0-9]*', line)[0]}")
        elif word:
            print(f"    {word:10}{line.rstrip(';').split('wgmma.')[1]}")
    print(f"    scale     {seen_in(lines, FMA)} FMAs a thread")

# %% [markdown]
# The plain loop waits with **1**: it sends the next tile while one is still being multiplied. Yours waits with **0**, for it needs the partial sum *now*, to scale it. In that time this program's tensor core has nothing to do: it is **drained** at each tile of $K$.
#
# That is why a simple block-scaled kernel can be slower than cuBLAS in BF16. For one product, 4096×24576×7168 on an H200, the times in [SGLang's pull request 3893](https://github.com/sgl-project/sglang/pull/3893) give 355 TFLOP/s for its Triton kernel and 1,066 for **DeepGEMM**, DeepSeek's own library; we have not measured them.
#
# What cures it:
#
# - small tiles, 64×128 with 4 warps: two programs fit on an SM, and while one drains, the other multiplies;
# - one scale of $w$ for a block;
# - **TMA**, Hopper's unit that copies tiles while nobody waits;
# - an order of programs in which neighbours share tiles in the L2 cache.

# %% [markdown]
# ## On this machine, and on a GPU
#
# A CPU has no unit for FP8. So what should you see here? FP8 loses: decoding comes on top. `torch._scaled_mm` is torch's own FP8 product; here with one scale for each tensor. For some processors torch has it only in a reference form, far too slow to wait for: 16 rows are tried first.

# %% tags=["nbval-ignore-output"]
size = 1024
x, w, one = torch.randn(size, size), torch.randn(size, size), torch.ones(())
xq, wq = reference.quantize_tiles(x), reference.quantize_blocks(w)
narrow, other = x.to(BF16), w.to(BF16)


def scaled_mm(rows):
    return torch._scaled_mm(xq[0][:rows], wq[0].T, one, one, out_dtype=torch.float32)


runs = {
    "float32": lambda: x @ w.T,
    "bfloat16": lambda: narrow @ other.T,
    "exercise 3": lambda: my_matmul_blockscaled(*xq, *wq),
    "quantising x": lambda: reference.quantize_tiles(x),
}
if triton_env.mode() != "gpu":
    if machine.race({"few": lambda: scaled_mm(16)}, 1)["few"] < 0.05:
        runs["torch._scaled_mm"] = lambda: scaled_mm(size)
    else:
        print("torch._scaled_mm is slow here, and left out")
    for name, seconds in machine.race(runs).items():
        print(f"{name:17} {1e3 * seconds:6.1f} ms")

# %% tags=["nbval-ignore-output"]
if triton_env.mode() == "gpu" and torch.cuda.get_device_capability() >= (8, 9):
    for M, N, K in ((256, 4096, 4096), (4096, 4096, 4096), (4096, 7168, 16384)):
        x, w = torch.randn(M, K).cuda(), torch.randn(N, K).cuda()
        given = *reference.quantize_tiles(x), *reference.quantize_blocks(w)
        narrow, other = x.to(BF16), w.to(BF16)
        runs = {
            "bf16": functools.partial(torch.mm, narrow, other.T),
            "yours": functools.partial(my_launch, *given),
            "minids": functools.partial(kernels.matmul_blockscaled, *given),
        }
        for name, seconds in machine.race(runs, 20).items():
            print(f"{M}×{N}×{K} {name}: {2 * M * N * K / seconds / 1e12:.0f} TFLOP/s")
else:
    print("no GPU with FP8 here, so no kernel is timed")
machine.recorded("fp8")

# %% [markdown]
# ## The roofline: from which shape on can FP8 win?
#
# By arithmetic, with the published peaks (lesson 00: a product takes the longer one of its bytes' time and its FLOPs' time). For $y = x\,w^T$, $y$ in bfloat16:
#
# | | bytes | FLOPs |
# |---|---|---|
# | BF16 | $2(MK + NK + MN)$ | $2MNK$, at BF16's peak |
# | FP8 | $MK + NK + 2MN$ + scales | $2MNK$, at FP8's peak |
# | quantising $x$ | reads $2MK$, writes $MK$ + scales | hardly any |
# | quantising $w$ | reads $2NK$, writes $NK$ + scales | hardly any |
#
# A scale has 4 bytes. Quantising is a kernel of its own, so its time comes on top. In training, weights change with each step and are quantised anew; in inference they are there in FP8.


# %%
def bf16_seconds(M, N, K, gpu, share=1.0):
    """Least time of the product in BF16 at `share` of the peak."""
    moved, flops = 2 * (M * K + N * K + M * N), 2 * M * N * K
    return accounting.roofline_seconds(flops / share, moved, gpu, BF16)


def quantise_seconds(numbers, scales, gpu):
    """Least time to read BF16 and write FP8."""
    return (3 * numbers + 4 * scales) / accounting.gpu_named(gpu).bandwidth


def fp8_seconds(M, N, K, gpu, share=1.0, weights=True, inputs=True):
    """Least time of the product in FP8, and of quantising w (if `weights`) and x (if `inputs`)."""
    tiles = math.ceil(K / TILE)
    blocks = math.ceil(N / TILE) * tiles
    moved = M * K + N * K + 2 * M * N + 4 * (M * tiles + blocks)
    seconds = accounting.roofline_seconds(2 * M * N * K / share, moved, gpu, FP8)
    seconds += quantise_seconds(M * K, M * tiles, gpu) if inputs else 0
    return seconds + (quantise_seconds(N * K, blocks, gpu) if weights else 0)


# %%
def first_win(N, K, gpu="H200", square=False, **options):
    """The smallest M (a power of 2^(1/8)) from which on FP8 stays ahead; None without one."""
    tried = [round(2 ** (i / 8)) for i in range(4 * 8, 17 * 8 + 1)]
    shapes = [(M, M, M) if square else (M, N, K) for M in tried]
    ahead = [fp8_seconds(*s, gpu, **options) < bf16_seconds(*s, gpu) for s in shapes]
    lost = max((i for i, wins in enumerate(ahead) if not wins), default=-1)
    return tried[lost + 1] if lost + 1 < len(tried) else None


# %%
print("both kernels at their peak: FP8 wins from how many rows M of x on? (H200)")
print(f"{'Linear of DeepSeek-V3':38} weights quantised too   weights ready")
SHAPES = {
    "expert, gate or up": (2048, 7168),
    "expert, down": (7168, 2048),
    "dense layer, gate or up": (18432, 7168),
    "latent of keys and values": (576, 7168),
    "latent to keys and values": (32768, 512),
}
for name, (N, K) in SHAPES.items():
    wins = [first_win(N, K, weights=weights) for weights in (True, False)]
    first, second = ("any" if win == 16 else win or "never" for win in wins)
    print(f"{name:25} N {N:5} K {K:4} {first:>16} {second:>19}")
for weights in (True, False):
    side = first_win(0, 0, square=True, weights=weights)
    print(f"M = N = K: from {side} on, weights {'quantised too' if weights else 'ready'}")

# %% [markdown]
# *any* is from 16 rows on, the fewest tried. (An expert's rows are its own tokens only.)
#
# A rule in it: for each row of $x$, quantising moves about $3K$ bytes, and the product saves time proportional to $NK$. Both grow with $K$ alike, so **N decides**: the next cell computes from which $N$ on a compute-bound product saves more than quantising $x$ costs, however many rows there are. 576 columns are too few, unless another product uses the same quantised $x$. In V3's attention one does: the latent of the queries.

# %%
for gpu in ("H200", "H100", "RTX 4090"):
    slow, quick = accounting.peak(gpu, BF16), accounting.peak(gpu, FP8)
    least = (3 + 4 / TILE) / accounting.GPUS[gpu].bandwidth / (2 / slow - 2 / quick)
    print(f"{gpu}: quantising x pays from N = {least:.0f} on")

# %% [markdown]
# ## Explore: where do the lines cross?
#
# **Question:** an H200, a Linear with $N = K = 4096$, both kernels at 100% of their peaks. From how many rows on does FP8 win? What changes if the weights are ready (box unticked)? Then set FP8 to 18% of its peak, which is what 355 TFLOP/s are: is there still a shape where it wins? And at 54%, which is DeepGEMM's 1,066?
#
# <details><summary>Answer</summary>From about 730 rows on, and by less than the two peaks promise, for quantising takes its share. With the weights ready it is ahead at all sizes of the picture: with few rows the bytes set the time, and FP8 reads half as many. With the slow kernel nothing wins, at any width, for the FLOPs alone take longer than in BF16; only with the weights ready do up to some 64 rows, where bytes count. With DeepGEMM's share it depends on what BF16 reaches: against its peak FP8 stays behind at this width, if only just; against four fifths of the peak it is ahead from about 1,250 rows on.</details>


# %%
def draw(figure, gpu, width, fp8_percent, bf16_percent, weights_too):
    axes, rows = figure.subplots(), [2 ** (i / 4) for i in range(16, 65)]

    def ratios(**what):
        shapes = [(M, width, width, gpu) for M in rows]
        slow = [bf16_seconds(*shape, bf16_percent / 100) for shape in shapes]
        quick = [fp8_seconds(*shape, fp8_percent / 100, **what) for shape in shapes]
        return [s / q for s, q in zip(slow, quick, strict=True)]

    whole = ratios(weights=weights_too)
    axes.plot(rows, ratios(weights=False, inputs=False), label="product alone")
    axes.plot(rows, whole, label="with quantising")
    axes.axhline(1, color=plots.INK, linestyle=":", marker="")
    axes.set(xscale="log", xlim=(16, 2**16), ylim=(0, 3.4), xlabel="rows of x (tokens)")
    axes.set(ylabel="BF16's time / FP8's time")
    axes.set_xticks([2**i for i in range(4, 17, 3)], [f"{2**i:,}" for i in range(4, 17, 3)])
    ahead = [M for M, ratio in zip(rows, whole, strict=True) if ratio > 1]
    words = f"FP8 ahead at {len(ahead)} of {len(rows)} sizes, up to {max(whole):.2f} times as fast"
    axes.set_title(f"{gpu}, N = K = {width:,}, arithmetic: {words}")
    plots.label_lines(axes)


# %%
explore(
    draw,
    alt="BF16's time over FP8's by rows: below 1 for few rows, above it for many",
    size=(9, 4),
    gpu=["H200", "H100", "RTX 4090"],
    width=[4096, 1024, 2048, 7168, 16384],
    fp8_percent=[100, 80, 54, 18],
    bf16_percent=[100, 80, 60],
    weights_too=True,
)

# %% [markdown]
# ## When does it not pay?
#
# - **Without the units:** on a CPU and before sm_89 FP8 is only more work, as you timed.
# - **Narrow layers:** below 600 columns or so (900 on an H100) quantising $x$ costs more than the product can save. A model for a laptop consists of such layers.
# - **Few rows in training:** the weights are quantised for each step, whatever the rows.
# - **A kernel that drains:** at the Triton kernel's rate above no large shape wins, for BF16's peak is far higher.
# - **Numbers of both signs, for accuracy alone:** there promotion repairs the smaller error. It is needed because nobody knows in advance which sums are one-sided, and the scales of each tile need its multiplications anyway.
#
# End to end the gain is smaller again, for a training step is not made of these products alone: lesson 12.

# %% [markdown]
# ## In the real DeepSeek
#
# From the V3 report, section 3.3.2:
#
# - Promotion every $N_C$ = 128 along $K$, 4 wgmmas; Hopper keeps about 14 bits; nearly 2% relative error at $K$ = 4096 without it.
# - Activations and gradients in tiles of 1×128, weights in blocks of 128×128; all three products of a Linear in E4M3.
# - While one group of warps promotes, another one multiplies: two wgmmas are typically on their way at a time, the first cure above.
# - **DeepGEMM** is the public kernel; its [README](https://github.com/deepseek-ai/DeepGEMM) reports up to 1,550 TFLOP/s on an H800, whose peak in FP8 is 1,979.
#
# What came after: from V3.1 on every scale is a power of two.

# %% [markdown]
# ## To remember
#
# 1. A short sum drops the end of each term, always towards 0: with one-sided numbers the losses add up, with both signs they cancel.
# 2. A scale can be taken out of 128 products and no more; there the partial sum is scaled and promoted in one step.
# 3. FP8 halves bytes and doubles FLOP/s; quantising and draining take it back, unless the matrices are wide and the kernel is good.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** An adder of 4 bits gets 8 and 0.75. What is the sum?
# <details><summary>8.75</summary>No: the places are 8, 4, 2, 1; behind that all is dropped.</details>
# <details><summary>8</summary>Yes: the unit is 1, and trunc(0.75) is 0.</details>
#
# **2.** Why is the error of *rounding the factors* smaller at large K, for positive numbers?
# <details><summary>the sums have more bits</summary>No: that error is there with exact sums too.</details>
# <details><summary>it goes up as often as down</summary>Yes: relative to the sum it shrinks like one over the square root of K.</details>
#
# **3.** Why not scale once, after all of K?
# <details><summary>float32 would overflow</summary>No: it would not.</details>
# <details><summary>each 128 products have scales of their own</summary>Yes: they are no factor of the whole sum.</details>
#
# **4.** What does `wgmma.wait_group 0` in the loop cost?
# <details><summary>the tensor core idles while the partial sum is scaled</summary>Yes, unless another program on the SM uses it.</details>
# <details><summary>registers</summary>No: those go to the second sum.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. The first version of the report (section 3.5.2) says that 32 products of FP8 numbers need 34 bits to be added exactly. Draw random codes (all 256 alike, but the two that are NaN), decode them with `minids.fp8.reference.decode_e4m3`, and make sums of 32 products in float64. From how many bits on does `minids.fp8.reference.add_limited`, beginning at 0, give the exact sum?
# <details><summary>Expected</summary>With 30 bits about half of the sums are exact, with 34 nearly all, with 36 all: the largest product, 448², leads at 2^17, the smallest one is 2^-18, and from the one down to the other there are 36 places.</details>
# 2. Write a variant of `matmul_limited` that keeps 14 bits and never promotes, but rounds to the nearest unit instead of cutting. Put it into the figure of error over K, for positive numbers. How much of the error was the bias of cutting?
# <details><summary>Expected</summary>Most of it: at K = 4096 less than a tenth of the error is left, for rounding goes up as often as down. At K = 16,384 more is left: the unit is larger than most products there, nearly half of them are below half a unit and become 0, and that is a bias again.</details>

# %%
status()
