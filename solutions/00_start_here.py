# ---
# title: Start here
# promise: You learn how exercises, hints and predictions work, measure what this machine can do, and get the one question that every later lesson asks.
# minutes: 35
# difficulty: 1
# needs: [torch]
# objectives:
#   - see which machine this is, and what of the course it can run
#   - count the FLOPs and the bytes of a piece of work
#   - estimate its least possible time with the roofline, and hold that against the clock
#   - tell where the roofline is wrong
# ---

# %%
import platform

import torch

import minids
from minids import accounting, triton_env
from minids.lab import check, example, explore, hint, machine, plots, predict, status

_ = torch.manual_seed(0)

# %% [markdown]
# Welcome. In this course you take a working transformer and turn it, part by part, into a small DeepSeek. Run the cells from top to bottom with **Shift+Enter**. Every number below a cell is measured on your machine while you watch, or computed before your eyes; where it comes from elsewhere, the text says so.
#
# ## Which machine is this?
#
# Nobody needs a GPU. Kernels, the small programs that run on GPUs, come from lesson 05 on and are written in a language called Triton. Where there is no GPU, Triton's **interpreter** runs them on the processor, slowly, and their results can be checked all the same. Where Triton cannot be installed (macOS, Windows), those lessons compute in torch and say what is missing.

# %% tags=["nbval-ignore-output"]
device = "cuda" if torch.cuda.is_available() else "cpu"
meaning = {
    "gpu": "kernels are compiled and run on your GPU",
    "interpreter": "kernels run in Triton's interpreter, on the processor",
    "absent": "lessons with kernels compute in torch instead",
}
print(f"Python {platform.python_version()}, torch {torch.__version__}, computing on: {device}")
print(f"Triton: {triton_env.mode()}: {meaning[triton_env.mode()]}")

# %% [markdown]
# ## The problem: one machine, many speeds
#
# A **FLOP** is one floating-point operation: an addition or a multiplication. Multiplying two square matrices of $n$ rows and $n$ columns takes $2n^3$ of them: each of the $n^2$ results is a sum of $n$ products. How many FLOPs per second (FLOP/s; a GFLOP is $10^9$) does your machine do? The next cell asks at four sizes, and takes the median of 20 runs.

# %% tags=["nbval-ignore-output"]
largest = 8192 if device == "cuda" else 1024
products = {}
for n in (largest // 64, largest // 16, largest // 4, largest):
    a, b = torch.randn(2, n, n, device=device)
    products[n] = machine.median_seconds(lambda a=a, b=b: a @ b, rounds=20)
    speed = 2 * n**3 / products[n] / 1e9
    print(f"{n:5d} × {n:<5d} {products[n] * 1e6:10.1f} µs {speed:10.1f} GFLOP/s")

# %% [markdown]
# The same operation on the same machine, at very different speeds. And now work without any arithmetic: a copy of 128 MiB ($128 \cdot 2^{20}$ bytes). What counts there is bytes per second, read and written, the **bandwidth**.
#
# The products are measured twice, in two formats of numbers: **float32** has 4 bytes, **bfloat16** 2 bytes and fewer digits.

# %% tags=["nbval-ignore-output"]
here = {}
for dtype in (torch.float32, torch.bfloat16):
    m = here[dtype] = machine.measure(dtype, size=largest)
    speeds = f"product {m.flops / 1e9:.0f} GFLOP/s, copy {m.bandwidth / 1e9:.1f} GB/s"
    print(f"{dtype}: {speeds}, ridge {m.ridge:.1f} FLOP per byte")
best = max(here.values(), key=lambda m: m.flops)
print(f"{best.name}; its best format is {best.dtype}")

# %% [markdown]
# For each format, the large product's FLOP/s stand for this machine's **peak**. (A smaller product above may have been faster: its numbers fit into a small fast memory, or other programs disturbed the large one.) Peak divided by bandwidth is the **ridge**: how many FLOPs it could do in the time in which one byte moves.
#
# - Work with fewer FLOPs per byte than the ridge waits for memory: it is **memory-bound**.
# - Work with more waits for arithmetic: it is **compute-bound**.
#
# From here on every lesson asks: *which side of the ridge?*

# %% [markdown]
# ## Your prediction
#
# An H200 is a data-centre GPU. Compared with your machine, how many times faster is it at a product of two 4096 × 4096 matrices? And at adding two long vectors? (It multiplies in bfloat16, your machine in its faster format.) Write two numbers in place of `None`. Nobody marks them; further down you see how far off they were. A guess made before the answer is the cheapest way to notice what you did not know.

# %%
my_product = None  # your guess: a number
my_addition = None
product_guess = predict("How many times faster is an H200 at the product?", my_product, "times")
addition_guess = predict("How many times faster is an H200 at the addition?", my_addition, "times")

# %% [markdown]
# ## How an exercise works
#
# An exercise is a function whose body says `raise NotImplementedError`. You write over that line, run the cell, and run the `check` below it. The check tries your function on several inputs and compares it with a **reference**, the same function in the package `minids`.
#
# A check also **gives back** a function. After `my_intensity = check(arithmetic_intensity)` the name `my_intensity` stands for your function if it is right, else for the reference. Later cells call `my_intensity`, so **you can go on either way**.
#
# The next cell shows a check, on an answer that is wrong on purpose. It belongs to exercise 1: FLOPs per byte. (`example` says what `check` says, and keeps nothing.)


# %%
def demonstration(flops, nbytes):
    """FLOPs per byte? No: bytes per FLOP."""
    return nbytes / flops


example(demonstration, "00.1")

# %% [markdown]
# From top to bottom:
#
# - the verdict, and the first input on which the answer fails;
# - what came and what was expected. The **error** is their difference as a share of what was expected (`8.6e-01` is 0.86); next to it stands how much is allowed, because computers round;
# - how many of the inputs fail: with another mistake it might be one of four;
# - the likely mistake in one sentence, where the check knows it.
#
# If you are stuck, `hint("arithmetic_intensity")` gives a nudge; called again it gives the idea, and the third time a solution. Taking one costs nothing. With a number it gives that one, and counts nothing: here the nudge, number 1.

# %%
hint("arithmetic_intensity", 1)

# %% [markdown]
# `status()` shows what has passed and the minutes left. It is kept on your disk, in the folder `.minids`, and survives a restart. Nothing is sent anywhere.

# %% tags=["nbval-ignore-output"]
status()

# %% [markdown]
# ## Exercise 1 · FLOPs per byte
#
# *2 minutes · difficulty ●○○○○*
#
# To compare a piece of work with the ridge, it needs a number of the same unit: its **arithmetic intensity** $I$, the FLOPs that it does for each byte that it moves (Williams, Waterman and Patterson, "Roofline", Communications of the ACM, 2009).
#
# $$I = \frac{\mathrm{FLOPs}}{\mathrm{bytes}}$$
#
# | name | meaning | unit |
# |---|---|---|
# | `flops` | the operations of the whole work | FLOP |
# | `nbytes` | what it reads and writes | bytes |
# | result | $I$ | FLOP per byte |


# %%
def arithmetic_intensity(flops, nbytes):
    """FLOPs for each byte that moves; gives a number in FLOP per byte."""
    # BEGIN SOLUTION
    return flops / nbytes
    # END SOLUTION


# %%
my_intensity = check(arithmetic_intensity)

# %% [markdown]
# Your first use of it. Adding two vectors of $n$ numbers in float32 takes $n$ additions, and moves $3 \cdot 4n$ bytes: two vectors read, one written.

# %% tags=["nbval-ignore-output"]
length = 32 * 2**20
intensity = my_intensity(length, 3 * 4 * length)
ridge = here[torch.float32].ridge
print(f"adding two vectors: {intensity:.3f} FLOP per byte; the ridge in float32 is at {ridge:.1f}")
print("memory-bound" if intensity < ridge else "compute-bound", "on this machine")

# %% [markdown]
# ## Exercise 2 · What a matrix product costs
#
# *5 minutes · difficulty ●●○○○*
#
# Nearly all the arithmetic of a language model is matrix products $C = AB$, with $A$ of $M$ rows and $K$ columns, $B$ of $K$ rows and $N$ columns.
#
# $$C_{mn} = \sum_{k=1}^{K} A_{mk}\, B_{kn}$$
#
# Count two things. FLOPs: multiplications and additions, one each for every product in the sum (the first addition, to nothing, is counted too). Bytes: each number of the three matrices moves **once**, which is the least that any program can do.
#
# | name | shape or meaning |
# |---|---|
# | $A$, $B$, $C$ | `[M, K]`, `[K, N]`, `[M, N]` |
# | `itemsize` | bytes of one number: 4 in float32, 2 in bfloat16 |
# | result | (FLOPs, bytes), a tuple of two numbers |


# %%
def matmul_cost(M, N, K, itemsize):
    """The tuple (FLOPs, bytes) of [M, K] @ [K, N], each number of itemsize bytes moved once."""
    # BEGIN SOLUTION
    flops = 2 * M * N * K
    nbytes = itemsize * (M * K + K * N + M * N)
    return flops, nbytes
    # END SOLUTION


# %%
my_matmul_cost = check(matmul_cost)

# %% [markdown]
# A square product has more FLOPs per byte the larger it is. With a single row, $M = 1$, it never has more than about half a FLOP per byte in float32, however large the matrix. Remember that row: it is how a language model writes, one token at a time.

# %%
for M, n in ((64, 64), (1024, 1024), (4096, 4096), (1, 1024), (1, 4096)):
    intensity = my_intensity(*my_matmul_cost(M, n, n, 4))
    print(f"[{M}, {n}] @ [{n}, {n}]: {intensity:7.2f} FLOP per byte")

# %% [markdown]
# ## Exercise 3 · The roofline
#
# *4 minutes · difficulty ●●○○○*
#
# How long does a piece of work take at least? Its arithmetic alone takes $\mathrm{FLOPs}/P$ with the peak $P$ in FLOP/s, its traffic alone takes $\mathrm{bytes}/W$ with the bandwidth $W$ in bytes per second. A machine does both **at the same time**: while it computes with some numbers, it fetches the next. So one of the two is hidden behind the other.
#
# The roofline paper draws the same law as a speed: FLOP/s are at most $\min(P,\, I \cdot W)$, a slope that meets a flat roof at the ridge. You write it as a time.
#
# | name | unit |
# |---|---|
# | `flops` | FLOP |
# | `nbytes` | bytes |
# | `peak` | FLOP/s |
# | `bandwidth` | bytes/s |
# | result | seconds |


# %%
def roofline_time(flops, nbytes, peak, bandwidth):
    """Seconds that the work takes at least; peak in FLOP/s, bandwidth in bytes/s."""
    # BEGIN SOLUTION
    arithmetic, traffic = flops / peak, nbytes / bandwidth
    return max(arithmetic, traffic)
    # END SOLUTION


# %%
my_time = check(roofline_time)

# %% [markdown]
# ## Exercise 4 · Scale the rows
#
# *4 minutes · difficulty ●●○○○*
#
# The last exercise has tensors. Multiply each row of `x` by a number of its own:
#
# $$y_{btd} = x_{btd} \cdot s_{bt}$$
#
# You meet this step again when experts are weighted (lesson 07) and when numbers are squeezed into 8 bits (lesson 10). Shapes are written with the same letters in the whole course: $B$ sequences in a batch, $T$ positions in each, $D$ numbers at each position.
#
# | name | shape |
# |---|---|
# | `x` | `[B, T, D]` |
# | `scale` | `[B, T]` |
# | result | `[B, T, D]` |
#
# A check with tensors also looks at gradients, tries odd sizes, batches of 1 and 3 and inputs with gaps in memory, and sees whether your function changed its input.


# %%
def scale_rows(x, scale):
    """x [B, T, D], every row x[b, t] multiplied by scale[b, t] of scale [B, T]; gives [B, T, D]."""
    # BEGIN SOLUTION
    return x * scale[..., None]
    # END SOLUTION


# %%
my_scale_rows = check(scale_rows)

# %% [markdown]
# ## Your formulas against the clock
#
# Five pieces of work in float32: products of so many rows with a square matrix, and your `scale_rows`. Your functions say how long each takes at least on this machine, then the clock says how long it takes. The last line is the place of the same measurement on an H200; where nobody has recorded one yet, it says so.

# %% tags=["nbval-ignore-output"]
a, b = torch.randn(2, largest, largest, device=device)
rows, matrix = torch.randn(16, 4096, device=device), torch.randn(4096, 4096, device=device)
x, scale = torch.randn(8, 1024, 2048, device=device), torch.randn(8, 1024, device=device)
scaling = (x.numel(), 4 * (2 * x.numel() + scale.numel()))  # FLOPs; bytes read and written
work = {
    f"{largest} rows": (lambda: a @ b, *my_matmul_cost(largest, largest, largest, 4)),
    "16 rows": (lambda: rows @ matrix, *my_matmul_cost(16, 4096, 4096, 4)),
    "8 rows": (lambda: rows[:8] @ matrix, *my_matmul_cost(8, 4096, 4096, 4)),
    "1 row": (lambda: rows[:1] @ matrix, *my_matmul_cost(1, 4096, 4096, 4)),
    "scale_rows": (lambda: my_scale_rows(x, scale), *scaling),
}
limits, points = here[torch.float32], {}
for name, (run, flops, nbytes) in work.items():
    least = my_time(flops, nbytes, limits.flops, limits.bandwidth)
    seconds = machine.median_seconds(run, rounds=9)
    points[name] = (flops, nbytes, seconds)
    print(f"{name:10s} {my_intensity(flops, nbytes):7.2f} FLOP per byte:", end=" ")
    print(f"at least {least * 1e3:.2f} ms, measured {seconds * 1e3:.2f} ms", end=" ")
    print(f"({least / seconds:.0%} of the roof's speed)")
machine.recorded("roofline")

# %% [markdown]
# `minids.accounting` has a table of GPUs with their published peaks; the next cell enters your machine beside them, so that everything in the package that takes a GPU's name takes yours too. Dots are what you just measured; where a slope meets its roof, the ridge is written.

# %% tags=["nbval-ignore-output"]
peaks = {dtype: measured.flops for dtype, measured in here.items()}
mine = accounting.Gpu(limits.bandwidth, peaks, memory=0, source="measured above")
accounting.GPUS["this machine"] = mine
fig, axes = plots.figure(7.5, 4.2)
plots.roofline(axes, ["this machine", "H200"], points, torch.float32)
axes.set_ylim(bottom=axes.get_ylim()[0] / 3)  # room for the names below the dots
plots.show(fig, "Rooflines in float32: this machine's with five measured dots, and the H200's.")
print(f"H200: {accounting.GPUS['H200'].source}")

# %% [markdown]
# NVIDIA's figures for bfloat16 are for **sparse** matrices, in which two of every four numbers are zero and are skipped; the table has half of them, which is the speed with ordinary matrices.
#
# A dot is a measurement, a roof is a promise. A dot far under the roof tells that something else took time.
#
# - `8 rows`, where it takes far longer than 1 row, and hardly less than 16 rows: the library has no good routine for few rows. Most likely it first copies the matrix into another order, which costs the same for 8 rows as for 16. (For a single row it has a routine of its own.)
# - `scale_rows` must also ask for the memory of its result. Where that is there already, it takes:

# %% tags=["nbval-ignore-output"]
out = torch.empty_like(x)
given = machine.median_seconds(lambda: torch.mul(x, scale[..., None], out=out), rounds=9)
_, _, fresh = points["scale_rows"]
print(f"scale_rows: {fresh * 1e3:.2f} ms; into memory that is there: {given * 1e3:.2f} ms")

# %% [markdown]
# A dot above the slope can happen too. The bandwidth comes from a copy, and before a processor writes, it often fetches what it overwrites, which nobody counted. Work that only reads is then up to 1.5 times as fast (two transfers where the copy has three).
#
# ## Your prediction, compared
#
# No H200 is connected to this notebook, so its side is arithmetic: your roofline with NVIDIA's published figures, in bfloat16. Your machine's side is measured: the product in its best format, the addition in float32.

# %% tags=["nbval-ignore-output"]
gpu, size = accounting.GPUS["H200"], 4096
a, b = torch.randn(2, size, size, device=device).to(best.dtype)
x, y = torch.randn(2, length, device=device)
out = torch.empty_like(x)
product = machine.median_seconds(lambda: a @ b, rounds=1)
addition = machine.median_seconds(lambda: torch.add(x, y, out=out))

cost = my_matmul_cost(size, size, size, 2)
product_there = my_time(*cost, gpu.flops[torch.bfloat16], gpu.bandwidth)
addition_there = my_time(length, 3 * 4 * length, gpu.flops[torch.float32], gpu.bandwidth)
for what, ours, theirs in (
    ("product", product, product_there),
    ("addition", addition, addition_there),
):
    print(f"{what}: {ours * 1e3:.2f} ms here (measured),", end=" ")
    print(f"{theirs * 1e3:.3f} ms on an H200 (arithmetic): {ours / theirs:,.0f} times")
product_guess.compare(product / product_there, how="here it comes to")
addition_guess.compare(addition / addition_there, how="here it comes to")

# %% [markdown]
# Unless your machine has the same ridge as an H200, these are two different factors for the same two machines. "How much faster is a GPU?" has no answer until you say at what: on one side of the ridge the ratio of the peaks counts, on the other that of the bandwidths.
#
# ## Which side of the ridge?
#
# **Question:** a product of some rows with an $n \times n$ matrix: how many rows does it take until an H200 no longer waits for memory? And a laptop's GPU, and your machine? Move `rows` to the right and watch the dots climb; then change the format.

# %% tags=["nbval-ignore-output"]
formats = {"bfloat16": torch.bfloat16, "float32": torch.float32}
names = ["this machine", "RTX 4060 Laptop", "H200"]
everywhere = [2 ** (i / 16) for i in range(-32, 192)]  # FLOP per byte


def draw(figure, rows, n, format):
    dtype, axes = formats[format], figure.subplots()
    flops, nbytes = my_matmul_cost(rows, n, n, dtype.itemsize)
    at = my_intensity(flops, nbytes)
    title = f"[{rows}, {n}] @ [{n}, {n}]: {at:.3g} FLOP per byte"
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s", title=title)
    for name, color, dash in zip(names, plots.COLORS, plots.DASHES, strict=False):
        speeds = accounting.GPUS[name].flops[dtype], accounting.GPUS[name].bandwidth
        roof = [i / my_time(i, 1, *speeds) for i in everywhere]  # for i FLOPs and one byte
        axes.plot(everywhere, roof, label=name, marker="", color=color, ls=dash)
        axes.plot([at], [flops / my_time(flops, nbytes, *speeds)], marker="o", ms=9, color=color)
        plots.mark_ridge(axes, speeds[0] / speeds[1], speeds[0])
    plots.label_lines(axes)


sizes = {"rows": [1, 8, 32, 64, 96, 128, 160, 192, 224, 256, 512, 2048], "n": [4096, 8192]}
alt = "The roofs of three machines, and on each the same product as a dot"
ridges = explore(draw, alt, (7.5, 4.4), **sizes, format=[*formats])
ridges

# %% [markdown]
# Your functions give the answer to the row, here for every GPU of the table (and $n = 4096$):


# %% tags=["nbval-ignore-output"]
def fewest_rows(gpu, dtype, n=4096):
    """The fewest rows for which [rows, n] @ [n, n] is compute-bound."""
    ridge, rows = accounting.ridge(gpu, dtype), 1
    while my_intensity(*my_matmul_cost(rows, n, n, dtype.itemsize)) < ridge:
        rows += 1
    return rows


for name, gpu in accounting.GPUS.items():
    print(f"{name:15s} {gpu.bandwidth / 1e9:4.0f} GB/s", end="")
    for label, dtype in formats.items():
        at, enough = accounting.ridge(name, dtype), fewest_rows(name, dtype)
        print(f"   {label}: ridge {at:5.1f}, {enough:3d} rows", end="")
    print()

# %% [markdown]
# <details><summary>Why these numbers?</summary>In bfloat16 each number of the matrix has 2 bytes and is used for 2 FLOPs in each row, so there are nearly as many FLOPs per byte as rows: 230 rows for the H200's ridge of 206 (a few more than 206, because the rows move too). In float32 each number has 4 bytes, so it takes twice as many rows to have as many FLOPs per byte. On the RTX 4060 the ridge is half as high as well, and it stays at 121 rows. The H200 has units for products in bfloat16 (tensor cores) and is 15 times slower without them: its ridge falls to 14, and 29 rows are enough.</details>
#
# ## When does it NOT pay to look at the roofline?
#
# It knows two limits, and there are others. A tiny product is over at once: what takes the time is **calling** it. And small matrices stay in the **cache**, a small fast memory inside the processor, where the bandwidth of the big memory does not count. The first measurement of this lesson again, now beside the roofline. (Below 1 × it beat the roofline: its numbers were in the cache, or other programs disturbed the measurement of the peak.)

# %% tags=["nbval-ignore-output"]
slow = []
for n, seconds in products.items():
    least = my_time(*my_matmul_cost(n, n, n, 4), limits.flops, limits.bandwidth)
    slow += [str(n)] if seconds > 2 * least else []
    print(f"{n:5d} × {n:<5d} {seconds * 1e6:10.1f} µs: {seconds / least:5.1f} × the roofline")
print("more than twice the roofline's time at:", ", ".join(slow) or "none of these sizes")

# %% [markdown]
# ## In the real DeepSeek
#
# DeepSeek-V3 was trained on H800 GPUs (an H100 with slower links between the GPUs). While it writes an answer, token by token (a **token** is a piece of a word), its weights are read from memory at each step. Its report (arXiv 2412.19437, section 3.4.2) says that one expert then sees "usually within 256 tokens", and that memory access is the bottleneck. An **expert** is one of 256 small feed-forward networks in a layer (lesson 07); its matrices have 7168 × 2048 numbers of one byte, in the format **FP8** (lesson 10).
#
# Your functions can check that sentence:

# %%
V3, fp8 = minids.ModelConfig.preset("deepseek-v3"), torch.float8_e4m3fn
for name, dtype in (("bfloat16", torch.bfloat16), ("FP8", fp8)):
    print(f"ridge of an H800 in {name}: {accounting.ridge('H800', dtype):.0f} FLOP per byte")
for tokens in (1, 32, 256, 1024):
    cost = my_matmul_cost(tokens, V3.moe_intermediate_size, V3.hidden_size, fp8.itemsize)
    print(f"tokens that an expert sees: {tokens:4d} → {my_intensity(*cost):6.1f} FLOP per byte")

# %% [markdown]
# 256 tokens are below the ridge in FP8, 1024 are above it: the sentence holds.
#
# The same count tells why its **attention**, MLA (lessons 03 and 04), is built as it is. Attention looks back: for each token that it writes, the model reads what it kept of every earlier one. In plain attention each number that is read is used once, for a multiplication and an addition. MLA keeps 576 numbers of a token, and all its 128 **heads**, parts that look back side by side, use them.

# %%
kept = V3.kv_lora_rank + V3.qk_rope_head_dim  # numbers that MLA keeps of a token: 512 + 64
uses = V3.num_attention_heads * (kept + V3.kv_lora_rank)  # each head: all 576, then 512 again
for name, numbers, used in (("plain attention", 1, 1), ("MLA", kept, uses)):
    at = my_intensity(2 * used, 2 * numbers)  # 2 FLOPs for each use; 2 bytes a number (bfloat16)
    print(f"{name}: {at:.0f} FLOP per byte")

# %% [markdown]
# Plain attention is far down the slope on every GPU of the table above. MLA's 242 FLOP per byte nearly reach the ridge of the H800 (295), on which V3 was trained, and are above that of the H200 (206): it reads less, and does more with it.
#
# Later models went on with reading less: V3.2, by its report (arXiv 2512.02556), attends to 2048 selected tokens instead of all. That is described there, not measured here.

# %% [markdown]
# ## To remember
#
# 1. Work takes as long as the longer of its arithmetic and its traffic.
# 2. FLOPs per byte against the ridge tell which of the two it is.
# 3. One row times a matrix, which is how a model writes, is below the ridge of every GPU in this lesson.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** A GPU gets twice the FLOP/s and the same bandwidth. What happens to its ridge?
# <details><summary>it doubles</summary>Yes: more kinds of work wait for memory.</details>
# <details><summary>it halves</summary>No: the ridge is peak divided by bandwidth.</details>
#
# **2.** What does that GPU bring for adding two vectors?
# <details><summary>half the time</summary>No: the addition waits for memory.</details>
# <details><summary>nothing</summary>Yes: only bandwidth counts there.</details>
#
# **3.** You store a matrix in one byte a number instead of two. One row times that matrix, memory-bound, takes
# <details><summary>about half as long</summary>Yes: half the bytes.</details>
# <details><summary>as long as before</summary>No: the FLOPs are as before, but they were not what took the time.</details>
#
# **4.** A check says FAIL. Can you go on?
# <details><summary>yes</summary>Yes: the cells below use the reference until yours passes.</details>
# <details><summary>no</summary>You can; nothing below depends on it.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. One row times a matrix of 8192 × 8192 in bfloat16: how long does each GPU of `minids.accounting.GPUS` take at least? `minids.accounting.roofline_seconds(flops, nbytes, name)` is your exercise 3 with a GPU's name. Which GPU would you buy for writing one answer at a time, and why is the peak not the reason?
#    <details><summary>Expected</summary>134,217,728 FLOPs and 134,250,496 bytes. H200: 28 µs; H100 and H800: 40 µs; A100: 66 µs; RTX 4090: 133 µs; RTX 4060 Laptop: 524 µs. One FLOP per byte is far below every ridge, so only bandwidth counts: the H100 has the H200's peak, and is 1.43 times slower.</details>
# 2. `cfg = minids.ModelConfig.preset("deepseek-v3")`: `minids.accounting.parameters(cfg).active` numbers of one byte are read for each token that is written. How many tokens per second could one H200 write at most, if the model fitted into its memory? How long must a conversation be until its cache (`minids.accounting.kv_bytes_per_token(cfg)`) is as much to read as the weights?
#    <details><summary>Expected</summary>36.6 billion bytes at 4.8 TB/s: 7.6 ms, so at most 131 tokens per second. The cache has 70,272 bytes per token: 36.6 billion / 70,272 is about 521,000 tokens.</details>
#
# Next: lesson 01, where you write a transformer and train it.

# %%
status()
