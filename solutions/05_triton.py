# ---
# title: Kernels in Triton
# promise: You write five GPU kernels, from the simplest to the backward pass of a norm, and count every byte that they move, on a machine that need not have a GPU.
# minutes: 75
# difficulty: 3
# needs: [torch, triton]
# objectives:
#   - count the bytes that a formula moves when it runs as several operations, and as one kernel
#   - write kernels with programs, blocks and masks that never leave their tensors
#   - normalise a row with one read, and take the softmax of a row that is longer than a block
#   - read what the compiler makes of your kernel, and what time its bytes take on named GPUs
#   - say when a kernel of your own does not pay
# ---

# %%
import functools
import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minids
from minids import accounting, triton_env
from minids.lab import check, compiled, explore, fast, hint, machine, plots, predict, status
from minids.lab.tiles import count, instead, missing, tl, triton

_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # the backward pass below is written by hand
print(missing() or f"Triton's kernels run here: {triton_env.mode()}")

# %% [markdown]
# ## The problem: a norm that is slower than it should be
#
# In lesson 01 you wrote RMSNorm as one line of torch. It does little arithmetic: a handful of operations for each number. The least that it can do to memory is to read $x$ once and to write the result once, and that is what a **copy** does.
#
# So it should take about as long as a copy. Does it, on this machine?


# %%
def norm_in_torch(x, weight, eps=1e-5):
    """The RMSNorm of lesson 01: x [M,N] over the root mean square of its rows, times weight [N]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


# %% tags=["nbval-ignore-output"]
M, N = (4096, 4096) if not fast() else (512, 4096)
x, weight, target = torch.randn(M, N), torch.rand(N), torch.empty(M, N)
seconds_norm = machine.median_seconds(functools.partial(norm_in_torch, x, weight))
seconds_copy = machine.median_seconds(functools.partial(target.copy_, x))
print(f"x has {M} rows of {N} numbers, {x.nbytes / 2**20:.0f} MiB")
print(f"copy {1e3 * seconds_copy:.1f} ms, norm {1e3 * seconds_norm:.1f} ms on this CPU")
print(f"the norm takes {seconds_norm / seconds_copy:.1f} times as long as a copy")

# %% [markdown]
# Two things can be the cause: the arithmetic, or more trips to memory than one sees in the line. On a CPU both count. On a GPU arithmetic is nearly free (its ridge, lesson 00: an H200 does 14 float32 operations in the time of one byte), so the trips decide.
#
# ### Your prediction
#
# torch runs that line as separate operations; each reads its inputs from memory and writes its result back. Added up: how many times the bytes of a copy (read $x$, write $y$) do they move? Write a number in place of `None`.

# %%
my_guess = None  # a number of your own, such as 1.5
guess = predict("Bytes of the norm in torch, against a copy?", my_guess, "times")

# %% [markdown]
# torch can be asked: a **dispatch mode** sees every operation before it runs. This one adds up the bytes of the tensors that go in and come out.


# %%
class Operations(TorchDispatchMode):
    """Notes of each torch operation inside `with`: its name, bytes read, bytes written."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        read = sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))
        self.rows.append((operation.overloadpacket.__name__, read, result.nbytes))
        return result


with Operations() as seen:
    norm_in_torch(x, weight)
for name, read, written in seen.rows:
    print(f"{name:6} reads {read / x.nbytes:5.3f} and writes {written / x.nbytes:5.3f} times x")
separate = sum(read + written for _, read, written in seen.rows)
guess.compare(separate / (2 * x.nbytes), how="counted")

# %%
fig, axes = plots.figure(7, 2.6)
left = 0
for place, (name, read, written) in enumerate(row for row in seen.rows if row[1] > x.nbytes / 2):
    amount = (read + written) / x.nbytes
    colour = plots.COLORS[place]
    axes.barh(["separate"], [amount], left=left, color=colour, edgecolor=plots.CARD, alpha=0.5)
    axes.text(left + amount / 2, 0, f"{name}\n{amount:.0f}", ha="center", va="center")
    left += amount
axes.barh(["one kernel"], [2], color=plots.COLORS[5], edgecolor=plots.CARD, alpha=0.5)
axes.invert_yaxis()
axes.text(1, 1, "read, write\n2", ha="center", va="center")
axes.grid(False, axis="y")
axes.set(xlabel="trips of the whole tensor between memory and processor")
plots.show(fig, "Trips of x: four large operations make 7, one kernel makes 2.")

# %% [markdown]
# `pow` (the squares) writes a tensor as large as $x$, only for `mean` to read it; the same happens between the two products. (Did the norm take more than 3.5 times a copy on this CPU? The rest is arithmetic and cache.) Nobody needs these intermediate tensors. **Fusing** means: do all of it in one go, while the numbers are in the processor. Then two trips remain.
#
# torch cannot know what you will do with the squares. You do, so you write the fused program yourself. A program that a GPU runs is called a **kernel**, and **Triton** is a language inside Python for kernels.

# %% [markdown]
# ## What a kernel is
#
# | word | meaning |
# |---|---|
# | **program** | one run of your kernel's code; a launch starts many, which run side by side and do not wait for one another |
# | **grid** | how many programs a launch starts |
# | **block** | the numbers that one program handles together; their count is a power of two, fixed when the kernel is compiled |
# | **lane** | one place in a block |
# | **pointer** | where a tensor's first number lies in memory; pointer + `at` is where number `at` lies |
# | **load**, **store** | memory → block, block → memory |
#
# A tensor is a row of numbers in memory; there are no shapes in a kernel. A loaded block is in **registers**, the storage inside the processor, and costs nothing more until it is stored. Each program asks for its number, $p = 0, 1, 2, …$, and finds out from it which addresses are its own:

# %% tags=["hide-input"]


def draw_programs(axes, n, block):
    """Squares for the addresses of n numbers; colour and row say which program touches them."""
    programs = -(-n // block)
    for at in range(programs * block):
        p = at // block
        look = {"color": plots.COLORS[p % 6], "ec": plots.CARD}
        if at >= n:
            look = {"fill": False, "ec": plots.INK, "hatch": "xxx"}
        axes.bar(at, 0.8, 0.9, bottom=p - 0.4, **look)
    axes.axvline(n - 0.5, color=plots.INK, linestyle=":")
    axes.set(xlabel="address: offset from the pointer, in numbers", ylim=(programs - 0.4, -0.6))
    axes.set_yticks(range(programs), [f"program {p}" for p in range(programs)])
    axes.set_xticks(range(0, programs * block, block))
    axes.set_title(f"{n} numbers, blocks of {block}: {programs} programs")
    axes.grid(False)


fig, panels = plots.figure(9, 2.2, columns=2)
draw_programs(panels[0], 16, 4)
draw_programs(panels[1], 14, 4)
plots.show(fig, "Programs of 4 lanes: 16 numbers use all lanes, 14 leave the last two idle.")

# %% [markdown]
# On the left every lane has a number. On the right the last program has two lanes too many (crossed): behind the dotted line lies memory of somebody else. That is for exercise 2.
#
# In plain torch, a launch would be a loop. On a GPU its rounds run at the same time, in any order:


# %%
def negate_by_programs(x, block):
    """-x, by len(x) / block programs, each of which knows its own number alone."""
    out = torch.full_like(x, torch.nan)
    for program in range(len(x) // block):
        at = program * block + torch.arange(block)  # the addresses of this program's lanes
        out[at] = -x[at]  # load, compute, store
    return out


print(negate_by_programs(torch.arange(8.0), 4))

# %% [markdown]
# ## Exercise 1 · Scale
#
# *6 minutes · difficulty ●○○○○*
#
# Multiply $n$ numbers by a factor; the blocks fit exactly. What you need of Triton:
#
# | in a kernel | gives |
# |---|---|
# | `tl.program_id(0)` | the number of this program |
# | `tl.arange(0, BLOCK)` | the block 0, 1, …, BLOCK − 1 |
# | `tl.load(pointer + offsets)` | the block of numbers at these places |
# | `tl.store(pointer + offsets, values)` | nothing; it writes |
#
# | argument | meaning |
# |---|---|
# | `x`, `out` | pointers; `out` is new memory |
# | `factor` | a number |
# | `BLOCK` | lanes of a program; `tl.constexpr` says that it is fixed when the kernel is compiled |
#
# `@triton.jit` makes a kernel of the function. A kernel returns nothing.


# %%
@triton.jit
def scale_kernel(x, out, factor, BLOCK: tl.constexpr):
    """out = x * factor, of BLOCK numbers a program; there are as many programs as blocks."""
    # BEGIN SOLUTION
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * factor)
    # END SOLUTION


# %%
my_scale = check(scale_kernel)

# %% [markdown]
# The check launched your kernel on several sizes and compared the values. It also watched every access (one outside of the tensors fails) and counted every byte (more than 1.05 times the fewest fails: the fewest for this exercise's algorithm). And it refuses what a GPU's compiler would: a kernel sees its own arguments alone, and a function that it calls needs `@triton.jit`, too.
#
# This is how one launches it: the grid in brackets, then the arguments. Tensors become pointers on the way.


# %%
def scale(x, factor, block=16):
    """x [n] times factor, by n / block programs."""
    out = torch.empty_like(x)
    my_scale[(x.numel() // block,)](x, out, factor, BLOCK=block)
    return out


scaled, m = count(scale, torch.arange(64.0), 3.0)
print("no kernel runs here: see the first cell" if scaled is None else scaled[:6])
print(m or "nothing is counted here")

# %% [markdown]
# Without a GPU, Triton's **interpreter** runs the programs one after the other in Python. The values are those of a GPU up to rounding, the bytes are exact, and the TIME MEANS NOTHING: it is Python's. So in this lesson kernels are counted; only torch is timed.
#
# ## Exercise 2 · Add, with a mask
#
# *8 minutes · difficulty ●●○○○*
#
# Now $n$ is any number. The last program has lanes without a number; if they read or write, they touch memory of somebody else. A **mask**, a block of True and False, switches lanes off:
#
# `tl.load(pointer + offsets, mask=inside)`, `tl.store(pointer + offsets, values, mask=inside)`
#
# Comparing a block with a number gives such a block. What a switched-off lane holds after a load is undefined; here it is never stored, so nobody cares.
#
# | argument | meaning |
# |---|---|
# | `x`, `y`, `out` | pointers to `n` numbers each |
# | `n` | how many |


# %%
@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """out = x + y, of n numbers; the last program may have fewer than BLOCK of them."""
    # BEGIN SOLUTION
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside)
    tl.store(out + at, total, mask=inside)
    # END SOLUTION


# %%
my_add = check(add_kernel)

# %% [markdown]
# The number of programs is now rounded up, which `triton.cdiv(n, block)` does.
#
# **A question:** you add two vectors of 1000 numbers. Which block size wastes the fewest lanes, and which moves the fewest bytes? Think first, then move the sliders.


# %%
def lanes(n, block):
    """(programs, lanes, share of the lanes without a number) of n numbers in blocks."""
    programs = -(-n // block)
    return programs, programs * block, 1 - n / (programs * block)


BLOCKS = [2**power for power in range(4, 14)]


def draw(figure, numbers, block):
    idle, busy = figure.subplots(1, 2)
    names = "% of the lanes idle", "programs (dotted: an H200's processors)"
    for axes, title in zip((idle, busy), names, strict=True):
        axes.set(title=title, xlabel="block size", xscale="log")
    idle.plot(BLOCKS, [100 * lanes(numbers, b)[2] for b in BLOCKS])
    busy.plot(BLOCKS, [lanes(numbers, b)[0] for b in BLOCKS])
    busy.axhline(132, color=plots.INK, linestyle=":")
    busy.set(yscale="log", ylim=(0.7, 3 * max(132, lanes(numbers, BLOCKS[0])[0])))
    programs, every, share = lanes(numbers, block)
    for axes, value in ((idle, 100 * share), (busy, programs)):
        axes.plot([block], [value], marker="o", ms=11, mfc="none", ls="")
    words = f"{programs} programs, {every} lanes, {100 * share:.1f}% idle"
    figure.suptitle(f"{words}; {3 * 4 * numbers:,} bytes whatever the block")


alt = "Idle lanes and programs over the block size: idle lanes stay flat, then jump; programs fall."
explore(draw, alt=alt, size=(8, 3.4), numbers=[1000, 4096, 7168, 1_000_000], block=BLOCKS)

# %%


def add(x, y, block):
    """x [n] + y [n] by your kernel."""
    n, out = x.numel(), torch.empty_like(x)
    my_add[(triton.cdiv(n, block),)](x, y, out, n, BLOCK=block)
    return out


for block in (16, 64, 256, 1024, 4096):
    programs, every, share = lanes(1000, block)
    _, m = count(add, torch.ones(1000), torch.ones(1000), block)
    moved = f"{m.bytes:,} bytes counted" if m else "bytes not counted here"
    print(f"block {block:4}: {programs:2} programs, {100 * share:4.1f}% of lanes idle, {moved}")

# %% [markdown]
# So block 16 wastes least: 63 programs have 1008 lanes, 8 idle. From 32 to 1024 the blocks give 1024 lanes, from then on each doubling adds idle ones. And the bytes never change: a lane that is masked off moves nothing. What changes is how well the GPU is used. Blocks that are too large leave lanes idle, and leave processors without a program: an H200 has 132 of them, and 1000 numbers cannot keep it busy with any block. (With a million the slider shows more choice.) Blocks that are too small give each program so little that starting it costs more than its work. In between there is a wide range; one tries a few.

# %% [markdown]
# 7168, the width of DeepSeek-V3, is a fine example: a block that holds a whole row must have 8192 lanes, the next power of two, and $1 - 7168/8192 = 12.5\,\%$ of them idle. That is the subject of the next exercise.

# %% [markdown]
# ## Exercise 3 · RMSNorm in one kernel
#
# *12 minutes · difficulty ●●●○○*
#
# $$y_i = x_i\, r\, w_i, \qquad r = \Big(\tfrac1N \sum_j x_j^2 + \epsilon\Big)^{-1/2}$$
#
# (1910.07467, eq. 4). A block holds a whole row, loaded ONCE. Three things are new:
#
# 1. `tl.sum(block, 0)` adds up a block. Now a masked lane matters: give it a value with `tl.load(…, mask=inside, other=0.0)`. The check fills undefined lanes with NaN.
# 2. There are more rows than programs. Program $p$ of $P$ takes the rows $p, p+P, p+2P, …$ in a loop: Python's `range(start, M, step)` works in a kernel, also with values known only when it runs. What all rows share, it loads once, before.
# 3. $x$ may be float16, whose largest number is 65504. `.to(tl.float32)` behind a load computes in float32; a store rounds to the type of its pointer.

# %% [markdown]
# | argument | meaning |
# |---|---|
# | `x` | pointer to `M` rows of `N` numbers; row $i$ begins at offset $i$ · `stride` |
# | `weight` | pointer to `N` numbers |
# | `y` | pointer to the result, whose rows have no gaps: row $i$ begins at $i$ · `N` |
# | `eps` | a number |
# | `BLOCK` | the smallest power of two that is not below `N` |
#
# `tl.num_programs(0)` is $P$, and `tl.sqrt` takes roots.


# %%
@triton.jit
def rms_norm_kernel(x, weight, y, M, N, stride, eps, BLOCK: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * weight, rows p, p + P, ... of M; a block holds a row."""
    column = tl.arange(0, BLOCK)
    inside = column < N
    # BEGIN SOLUTION
    w = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(value * value, 0) / N + eps)
        tl.store(y + row * N + column, value * r * w, mask=inside)
    # END SOLUTION


# %%
my_rms_norm = check(rms_norm_kernel)

# %% [markdown]
# ### Does it move as little as a copy?
#
# The same shape as DeepSeek-V3's rows, 7168 wide, but only 32 of them: an interpreter is slow. Four programs share them. torch's operations are counted on the same tensors.


# %%
def norm_fused(x, weight, programs=4, eps=1e-5):
    """The RMSNorm of x [M,N] by your kernel."""
    (M, N), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = {"BLOCK": triton.next_power_of_2(N)}
    my_rms_norm[(programs,)](x, weight, y, M, N, x.stride(0), eps, **sizes)
    return y


rows, w = torch.randn(32, 7168), torch.rand(7168)
with Operations() as seen:
    want = norm_in_torch(rows, w)
separate = sum(read + written for _, read, written in seen.rows)
got, m = count(norm_fused, rows, w)
fused = m.bytes if m else 2 * rows.nbytes + 4 * w.nbytes  # arithmetic where nothing counts
if got is not None:
    print(f"largest difference: {minids.numerics.relative_error(got.cpu(), want):.0e} of the size")
how = "counted" if m else "by arithmetic: no kernel is counted here"
print(f"separate {separate:,} bytes, fused {fused:,} ({how})", end=": ")
print(f"{separate / fused:.2f} times as many")
print(f"a copy moves {2 * rows.nbytes:,}; the rest is the weight, once for each of 4 programs")

# %% [markdown]
# With one program for each ROW, which is how many tutorials write it, the weight would be asked for 32 times, and the kernel would move 1.5 times the bytes of a copy instead. (A GPU serves most of that from its L2 cache, a small fast memory that all programs share. The meter counts what the programs ask for.)

# %% [markdown]
# ## What the compiler makes of it
#
# On a GPU, Triton compiles a kernel for the very GPU that is there. It can also compile for one that is not: sm_90 is NVIDIA's name for the H100 and H200. **PTX** is the text that comes out, nearly the GPU's own instructions. A program is run by many **threads**, 128 of them here; each does the work of some lanes.
#
# `aligned=("n",)` promises that $n$ is a multiple of 16. Then four lanes side by side have the same mask, and one load takes all four. With $n = 1000$, no such multiple, each load takes one number. (At a launch Triton looks at $n$ and sees that by itself.) Here are ten lines of your second kernel, each with what it does:

# %% tags=["nbval-ignore-output"]
MEANING = {
    r"%ctaid\.x": "the number of this program: tl.program_id(0)",
    r"shl\.b32.*, 10;": "times 1024 (shifted by 10 bits): where its block begins",
    r"%tid\.x": "which of the program's 128 threads am I? (Triton's doing)",
    r"setp\.lt": "the mask: is the offset below n?",
    r"mul\.wide": "offset times 4: numbers have 4 bytes",
    r"add\.s64": "pointer + offset",
    r"ld\.global": "load FOUR numbers at once, 16 bytes, if the mask (@%p) is true",
    r"add\.f32": "one of the additions",
    r"st\.global": "store four at once, under the same mask",
    r"ret;": "the program ends",
}
facts = None
if triton_env.installed():
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}
    facts = compiled.facts(my_add, types, {"BLOCK": 1024}, aligned=("n",))
for pattern, words in MEANING.items() if facts else ():
    line = next((one.strip() for one in facts.ptx.splitlines() if re.search(pattern, one)), "…")
    print(f"{' '.join(line.split())[:44]:46}{words}")
print(facts or instead())

# %% [markdown]
# 32 threads form a **warp**; `num_warps` says how many warps work on a block. A **register** holds 4 bytes of one thread, and a thread has at most 255. Your norm keeps a row of 8192 lanes in registers. With one warp, how many numbers is that for each thread? 256, too many: some of them **spill**, which means that they go back to memory.

# %% tags=["nbval-ignore-output"]
if triton_env.installed():
    types = {name: "*bf16" for name in ("x", "weight", "y")}
    types |= {"M": "i32", "N": "i32", "stride": "i32", "eps": "fp32"}
    request = functools.partial(compiled.request, my_rms_norm, types, {"BLOCK": 8192})
    warps = (1, 2, 4, 8, 16)
    wanted = [request(num_warps=number, aligned=("N", "stride")) for number in warps]
    for number, found in zip(warps, compiled.facts_of_all(wanted), strict=True):
        each = f"{8192 // (32 * number):3} numbers a thread, {found.registers:3} registers"
        print(f"{number:2} warps: {each}, {found.spills:4} bytes spilled")
else:
    print(instead())

# %% [markdown]
# So "the row stays in registers" is true from four warps on; with two, a little still spills. What of a row that is too long for any number of registers? A vocabulary, for example: 129,280 scores.
#
# ## Exercise 4 · Softmax of a row longer than a block
#
# *14 minutes · difficulty ●●●●○*
#
# $$\mathrm{softmax}(x)_i = \frac{e^{x_i - m}}{\sum_j e^{x_j - m}}, \qquad m = \max_j x_j$$
#
# Without $m$, $e^{200}$ is infinite in float32. But $m$ is known only when the whole row was seen: one pass for $m$, one for the sum, one to write? The **online** softmax (1805.02867, algorithm 3) does the first two in one. It carries the maximum $m$ and the sum $s$ of what it has seen; a block $b$ changes them to
#
# $$m' = \max(m, \max b), \qquad s' = s\, e^{m - m'} + \sum_{j \in b} e^{x_j - m'}$$
#
# The factor makes of a sum that was taken with the old maximum one with the new. At the first block $m = -\infty$, so it is $e^{-\infty} = 0$: nothing to rescale yet.

# %% tags=["hide-input"]
values = torch.tensor([1.0, 2.5, 0.5, 1.5, 2.0, 1.0, 4.0, 3.0, 0.5, 2.0, 3.5, 1.0])
fig, axes = plots.figure(7, 3)
largest, total = -torch.inf, torch.tensor(0.0)
for block in range(3):
    part = values[4 * block : 4 * block + 4]
    new = max(largest, part.max().item())
    factor = torch.exp(torch.tensor(largest - new))
    total = total * factor + torch.exp(part - new).sum()
    places = range(4 * block, 4 * block + 4)
    axes.bar(places, part, color=plots.COLORS[block], width=0.85)
    axes.plot([4 * block - 0.5, 4 * block + 3.5], [new, new], color=plots.INK, marker="", ls="--")
    words = f"m = {new:g}, factor {factor:.2f}\ns = {total:.2f}"
    axes.text(4 * block + 1.5, 4.25, words, ha="center", va="bottom")
    largest = new
axes.set(ylim=(0, 5.6), xlabel="a row of 12 numbers, three blocks of 4", ylabel="score")
alt = "Running maximum and sum: the second block raises the maximum to 4, so the old sum shrinks."
plots.show(fig, alt)
print(f"sum by the plain formula: {torch.exp(values - values.max()).sum():.2f}")

# %% [markdown]
# | argument | meaning |
# |---|---|
# | `x`, `y` | pointers; rows of `N` numbers without gaps; program $p$ does row $p$ |
# | `N` | length of a row, longer than `BLOCK` and not always a multiple of it |
#
# You write what happens to one block in the FIRST pass; the second, which writes, is there. `tl.max(block, 0)` is the largest of a block, `tl.maximum(a, b)` the larger of two numbers, and `-float("inf")` is a score whose exponential is 0. A name that is assigned anew in the loop is carried into its next round.


# %%
@triton.jit
def softmax_online_kernel(x, y, N, BLOCK: tl.constexpr):
    """y = softmax(x) of row p; the first pass carries `largest` and `total`, the second writes."""
    row = tl.program_id(0) * N
    column = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, N, BLOCK):
        at = start + column
        # BEGIN SOLUTION
        value = tl.load(x + row + at, mask=at < N, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(value - new), 0)
        largest = new
        # END SOLUTION
    for start in range(0, N, BLOCK):
        at = start + column
        value = tl.load(x + row + at, mask=at < N).to(tl.float32)
        tl.store(y + row + at, tl.exp(value - largest) / total, mask=at < N)


# %%
my_softmax = check(softmax_online_kernel)

# %% [markdown]
# Two reads and one write: 1.5 times a copy, the price of a row that fits nowhere. (The check's 1.00 is against the fewest bytes for this algorithm, which reads twice.) The three passes of the plain formula would be twice a copy.
#
# The trick is worth more than this kernel. Attention is a softmax over scores that never need to be in memory, if maximum and sum (and a weighted sum of values) are carried along: lesson 06 is built on it.
#
# ## Exercise 5 · The way back (a stretch)
#
# *14 minutes · difficulty ●●●●○*
#
# Training needs the gradient of the loss with respect to $x$, given $dy$, that with respect to $y$. In $y_i = x_i r w_i$ every $x_j$ is in $r$ too: $\partial r / \partial x_j = -r^3 x_j / N$. With $n_i = x_i r$ and $g_i = dy_i\, w_i$ that gives
#
# $$dx_i = r \Big(g_i - n_i \cdot \tfrac1N \sum_j n_j\, g_j\Big)$$
#
# The forward pass kept $r$, one number for each row, so nobody needs to sum the squares again.

# %% [markdown]
# | argument | meaning |
# |---|---|
# | `x`, `dy`, `dx` | pointers to `M` rows of `N` float32 numbers, without gaps |
# | `weight` | pointer to `N` numbers |
# | `r` | pointer to `M` numbers: `tl.load(r + row)` is one |
#
# Programs share the rows as in exercise 3. The fewest bytes: read $x$ and $dy$ once, write $dx$ once.


# %%
@triton.jit
def rms_norm_backward_kernel(x, weight, r, dy, dx, M, N, BLOCK: tl.constexpr):
    """dx = r * (g - n * mean(n * g)), n = x * r, g = dy * weight; rows p, p + P, ... of M."""
    column = tl.arange(0, BLOCK)
    inside = column < N
    # BEGIN SOLUTION
    w = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        at = row * N + column
        factor = tl.load(r + row)
        n = tl.load(x + at, mask=inside, other=0.0) * factor
        g = tl.load(dy + at, mask=inside, other=0.0) * w
        tl.store(dx + at, factor * (g - n * (tl.sum(n * g, 0) / N)), mask=inside)
    # END SOLUTION


# %%
my_backward = check(rms_norm_backward_kernel)

# %% [markdown]
# ## The score: bytes moved / fewest possible
#
# "Fewest possible" is stricter here than in the checks: every input read once, every result written once, whatever the algorithm. So your softmax, 1.00 in its check, is 1.50 here. The kernels run on 32 rows of 1024 numbers. Eight programs share a norm, and each asks for the weight: that is the part above 1. torch is counted as before.


# %%
def softmax_fused(x):
    y = torch.empty_like(x)
    my_softmax[(len(x),)](x, y, x.shape[1], BLOCK=256)
    return y


def backward_fused(x, weight, r, dy):
    dx = torch.empty_like(x)
    my_backward[(8,)](x, weight, r, dy, dx, *x.shape, BLOCK=1024)
    return dx


def backward_in_torch(x, weight, r, dy):
    n, g = x * r[:, None], dy * weight
    return r[:, None] * (g - n * (n * g).mean(-1, keepdim=True))


x, dy, w = torch.randn(32, 1024), torch.randn(32, 1024), torch.rand(1024)
r = torch.rsqrt(x.square().mean(-1) + 1e-5)
pairs = {
    "RMSNorm": (norm_in_torch, functools.partial(norm_fused, programs=8), (x, w)),
    "softmax": (lambda x: x.softmax(-1), softmax_fused, (x,)),
    "RMSNorm backward": (backward_in_torch, backward_fused, (x, w, r, dy)),
}

# %%
scores = {}
for name, (in_torch, kernel, args) in pairs.items():
    with Operations() as seen:
        want = in_torch(*args)
    least = sum(arg.nbytes for arg in args) + want.nbytes
    got, m = count(kernel, *args)
    scores[name] = {"torch": sum(a + b for _, a, b in seen.rows if a + b > least / 99) / least}
    if m:
        scores[name]["one kernel"] = m.bytes / least
        error = minids.numerics.relative_error(got, want)
        print(f"{name}: {m.bytes:,} bytes of at least {least:,}; error {error:.0e}")
if missing():
    print(f"torch alone: {instead()}")
fig, axes = plots.figure(7, 3.4)
plots.bars(axes, scores, form=".2f")
axes.set(title="bytes moved / fewest possible: 1 is perfect")
plots.show(fig, "Bytes over the fewest possible: norms near 1 by kernels, above 3 in torch.")

# %% [markdown]
# torch's softmax is ONE operation, a kernel that somebody at torch wrote: its dispatcher sees one read and one write, and cannot see how often that kernel reads. So your softmax cannot win this count; it wins where its surroundings can be fused too.
#
# ## What time is that on a GPU?
#
# Bytes, exact, divided by a GPU's bandwidth, from its data sheet, give the least time: the **roofline** of lesson 00. This is arithmetic, not a measurement: a real kernel is slower. It takes the bytes counted on 32 rows 128 times, as if four of your programs shared every 32 rows. Is it the bytes that count? The norm does about five FLOPs for each number, that is for 8 bytes, and each of these GPUs does far more in the time of 8 bytes.

# %%
rows, width = 4096, 7168  # tokens of a batch, DeepSeek-V3's width, float32
scale_up = rows / 32  # counted above on 32 rows of this width
times = {}
for name in ("H200", "A100", "RTX 4090", "RTX 4060 Laptop"):
    each = {"separate": separate, "fused": fused}
    bound = functools.partial(accounting.roofline_seconds, 0, gpu=name)
    times[name] = {what: 1e6 * bound(scale_up * moved) for what, moved in each.items()}
    ridge = accounting.ridge(name, torch.float32)
    print(f"{name}: its ridge is at {ridge:.0f} FLOP per byte, the norm has {5 / 8:.2f}")
fig, axes = plots.figure(7, 3.8)
plots.bars(axes, times, unit="µs", form=",.0f")
axes.set(title=f"µs at least: RMSNorm of {rows} rows of {width} float32 numbers (arithmetic)")
plots.show(fig, "Least time of the norm on four GPUs: separate ones take over 3 times as long.")

# %% tags=["nbval-ignore-output"]
if triton_env.mode() == "gpu":
    x, w = torch.randn(rows, width, device="cuda"), torch.rand(width, device="cuda")
    programs = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    run = functools.partial(norm_fused, x, w, programs)
    seconds = machine.median_seconds(run, 20)
    print(f"{torch.cuda.get_device_name()}: {2 * x.nbytes / seconds / 1e12:.2f} TB/s reached")
else:
    print("no GPU here: nothing is timed")
machine.recorded("layers")

# %% [markdown]
# ## When does it not pay?
#
# **When a compiler does it.** `torch.compile` looks at the whole formula before it runs, finds operations that can be fused, and writes such kernels itself: in Triton for a GPU, in C++ for a CPU. The next cell tries that on the norm. Compiling takes from some seconds to a minute, and needs a C++ compiler.

# %% tags=["nbval-ignore-output"]
x, weight = torch.randn(M, N), torch.rand(N)
if fast():
    print("MINIDS_FAST is set: nothing is compiled")
else:
    try:
        by_compiler = torch.compile(norm_in_torch)
        by_compiler(x, weight)
        seconds = machine.median_seconds(functools.partial(by_compiler, x, weight))
        print(f"copy {1e3 * seconds_copy:.0f} ms, separate {1e3 * seconds_norm:.0f} ms")
        faster = seconds_norm / seconds
        print(f"compiled {1e3 * seconds:.0f} ms: {faster:.1f} times as fast as separate")
    except Exception as error:
        print(f"torch.compile does not work here ({type(error).__name__}); on with the lesson")

# %% [markdown]
# (This is a CPU's answer, unless you have a GPU: the arithmetic counts too, so fewer bytes gain less time than one hopes.) So a norm by itself is a poor reason to write Triton. Good ones: Inductor, the compiler behind `torch.compile`, knows softmax, but it does not fuse your attention over a latent cache, nor split that cache among programs (lesson 06), nor route tokens to experts (09) or multiply in FP8 with scales of your own (11).
#
# **When the tensors are tiny.** Starting a kernel takes time too, "on the order of microseconds" (Modal's GPU glossary, CUDA graph), whatever it does. How large must a tensor be so that moving it takes as long?

# %%
LAUNCH = 4e-6  # seconds, an assumption: put your own in
token = 2 * 2 * width  # one token: read and written, 2 bytes a number
for name in ("H200", "RTX 4060 Laptop"):
    bandwidth = accounting.GPUS[name].bandwidth
    print(f"{name}: {token / bandwidth * 1e9:.0f} ns to move the norm of one token of {width}")
    tokens = LAUNCH * bandwidth / token
    print(f"  a launch of {LAUNCH * 1e6:g} µs is as long as {tokens:,.0f} tokens")
tiny = torch.randn(1, 16)
seconds_tiny = machine.median_seconds(lambda: norm_in_torch(tiny, tiny[0]), 50)
print(f"on this CPU, the norm of 16 numbers, which are no work, takes {seconds_tiny * 1e6:.0f} µs")

# %% [markdown]
# With one new token, then, the bytes of a norm are nothing, and fusing pays for another reason: one launch instead of six. (A **CUDA graph**, a recorded list of launches that starts as one, saves the same without any kernel of yours.)
#
# ## In the real DeepSeek
#
# | what | where | written in |
# |---|---|---|
# | `act_quant_kernel`, `weight_dequant_kernel`, `fp8_gemm_kernel` | DeepSeek-V3's repository, `inference/kernel.py` | Triton |
# | DeepGEMM: FP8 matrix products, grouped ones for experts | its own repository | CUDA |
# | FlashMLA: decoding with the latent cache | its own repository | CUDA |
#
# Their `act_quant_kernel` is your exercise 1 with a maximum and a second store: offsets from the program's number, a load, a store, and NO mask. It needs none: its wrapper asserts that 128 divides the width. Where speed counts most they write CUDA. And the V3 report (2412.19437, section 3.2.3) computes RMSNorm AGAIN in the backward pass instead of keeping its results: cheap, as you know now.

# %%
cfg = minids.ModelConfig.preset("deepseek-v3")
D, layers = cfg.hidden_size, cfg.num_hidden_layers
normed = layers * (2 * D + cfg.q_lora_rank + cfg.kv_lora_rank) + D  # numbers a token, all norms
print(f"{4 * layers + 1} norms of {normed:,} numbers for each token")
tokens, H800 = 4096, accounting.GPUS["H800"]
products = 2 * accounting.parameters(cfg).active * tokens / H800.flops[torch.bfloat16]
for name, trips in (("separate", 7), ("fused", 2)):
    norms = trips * 2 * normed * tokens / H800.bandwidth
    print(f"{name}: {1e3 * norms:.1f} ms of norms for {tokens} tokens, at least, on one H800,")
    share = f"{norms / products:.1%} (arithmetic)"
    print(f"  beside {1e3 * products:.0f} ms of matrix products: {share}")

# %% [markdown]
# ## To remember
#
# 1. A formula in separate operations pays for every intermediate tensor: one write, and one read at least.
# 2. A program finds its addresses from its number; a mask keeps its lanes inside, and `other` keeps the masked ones harmless.
# 3. Maximum and sum can be carried and rescaled, so a softmax needs no row that fits anywhere.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** You double BLOCK in `add_kernel`, with its mask. The bytes moved
# <details><summary>double</summary>No: twice the lanes, half the programs.</details>
# <details><summary>stay</summary>Yes: masked lanes move nothing.</details>
#
# **2.** A load has a mask and no `other`. When is that wrong?
# <details><summary>always</summary>No: in <code>add_kernel</code> the lanes are never stored.</details>
# <details><summary>when the lanes get into a sum or a maximum</summary>Yes: they may hold anything.</details>
#
# **3.** Maximum 5 so far, sum 2; the next block's maximum is 3. The old sum is multiplied by
# <details><summary>1</summary>Yes: the maximum does not grow, so exp(0).</details>
# <details><summary>exp(2)</summary>No: a factor is never above 1.</details>
#
# **4.** The interpreter takes 3 s for your kernel and 1 s for the wasteful one. Which is faster on a GPU?
# <details><summary>the wasteful one</summary>Nothing says so: interpreted times mean nothing.</details>
# <details><summary>count the bytes</summary>Yes, that is what is left to compare.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. `silu_mul(gate, up)` of `minids.layer_kernels` is SwiGLU's middle as a kernel. How many bytes does it move for two float32 tensors `[64, 384]`, and how many do torch's operations `F.silu(gate) * up`? Count with `meter` (`from minids.lab import meter`, `with meter() as m:`, then `m.bytes`) and the class `Operations` above.
# <details><summary>Expected</summary>294,912 (three tensors of 98,304 bytes) against 491,520 (five): 5/3 = 1.67 times.</details>
# 2. A block of the transformer adds, then normalises: `h = x + a`, `y = rms_norm(h)`, and needs both `h` and `y`. Write ONE kernel for it (`from minids.lab.tiles import tl, triton`), and count its bytes for float32 tensors `[32, 1000]`. What is the fewest number of trips, and what are an add and your `rms_norm_kernel` one after the other?
# <details><summary>Expected</summary>4 (read x and a, write h and y) against 3 + 2 = 5: 5/4 = 1.25 times, the weight left out. One program moves 516,000 bytes: 4 tensors of 128,000, and the weight, 4,000.</details>

# %%
status()
