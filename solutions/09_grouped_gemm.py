# ---
# title: All experts in one product
# promise: You replace the loop over experts by one grouped product in Triton, forward and backward, and count what its tiles move, multiply and waste.
# minutes: 90
# difficulty: 4
# needs: [torch, triton]
# objectives:
#   - sort the choices of all tokens by expert, without the processor ever waiting for the GPU
#   - cut each expert's rows into tiles that never cross to the next expert
#   - write the grouped product and the gradient of its weights in Triton
#   - weigh padding against traffic, by counted bytes and multiply-adds
#   - say what skewed loads cost, and when a grouped product does not pay
# ---

# %%
import functools

import torch
from torch.nn.functional import grouped_mm, silu
from torch.utils._python_dispatch import TorchDispatchMode

import minids
from minids import accounting, triton_env
from minids.lab import check, explore, fast, hint, machine, plots, predict, status
from minids.lab.tiles import count, instead, missing, tl, triton
from minids.moe import reference

print(missing() or f"Triton's kernels run here: {triton_env.mode()}")
_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)
device = "cuda" if triton_env.mode() == "gpu" else "cpu"

# %% [markdown]
# ## The problem: a loop that works for a few rows at a time
#
# In lesson 07 a **token** (its $D$ numbers) went to $A$ of $E$ **experts**. Each expert is a small SwiGLU with matrices of its own, $F$ wide, and its result is weighted by a number, the **gate**. A token with one of its experts is a **choice**; $M$ tokens have $n = M A$ of them.
#
# The loop of lesson 07 does this for each expert:
#
# 1. find its tokens (`nonzero`);
# 2. copy them together;
# 3. multiply by its matrices;
# 4. add the results to the tokens.
#
# DeepSeekMoE's idea is *many small* experts. The next cell takes three layers with equal parameters and equal arithmetic, cut into 16, 64 and 256 experts, and times the loop twice: with 256 tokens, and with **none**. Without tokens there is no arithmetic; what remains is the price of the steps themselves.


# %%
def layer(E, A, width, tokens, D=128):
    """x [M,D], indices [M,A], gates [M,A], gate_up [E,2F,D] and down [E,D,F], at random."""
    x, gates = torch.randn(tokens, D), torch.rand(tokens, A)
    indices = torch.rand(tokens, E).topk(A).indices
    gate_up, down = torch.randn(E, 2 * width, D) * D**-0.5, torch.randn(E, D, width) * width**-0.5
    return x, indices, gates, gate_up, down


def one_product(x, indices, gates, gate_up, down, plan=reference.dispatch_plan):
    """The same sum as reference.experts_loop, by two products over rows sorted by expert."""
    order, token, place, ends = plan(indices, len(gate_up))
    grouped = functools.partial(grouped_mm, offs=ends.to(torch.int32))
    gate, up = grouped(x[token], gate_up.transpose(1, 2)).chunk(2, -1)
    rows = silu(gate) * up * gates.flatten()[order, None]
    return grouped(rows, down.transpose(1, 2))[place].sum(1)


# %% tags=["nbval-ignore-output"]
times = {}
for E, A, width in ((16, 2, 256), (64, 8, 64), (256, 32, 16)):
    full = layer(E, A, width, 256)
    none = *(tensor[:0] for tensor in full[:3]), *full[3:]
    runs = {"loop": reference.experts_loop, "one product": one_product}
    todo = {name: functools.partial(run, *full) for name, run in runs.items()}
    todo |= {f"{name}, no token": functools.partial(run, *none) for name, run in runs.items()}
    seconds = machine.race(todo, 3 if fast() else 7)
    times[f"{E} experts"] = {name: 1e3 * one for name, one in seconds.items()}
    ratio = seconds["loop"] / seconds["one product"]
    share = seconds["loop, no token"] / seconds["loop"]
    print(f"{E:3d} experts, top-{A}: the loop takes {ratio:.1f} times as long", end="; ")
    print(f"{share:.0%} of its time is needed for no token at all")
fig, axes = plots.figure(7.5, 4.6)
plots.bars(axes, times, unit="ms", form=".1f")
axes.set(title="256 tokens, equal arithmetic and parameters (this CPU)")
axes.legend(loc="upper left", bbox_to_anchor=(0, -0.08), ncols=2, frameon=False)
plots.show(fig, "The loop's time grows with the number of experts, also without any token.")

# %% [markdown]
# The arithmetic is the same in all three, yet the loop's time grows with the number of experts, busy or idle. (With few and large ones it is no bad choice: see the end.) `one_product` sorts the choices by expert, and then one call, a **grouped product**, multiplies each expert's rows by its own matrix. How to write that call is this lesson's subject.
#
# ### On a GPU it is worse
#
# There each step is a **launch** of a kernel (lesson 05), which costs the processor some microseconds. The next cell counts operations that do work, and sets their launches beside the least time of the arithmetic in a layer of DeepSeek-V2-Lite.

# %%
LAUNCH = 4e-6  # seconds for one launch: an assumption, put your own in
lite = minids.ModelConfig.preset("deepseek-v2-lite")
E, A = lite.n_routed_experts, lite.num_experts_per_tok
D, F, tokens = lite.hidden_size, lite.moe_intermediate_size, 16384


class Calls(TorchDispatchMode):
    """Counts torch's operations inside `with`, without those that only view a tensor anew."""

    calls = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls += not operation.is_view
        return operation(*args, **(kwargs or {}))


for name, run in (("loop", reference.experts_loop), ("one product", one_product)):
    with Calls() as seen:
        run(*layer(E, A, 16, 64))
    print(f"{name}: {seen.calls} operations, {1e3 * LAUNCH * seen.calls:.2f} ms of launches")
work = 2 * tokens * A * 3 * D * F
least = accounting.roofline_seconds(work, 0, "H200")
print(f"{tokens} tokens of V2-Lite: {work / 1e12:.2f} TFLOP", end=", ")
print(f"{1e3 * least:.2f} ms on an H200 at least")

# %% [markdown]
# The GPU could be done before the processor has told it what to do. (These are bounds by arithmetic, not measurements.)
#
# And it cannot be told in advance. The loop **waits**: after `nonzero` the processor must know how many rows there are before it can launch the next step, so it stops until the GPU has come so far. Once for every expert.
#
# ### Your prediction
#
# Routers are not fair. Suppose that ALL rows go to one of 64 experts, instead of an equal share to each. The arithmetic is the same. How many times as long will `one_product` take on this CPU? (1 means: the same time.) Write a number in place of `None`.

# %%
my_guess = None  # a factor, such as 1.5
guess = predict("All rows to one expert: how many times the time?", my_guess, "times")

# %% [markdown]
# ## Step one: sort
#
# Number the choices by token, then by choice: choice $a$ of token $t$ has the **flat position** $t A + a$. Sorted by expert, each expert's rows lie together. In this example there are 4 tokens, $A = 2$, $E = 4$, and nobody wants expert 2:

# %% tags=["hide-input"]
example = torch.tensor([[3, 0], [0, 1], [3, 1], [0, 3]])


def box(axes, x, y, expert, words):
    """A square in the colour of its expert."""
    look = {"color": plots.COLORS[expert], "ec": plots.CARD, "alpha": 0.55}
    axes.bar(x, 0.86, 0.9, bottom=y - 0.43, hatch=plots.HATCHES[expert], **look)
    card = {"fc": plots.CARD, "ec": "none", "pad": 1}
    axes.text(x, y, words, ha="center", va="center", bbox=card)


plan = reference.dispatch_plan(example, 4)
fig, axes = plots.figure(9, 3)
for position, expert in enumerate(example.flatten().tolist()):
    box(axes, position, 0, expert, f"expert {expert}")
    axes.text(position, -0.75, f"token {position // 2}", ha="center")
    row = plan.place.flatten()[position].item()
    axes.plot([position, row], [0.5, 1.5], color=plots.COLORS[expert], marker="", ls="-")
for row, position in enumerate(plan.order.tolist()):
    box(axes, row, 2, example.flatten()[position].item(), f"from {position}")
    axes.text(row, 2.75, f"row {row}", ha="center", va="center")
axes.set(ylim=(3.1, -1.1), xlim=(-0.6, 7.6), yticks=[0, 2], yticklabels=["choices", "sorted"])
axes.set_xticks([])
axes.grid(False)
plots.show(fig, "Eight choices of four tokens above; below, the same ones sorted by expert.")
print("order", plan.order.tolist(), " token", plan.token.tolist())
print("place", plan.place.tolist(), " ends", plan.ends.tolist())

# %% [markdown]
# ## Exercise 1 · The plan
#
# *10 minutes · difficulty ●●○○○*
#
# `indices` `[M,A]` has the experts that each token chose. Give four tensors of whole numbers, as a tuple:
#
# | result | shape | meaning |
# |---|---|---|
# | `order` | `[n]` | the flat position that each sorted row comes from |
# | `token` | `[n]` | the token of each sorted row |
# | `place` | `[M,A]` | the sorted row of each choice: the inverse of `order` |
# | `ends` | `[E]` | the row after the last one of each expert |
#
# So expert $e$ has the rows `ends[e-1]` to `ends[e] - 1`, expert 0 those from row 0 on, and an expert without rows ends where the one before does. New tensors belong on the device of `indices`, as in `torch.arange(E, device=indices.device)`. The sort must be **stable**: within an expert, rows stay in the order of their flat positions. Then sums have the same order in every run, and a training step has the same bits. (The layer is eq. 12 of the V3 report, 2412.19437; the plan only orders its sum.)


# %%
def dispatch_plan(indices, n_experts):
    """(order [n], token [n], place [M,A], ends [E]) of the choices indices [M,A]."""
    # BEGIN SOLUTION
    by_expert, order = indices.flatten().sort(stable=True)
    experts = torch.arange(n_experts, device=indices.device)
    ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, order // indices.shape[1], place.view(indices.shape), ends
    # END SOLUTION


# %%
my_plan = check(dispatch_plan)

# %% [markdown]
# Does the layer work with it? And does the processor have to wait? For that torch has a device called *meta*, whose tensors have a shape and **no values**. What runs there needs no value to go on; what must look at one fails there, and on a GPU it waits.

# %%
inputs = layer(64, 6, 32, 200)
want = reference.experts_loop(*inputs)
error = minids.numerics.relative_error(one_product(*inputs, plan=my_plan), want)
print(f"one product with your plan against the loop: {error:.0e} of the size")


def waits(function, *args):
    """What `function` says on tensors without values: nothing, or why it must look at one."""
    try:
        function(*(arg.to("meta") if hasattr(arg, "to") else arg for arg in args))
    except (RuntimeError, NotImplementedError) as problem:
        return f"WAITS: {type(problem).__name__}, {str(problem)[:60]}…"
    return "never waits"


print("the loop  ", waits(reference.experts_loop, *inputs))
print("your plan ", waits(my_plan, inputs[1], 64))

# %% [markdown]
# If your plan waits, it is right all the same. `bincount` and `unique` must look at values, for these say how long their results are; `searchsorted` on the sorted experts, or `scatter_add_` of ones, gives the same numbers without a look.
#
# ## Step two: tiles
#
# A matrix product on a GPU is cut into **tiles** (lesson 05's blocks, in two directions): a program computes, say, 64 rows by 128 columns of the result. A program multiplies by ONE matrix. So a tile of rows must never reach from one expert to the next: tiles begin anew with each expert, and the last tile of an expert may be partly empty. That part is **padding**: it is multiplied for nothing.

# %% tags=["hide-input"]
loads, block = [5, 2, 0, 6], 4
owner = [e for e, load in enumerate(loads) for _ in range(load)]


def draw_tiles(axes, tiles, title):
    """A line for each tile (its first row, where its rows end); empty squares are padding."""
    for y, (first, end) in enumerate(tiles):
        for row in range(first, first + block):
            if row < min(end, len(owner)):
                box(axes, row - first, y, owner[row], f"{row}")
            else:
                axes.bar(row - first, 0.86, 0.9, bottom=y - 0.43, fill=False, ec=plots.INK, ls=":")
        names = sorted({owner[row] for row in range(first, min(first + block, end))})
        words = f"expert{'s' * (len(names) > 1)} {', '.join(map(str, names))}"
        axes.text(block - 0.4, y, words, va="center")
    axes.set(title=title, xlim=(-0.6, block + 1.4), ylim=(4.7, -0.6), xticks=[])
    axes.set_yticks(range(len(tiles)), [f"tile {number}" for number in range(len(tiles))])
    axes.grid(False)


fig, (left, right) = plots.figure(9, 3.2, columns=2)
draw_tiles(left, [(0, 13), (4, 13), (8, 13), (12, 13)], "cut anywhere: tile 1 needs three matrices")
draw_tiles(right, [(0, 5), (4, 5), (5, 7), (7, 13), (11, 13)], "by expert: one matrix each")
plots.show(fig, "13 rows of four experts: tiles cut anywhere cross; cut by expert, none does.")

# %% [markdown]
# Numbers are sorted rows, dotted squares padding. On the left tile 1 has rows of three experts, and cannot be multiplied by one matrix. On the right five tiles do it, and 20 rows are multiplied for 13.
#
# How many tiles will there be? That depends on the router, and only the GPU knows. But the grid must be known at the launch, so one launches **the most that can be needed**. With blocks of $b$ rows and $n_e$ rows for expert $e$,
#
# $$\sum_e \Big\lceil \frac{n_e}{b} \Big\rceil \;\le\; \sum_e \frac{n_e + b - 1}{b} \;<\; \frac{n}{b} + E$$
#
# ($\lceil x \rceil$ rounds up), so $\lfloor n / b \rfloor + E$ are always enough, and $n = M A$ is known. Programs that find nothing to do stop at once.

# %% [markdown]
# ## Exercise 2 · Whose tile is it?
#
# *12 minutes · difficulty ●●●○○*
#
# Write the table from which a program learns what to do. For tile $0, 1, \dots, T - 1$, with $T = \lfloor n / b \rfloor + E$:
#
# | result | shape | meaning |
# |---|---|---|
# | `expert` | `[T]` | whose rows the tile has; $E$ (no expert) for tiles that are not needed |
# | `first` | `[T]` | its first row; $n$ for tiles that are not needed |
#
# Tiles are in the order of their rows; an expert without rows has none; those not needed come last. In the picture's example, $b = 4$ and `ends` = 5, 7, 7, 13: $T = 3 + 4 = 7$, `expert` = 0, 0, 1, 3, 3, 4, 4 and `first` = 0, 4, 5, 7, 11, 13, 13.
#
# A loop over experts passes too. Without one it is shorter, and does not wait (new tensors on the device of `ends`, please): `torch.searchsorted(a, v, right=True)` counts, for each number of `v`, how many of the ascending `a` are not larger.


# %%
def tile_table(ends, n, block):
    """(expert [T], first [T]) of the T = n // block + E tiles; ends [E], n rows in all."""
    # BEGIN SOLUTION
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - begins + block - 1) // block
    last = tiles.cumsum(0)
    number = torch.arange(n // block + len(ends), device=ends.device)
    expert = torch.searchsorted(last, number, right=True)
    begin = torch.cat([begins, begins.new_full((1,), n)])
    before = torch.cat([last - tiles, last[-1:]])
    within = torch.where(expert < len(ends), number - before[expert], 0)
    return expert, begin[expert] + within * block
    # END SOLUTION


# %%
my_table = check(tile_table)

# %%
table = my_table(torch.tensor([5, 7, 7, 13], dtype=torch.int32), 13, 4)
print("expert", table[0].tolist(), " first", table[1].tolist())
print("your table", waits(my_table, torch.tensor([5, 7, 7, 13], dtype=torch.int32), 13, 4))
for block in (16, 64, 128):
    needed = []
    for _ in range(50):
        experts = torch.rand(1024, E).topk(A).indices
        ends = my_plan(experts, E)[3]
        needed.append((my_table(ends, 1024 * A, block)[0] < E).sum().item())
    most = 1024 * A // block + E
    print(f"1024 tokens, {E} experts, top-{A}, blocks of {block}: {min(needed)} to", end=" ")
    print(f"{max(needed)} tiles needed, {most} launched, {1024 * A / block:.0f} would be full")

# %% [markdown]
# ## Exercise 3 · The grouped product
#
# *20 minutes · difficulty ●●●●○*
#
# Row $r$ of `x` `[n,K]` belongs to expert $e(r)$, whose matrix is `weights[e]` `[J,K]`:
#
# $$y_{rj} = \sum_k x_{rk}\, W_{e(r),\,jk}$$
#
# A program computes `BLOCK_M` rows of one expert by `BLOCK_J` columns. Program number `tl.program_id(0)` looks up its tile; number `tl.program_id(1)` is its block of columns. In the stub `tile`, `m`, `j`, `k` and `expert` are there, and a tile of nobody stops.
#
# | you write | |
# |---|---|
# | its rows | `first_of` has the tile's first; `ends` says where the expert's end |
# | before the loop | a block of zeros, float32 |
# | `for start in range(0, K, BLOCK_K)` | a block of x, a block of the matrix, their `tl.dot`, added |
# | after it | `tl.store` |

# %% [markdown]
# | argument | meaning |
# |---|---|
# | `x`, `weights`, `y` | pointers; no gaps: `x` row $r$ at $r K$, `y` row $r$ at $r J$, row $j$ of expert $e$'s matrix at $e J K + j K$ |
# | `ends`, `expert_of`, `first_of` | pointers to the plan's `ends`, and to both parts of your table |
# | `E`, `K`, `J` | numbers |
#
# Of Triton (lessons 05 and 06): `tl.dot(a, b)` multiplies blocks `[BLOCK_M, BLOCK_K]` and `[BLOCK_K, BLOCK_J]` and sums in float32; `a[:, None]` makes a column, `a[None, :]` a row; a load with a mask takes `other=0.0`.
#
# The matrix is needed *transposed*. No need to turn a block round: `at[:, None]` and `j[None, :]` say where each of its numbers lies.
#
# Three edges need a mask: the expert's rows, $K$, and $J$. Masks are joined by `&`, not by `and`. The check launches the tiles in reverse order, for on a GPU any order is possible, and counts bytes: a lane without a number is masked off, not sent to another one.


# %%
@triton.jit
def grouped_gemm_kernel(x, weights, y, ends, expert_of, first_of, E, K, J, BLOCK_M: tl.constexpr,
                        BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of y [n,J]: BLOCK_M rows of one expert by BLOCK_J columns."""
    tile, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    j, k = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    # BEGIN SOLUTION
    row = tl.load(first_of + tile) + m
    ours, wide = (row < tl.load(ends + expert))[:, None], (j < J)[None, :]
    matrix = weights + expert * J * K + j[None, :] * K
    total = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        rows = tl.load(x + row[:, None] * K + at[None, :], mask=ours & (at < K)[None, :], other=0.0)
        part = tl.load(matrix + at[:, None], mask=wide & (at < K)[:, None], other=0.0)
        total += tl.dot(rows, part)
    tl.store(y + row[:, None] * J + j[None, :], total, mask=ours & wide)
    # END SOLUTION


# %%
my_gemm = check(grouped_gemm_kernel)

# %% [markdown]
# Your kernel as a function of tensors, beside `reference.grouped_gemm`, which loops over slices in torch and is what the lesson falls back on where Triton is missing. The table's numbers get 64 bits, so that `expert * J * K` cannot overflow: all of V3's experts in one tensor would be more than $2^{31}$ numbers.


# %%
def my_grouped(x, weights, ends, block_m=16, block_j=64, block_k=64):
    """y [n,J] by my_gemm: x [n,K] times each expert's own matrix of weights [E,J,K]."""
    (n, K), (E, J, _) = x.shape, weights.shape
    y = torch.empty(n, J, dtype=x.dtype, device=x.device)
    table = [part.to(x.device, torch.int64) for part in my_table(ends, n, block_m)]
    grid = len(table[0]), triton.cdiv(J, block_j)
    sizes = dict(BLOCK_M=block_m, BLOCK_J=block_j, BLOCK_K=block_k)
    my_gemm[grid](x, weights, y, ends, *table, E, K, J, **sizes)
    return y


grouped = reference.grouped_gemm if missing() else my_grouped
loads = torch.tensor([40, 0, 7, 81], device=device)
ends = loads.cumsum(0).to(torch.int32)
x = torch.randn(128, 96, dtype=torch.float16, device=device)
weights = torch.randn(4, 80, 96, dtype=torch.float16, device=device)
want = reference.grouped_gemm(x.double(), weights.double(), ends)
error = minids.numerics.relative_error(grouped(x, weights, ends), want)
print(f"{loads.tolist()} rows for four experts: error {error:.0e} of the size, in float16")
if missing():
    print("(no kernel runs here: that was reference.grouped_gemm)")

# %% [markdown]
# ## Exercise 4 · The way back
#
# *14 minutes · difficulty ●●●●○*
#
# Training needs two gradients, given $dy$, the loss's gradient with respect to $y$. That of the rows is $dx_r = dy_r W_{e(r)}$: a grouped product again, with the same tiles, the matrix taken as it lies. That of an expert's matrix sums over its ROWS:
#
# $$dW_{e,jk} = \sum_{r \,\in\, e} dy_{rj}\, x_{rk}, \qquad dW_e = dY_e^{\top} X_e$$
#
# Here the tiles are tiles of the matrices, whose number is known: program numbers 0, 1 and 2 are the expert, a block of $j$ and a block of $k$. What is not known is how long the sum is. `range(begin, end, BLOCK_M)` works in a kernel with numbers that were loaded.
#
# An expert without rows has a gradient, too: zero. Memory that nobody writes holds anything, and the optimizer would take it.

# %% [markdown]
# | argument | meaning |
# |---|---|
# | `x`, `dy` | pointers to rows of `K` and of `J` numbers, without gaps |
# | `dw` | pointer to the result `[E,J,K]`: number $(e, j, k)$ at $e J K + j K + k$ |
# | `ends` | pointer; expert $e$ begins at `ends[e-1]`, expert 0 at row 0 |
#
# `tl.trans(a)` swaps rows and columns of a block; `tl.load(pointer, mask=…, other=…)` takes a single number, too. The block of rows that is not full needs a mask in both loads.


# %%
@triton.jit
def grouped_gemm_dw_kernel(x, dy, dw, ends, K, J, BLOCK_M: tl.constexpr,
                           BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of dw [E,J,K]: BLOCK_J by BLOCK_K numbers of one expert, summed over its rows."""
    expert, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    # BEGIN SOLUTION
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_M):
        row = (start + m)[:, None]
        left = tl.load(dy + row * J + j[None, :], mask=(row < end) & (j < J)[None, :], other=0.0)
        right = tl.load(x + row * K + k[None, :], mask=(row < end) & (k < K)[None, :], other=0.0)
        total += tl.dot(tl.trans(left), right)
    at = dw + expert * J * K + j[:, None] * K + k[None, :]
    tl.store(at, total, mask=(j < J)[:, None] & (k < K)[None, :])
    # END SOLUTION


# %%
my_dw = check(grouped_gemm_dw_kernel)

# %% [markdown]
# Against torch's own: `grouped_mm` knows its gradient. Expert 1 has no rows. It takes bfloat16 here, which has three bits fewer than float16, hence a larger error. (A program's number has 32 bits. For matrices as many and as large as V3's, `expert.to(tl.int64)` keeps offsets from overflowing.)


# %%
def my_weight_gradient(x, dy, ends, block_m=64, block=64):
    """dw [E,J,K] by my_dw, of x [n,K] and dy [n,J]."""
    (E,), J, K = ends.shape, dy.shape[1], x.shape[1]
    dw = torch.empty(E, J, K, dtype=x.dtype, device=x.device)
    grid = E, triton.cdiv(J, block), triton.cdiv(K, block)
    my_dw[grid](x, dy, dw, ends, K, J, BLOCK_M=block_m, BLOCK_J=block, BLOCK_K=block)
    return dw


dy = torch.randn(128, 80, dtype=torch.float16, device=device)
with torch.enable_grad():
    leaf = weights.to(torch.bfloat16).requires_grad_()
    y = grouped_mm(x.to(torch.bfloat16), leaf.transpose(1, 2), offs=ends)
    (theirs,) = torch.autograd.grad(y, leaf, dy.to(torch.bfloat16))
gradient = reference.grouped_gemm_dw if missing() else my_weight_gradient
want = reference.grouped_gemm_dw(x.double(), dy.double(), ends)
whose = "reference" if missing() else "yours"
for name, got in ((whose, gradient(x, dy, ends)), ("torch's, bfloat16", theirs)):
    error = minids.numerics.relative_error(got, want)
    print(f"{name}: error {error:.0e}; largest number of expert 1: {got[1].abs().max():.0f}")

# %% [markdown]
# ## Exercise 5 · SwiGLU inside (a stretch)
#
# *12 minutes · difficulty ●●●●○*
#
# An expert multiplies each row by two matrices, then takes $\mathrm{silu}(\text{gate}) \cdot \text{up}$, with $\mathrm{silu}(z) = z\, \sigma(z)$ and $\sigma(z) = 1 / (1 + e^{-z})$. As separate steps, $2F$ numbers a row are written, read and become $F$. Do it while the sums are still in registers, in the **epilogue** (what a kernel does between its sums and its store).
#
# (Here *gate* is a half of SwiGLU; the router's gates come later.) It is exercise 3 with two blocks of sums. `weights` `[E,2F,K]` has the gate half first: for expert $e$, row $f$ of the gate at $(2 e F + f) K$, of up at $(2 e F + F + f) K$. The block of `x` serves both, and is loaded once. `tl.sigmoid(z)` is $\sigma$.


# %%
@triton.jit
def grouped_swiglu_kernel(x, weights, act, ends, expert_of, first_of, E, K, F,
                          BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
                          BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of act [n,F]: silu(gate) * up of BLOCK_M rows of one expert by BLOCK_F columns."""
    tile, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    f, k = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    # BEGIN SOLUTION
    row = (tl.load(first_of + tile) + m)[:, None]
    ours, there = row < tl.load(ends + expert), (f < F)[None, :]
    half = weights + (2 * expert * F + f[None, :]) * K
    gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        inside = there & (at < K)[:, None]
        rows = tl.load(x + row * K + at[None, :], mask=ours & (at < K)[None, :], other=0.0)
        gate += tl.dot(rows, tl.load(half + at[:, None], mask=inside, other=0.0))
        up += tl.dot(rows, tl.load(half + F * K + at[:, None], mask=inside, other=0.0))
    tl.store(act + row * F + f[None, :], gate * tl.sigmoid(gate) * up, mask=ours & there)
    # END SOLUTION


# %%
my_swiglu = check(grouped_swiglu_kernel)

# %% [markdown]
# ## All of it together
#
# Sort, table, two kernels, and the sum of each token's rows. `place` makes that sum a plain look-up: nothing is added into a token's row from several sides at once, so no run differs from another. However many experts there are, two kernels are launched.


# %%
def my_up(x, weights, ends, block_m=16, block_f=64, block_k=64):
    """silu(gate) * up [n,F] by my_swiglu."""
    (n, K), (E, double, _) = x.shape, weights.shape
    act = torch.empty(n, double // 2, dtype=x.dtype, device=x.device)
    table = [part.to(x.device, torch.int64) for part in my_table(ends, n, block_m)]
    grid = len(table[0]), triton.cdiv(double // 2, block_f)
    sizes = dict(BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_K=block_k)
    my_swiglu[grid](x, weights, act, ends, *table, E, K, double // 2, **sizes)
    return act


def my_experts(x, indices, gates, gate_up, down):
    """reference.experts_loop by your plan, your table and your kernels."""
    order, token, place, ends = my_plan(indices, len(gate_up))
    act = my_up(x[token], gate_up, ends.to(torch.int32))
    act = act * gates.flatten()[order, None].to(act.dtype)  # g (W a) = W (g a)
    return my_grouped(act, down, ends.to(torch.int32))[place].sum(1)


inputs = [t if t.dtype == torch.int64 else t.half() for t in layer(8, 2, 48, 100, D=80)]
want = reference.experts_loop(*(t.double() if t.is_floating_point() else t for t in inputs))
got, m = count(my_experts, *inputs)
if missing():  # then torch's grouped product stands in, with your plan
    got = one_product(*(t.float() if t.is_floating_point() else t for t in inputs), plan=my_plan)
dtype = str(got.dtype).removeprefix("torch.")
print(f"error {minids.numerics.relative_error(got, want):.0e} of the size, in {dtype}")
print(m or instead() or "bytes are counted in Triton's interpreter: TRITON_INTERPRET=1")

# %% [markdown]
# ## Padding against traffic
#
# How tall should a tile be? The meter counts bytes and multiply-adds of your kernel, on 256 rows of 64 numbers for 8 experts, $J = 64$. Three ways to share the rows: *even* (32 each), *skewed* (expert $e$ gets a share that falls as $1 / (e+1)$), *one* expert takes all. Set against:
#
# - multiply-adds: those that the rows need;
# - bytes: every row, every matrix that is used, and every result once.
#
# What should you see? Taller tiles waste more multiply-adds where experts have few rows, and load each matrix less often.


# %%
def shares(n, E, skew):
    """Rows [E] of n for each expert: shares that fall as (e + 1)^-skew; "one" takes all."""
    if skew == "one":
        return torch.tensor([n] + [0] * (E - 1))
    parts = torch.arange(1, E + 1, dtype=torch.float64) ** -skew
    ends = (parts.cumsum(0) / parts.sum() * n).round().long()
    return torch.diff(ends, prepend=ends.new_zeros(1))


# %%
n, E_small, K, J = 256, 8, 64, 64
counted, tall = {}, (16, 32, 64)
x = torch.randn(n, K, dtype=torch.float16)
weights = torch.randn(E_small, J, K, dtype=torch.float16)
for name, skew in (("even", 0), ("skewed", 1), ("one", "one")):
    loads = shares(n, E_small, skew)
    ends = loads.cumsum(0).to(torch.int32)
    print(f"{name}: {loads.tolist()} rows")
    fewest = x.nbytes + (loads > 0).sum().item() * weights[0].nbytes + 2 * n * J
    for block in tall:
        _, m = count(my_grouped, x, weights, ends, block)
        needed = (my_table(ends, n, block)[0] < E_small).sum().item()
        done = needed * block * K * J, x.nbytes + needed * weights[0].nbytes + 2 * n * J
        if m:
            done = m.multiply_adds, m.bytes
        counted[name, block] = done[0] / (n * K * J), done[1] / fewest
print("counted" if m else "no kernel is counted here: by arithmetic, from your table")

# %%
fig, panels = plots.figure(9, 3.6, columns=2)
titles = ("multiply-adds / needed", "bytes / fewest")
for number, (axes, title) in enumerate(zip(panels, titles, strict=True)):
    rows = {}
    for (name, block), pair in counted.items():
        rows.setdefault(name, {})[f"BLOCK_M {block}"] = pair[number]
    plots.bars(axes, rows, form=".2f")
    axes.set(title=title)
    axes.get_legend().remove()  # one legend for both, where there is room
panels[0].legend(loc="lower right", frameon=False)
plots.show(fig, "Padding grows with the height of a tile, traffic shrinks.")

# %% [markdown]
# With 64 rows a tile, every second row of the even loads is padding: 2.00. With 16 each matrix is loaded for every 16 rows again. (A GPU's L2 cache may serve that, if the programs that share a matrix run at the same time; the meter counts what programs ask for.)
#
# And skew? *One* expert has no padding at all. *Skewed* loads have a little more than even ones, since 32 rows fill tiles of 16 and 32, and 19 or 13 do not. At most it is one unfinished tile for each expert, however large the fullest is.
#
# And SwiGLU in the epilogue? Your two kernels tell: the fused one, and exercise 3 for $2F$ columns, followed by torch's `silu(gate) * up`, which reads $2F$ numbers a row and writes $F$, at least.

# %%
ends = shares(n, E_small, 0).cumsum(0).to(torch.int32)
_, fused = count(my_up, x, weights, ends, 32, 32)
_, plain = count(my_grouped, x, weights, ends, 32, 64)
if fused and plain:
    after = 2 * n * (J + J // 2)
    print(f"separate {plain.bytes:,} + {after:,} bytes, fused {fused.bytes:,}", end=": ")
    print(f"{(plain.bytes + after) / fused.bytes:.2f} times as many")
elif missing():
    print(instead())
d, f = D, F
rows = 2 * tokens * A * torch.tensor([d + 2 * f, 3 * f, d + f])
matrices = 2 * E * 2 * f * d * torch.tensor([1, 0, 1])
flops = 2 * tokens * A * 2 * f * d, 0, 2 * tokens * A * 2 * f * d
pairs = zip(flops, (rows + matrices).tolist(), strict=True)
times = [accounting.roofline_seconds(work, nbytes) * 1e3 for work, nbytes in pairs]
print(f"V2-Lite, {tokens} tokens, on an H200 at least: product {times[0]:.2f} ms,", end=" ")
print(f"SwiGLU after it {times[1]:.2f} ms; both in one {times[2]:.2f} ms")

# %% [markdown]
# ## What the compiler makes of it
#
# Lesson 06's words: 32 threads are a **warp**; what does not fit into a thread's **registers** is **spilled** to slow memory; **wgmma** is the instruction of Hopper's tensor cores for 64 rows and more, **mma** the older one for fewer; **shared memory** (227 KiB on Hopper) holds blocks that wait to be multiplied. The next cell compiles your kernels for sm_90 (H100, H200), without a GPU.


# %%
def ask(kernel, block_m, block_j, warps, block_k=64, stages=3):
    """What to compile: one of your kernels in bfloat16."""
    from minids.lab import compiled

    names = [name for name in kernel.arg_names if not name.startswith("BLOCK")]
    kinds = {"ends": "*i32", "expert_of": "*i64", "first_of": "*i64", "E": "i32"}
    kinds |= dict.fromkeys(("K", "J", "F"), "i32")
    types = {name: kinds.get(name, "*bf16") for name in names}
    columns = "BLOCK_F" if "F" in names else "BLOCK_J"
    values = {"BLOCK_M": block_m, columns: block_j, "BLOCK_K": block_k}
    even = [name for name in ("K", "J", "F") if name in names]
    options = dict(num_warps=warps, num_stages=stages, aligned=even)
    return compiled.request(kernel, types, values, **options)


wanted = {
    "product  16 x 128, 4 warps": (my_gemm, 16, 128, 4),
    "product  64 x 128, 4 warps": (my_gemm, 64, 128, 4),
    "product 128 x 128, 4 warps": (my_gemm, 128, 128, 4),
    "product 128 x 128, 8 warps": (my_gemm, 128, 128, 8),
    "product 128 x 256, 8 warps": (my_gemm, 128, 256, 8),
    "SwiGLU  128 x  64, 8 warps": (my_swiglu, 128, 64, 8),
    "SwiGLU  128 x 128, 8 warps": (my_swiglu, 128, 128, 8),
    "dW      128 x 128, 8 warps": (my_dw, 64, 128, 8, 128),
}

# %%
if missing():
    print(instead())
else:
    from minids.lab import compiled

    print(f"{'':27s} wgmma  mma  registers  spilled B  shared KiB of 227")
    found = compiled.facts_of_all([ask(*what) for what in wanted.values()])
    for name, one in zip(wanted, found, strict=True):
        if isinstance(one, Exception):
            print(f"{name:27s} does not compile: {str(one)[:200]}")
            continue
        print(f"{name:27s} {one.wgmma:5d} {one.mma:4d} {one.registers:10d}", end="")
        print(f" {one.spills:10d}", end="")
        print(f" {one.shared / 1024:11.0f} {'' if one.fits else 'DOES NOT FIT'}")

# %% [markdown]
# How to read the solution's table:
#
# - **16 rows** are too few for wgmma: mma multiplies, below Hopper's full speed. That is the tile for decoding, where memory sets the time anyway.
# - **64 and 128 rows** use wgmma. A tile of 128 × 128 has 16,384 sums in float32: with 4 warps, 128 for each of 128 threads, and 227 of at most 255 registers are in use. 8 warps halve that.
# - **128 × 256** loads each row for twice as many columns, and needs 144 KiB of shared memory, so that one program fits on an SM (one of the GPU's processors). Of 64 × 128, with 72 KiB, three do.
# - **SwiGLU** has two blocks of sums: 128 × 128 fills all registers, and a little spills; 64 columns fit.
#
# Nothing here says which is fastest. That takes a GPU and a clock.

# %% [markdown]
# ## The measurement: skew against time
#
# Now the clock, and your prediction. 4,096 rows go to 64 experts ($D = 256$, $F = 64$), shared as before: evenly, then ever more unequally, at last all to one. Each row is a token with one choice.

# %% tags=["nbval-ignore-output"]
skews = [0, 0.5, 1, 2, "one"]
ways = {"loop": reference.experts_loop, "one product": one_product}
runs, full = {}, {skew: shares(4096, 64, skew) for skew in skews}
x, _, gates, gate_up, down = layer(64, 1, 64, 4096, D=256)
for skew, loads in full.items():
    indices = torch.arange(64).repeat_interleave(loads)[torch.randperm(4096), None]
    for name, way in ways.items():
        runs[name, skew] = functools.partial(way, x, indices, gates, gate_up, down)
seconds = machine.race(runs, 3 if fast() else 9)  # all in turns: a busy moment meets all alike
clock = {name: [1e3 * seconds[name, skew] for skew in skews] for name in ways}
for number, (skew, loads) in enumerate(full.items()):
    violation = reference.max_violation(loads.double()).item()
    print(f"skew {skew}: MaxVio {violation:4.1f}, fullest expert {loads.max():4d} rows", end="; ")
    print(", ".join(f"{name} {one[number]:.1f} ms" for name, one in clock.items()))
guess.compare(clock["one product"][-1] / clock["one product"][0])

# %% tags=["nbval-ignore-output"]
devices = [shares(4096, 64, s).view(8, 8).sum(1).max().item() / 512 for s in skews]
fig, (left, right) = plots.figure(9, 3.6, columns=2)
for name, one in clock.items():
    left.plot(range(len(skews)), one, label=name)
left.set(title="one device: ms (this CPU)", ylim=(0, None), xlim=(-0.3, 6))
plots.label_lines(left)
right.plot(range(len(skews)), devices, color=plots.COLORS[3])
right.set(title="8 devices: fullest / mean (arithmetic)", ylim=(0, 8.5))
for axes in (left, right):
    axes.set_xticks(range(len(skews)), [str(skew) for skew in skews])
    axes.set(xlabel="skew of the loads")
plots.show(fig, "Left, time on one device; right, of 8 devices the fullest has ever more.")

# %% [markdown]
# On one device the arithmetic does not change with skew, so the time changes little; all to one may even save: one expert's matrices are read instead of 64. Compare the dashed line with the right half, which rises to 8. (MaxVio, lesson 08: how far the fullest expert is above the mean, in means. A busy machine's clock scatters; run it again.)
#
# Why then balance at all? First, an expert that nobody chooses does not learn. Second, the right half: DeepSeek spreads experts over GPUs. All wait for the fullest: however many times the mean it has, so many times as long the experts' part of a step takes. That is arithmetic, from the loads; the order of experts there is by load, the worst case.

# %% [markdown]
# ## Named GPUs, by arithmetic
#
# V2-Lite's routed experts, 16,384 tokens, bfloat16, forward: both products. Backward, each product needs two more of the same size, one for its rows' gradient and one for its weights': together 1 + 2 = 3 times the time.


# %%
def expert_work(tokens):
    """(FLOPs, bytes) of both products: rows in and out once, the matrices that are used once."""
    n = tokens * A
    used = E * (1 - (1 - A / E) ** tokens)  # expected, with a fair router
    return 2 * n * 3 * D * F, 2 * (n * (D + F + F + D) + used * 3 * D * F)


for gpu in ("H200", "H100", "A100"):
    flops, nbytes = expert_work(tokens)
    arithmetic = flops / accounting.peak(gpu, torch.bfloat16)
    memory = nbytes / accounting.GPUS[gpu].bandwidth
    forward = accounting.roofline_seconds(flops, nbytes, gpu)
    print(f"{gpu}: arithmetic {1e3 * arithmetic:.2f} ms, memory {1e3 * memory:.2f} ms", end="; ")
    print(f"at least {1e3 * forward:.2f} ms, forward and backward {3e3 * forward:.2f} ms")
fig, axes = plots.figure(7.5, 4.2)
sizes = (16, 256, 16384)
plots.roofline(axes, ["H200"], {f"{t:,} tokens": expert_work(t) for t in sizes})
axes.set_ylim(bottom=axes.get_ylim()[0] / 2)
plots.show(fig, "Roofline: few tokens stand on the slope, 16,384 tokens under the roof.")

# %% [markdown]
# Hollow dots are computed, on the H200's roof. With few tokens nearly all matrices are read for few rows each: memory sets the time.
#
# How near do real kernels come? The next cell has figures of others for bfloat16 on an H100, second-hand (not measured here), at SonicMoE's shape: $D = 1536$, $F = 512$, 64 experts, top-4. (SonicMoE's paper, 2512.14080, claims 1.86 times ScatterMoE's throughput.) Your own GPU follows, if there is one, and what is recorded of this course's kernels.

# %% tags=["nbval-ignore-output"]
published = {"MegaBlocks": (190, 240), "ScatterMoE": (235, 248), "SonicMoE": (435, 440)}
for name, (forward, backward) in published.items():
    share = forward * 1e12 / accounting.peak("H100", torch.bfloat16)
    print(f"{name}: {forward} TFLOP/s forward, {backward} backward; {share:.0%} of the peak")
if triton_env.mode() == "gpu":
    ends = (torch.arange(1, E + 1, device=device) * (tokens * A // E)).to(torch.int32)
    x = torch.randn(tokens * A, D, dtype=torch.bfloat16, device=device)
    weights = torch.randn(E, 2 * F, D, dtype=torch.bfloat16, device=device)
    runs = {
        "yours": lambda: my_grouped(x, weights, ends, 128, 128, 64),
        "torch": lambda: grouped_mm(x, weights.transpose(1, 2), offs=ends),
        "loop": lambda: reference.grouped_gemm(x, weights, ends),
    }
    for name, one in machine.race(runs, 10).items():
        speed = 2 * len(x) * weights[0].numel() / one / 1e12
        print(f"{name}: {1e3 * one:.2f} ms, {speed:.0f} TFLOP/s on {torch.cuda.get_device_name()}")
else:
    print("no kernel is compiled for a GPU here, so none is timed")
machine.recorded("moe")

# %% [markdown]
# ## Explore: rows, tiles, time
#
# **Question:** 64 experts, top-6, no skew, tiles of 64 rows. From how many tokens on does the arithmetic (padding included) take longer than the memory, on an H200? Below that, does padding cost any time? And with 256 experts?
#
# The first product of a layer with V2-Lite's widths; fair shares, rounded; every expert's matrix that is used is read once. Left: the rows of each expert, and its padding. Right, by the roofline: the arithmetic of the rows (needed), that of whole tiles (padded), and the traffic (memory).
#
# <details><summary>Answer</summary>Of the sizes here from 4,096 tokens on. Below, padding costs no time: with 256 tokens most of the rows are padding, and their arithmetic hides behind the memory. 256 experts have four times the matrices to read, and a quarter of the rows each: memory sets the time up to 8,192 tokens, with tiles of 128 the padding does there.</details>


# %%
def draw(figure, tokens, experts, top_k, skew, block):
    """Left: rows and padding of each expert; right: times by the roofline of an H200."""
    loads = shares(tokens * top_k, experts, skew)
    tiles = (loads + block - 1) // block
    padded = tiles.sum().item() * block
    n, used = tokens * top_k, (loads > 0).sum().item()
    moved = 2 * (n * (D + 2 * F) + used * 2 * F * D)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.bar(range(experts), loads, width=1, color=plots.COLORS[0])
    look = {"color": plots.COLORS[1], "hatch": "///", "ec": plots.CARD, "lw": 0}
    left.bar(range(experts), tiles * block - loads, width=1, bottom=loads, **look)
    left.set(title=f"rows (blue), padding (hatched): {1 - n / padded:.0%}", xlabel="expert")
    speed = accounting.peak("H200", torch.bfloat16) / (2 * D * 2 * F)
    rows = {"needed": n / speed, "padded": padded / speed}
    rows["memory"] = moved / accounting.GPUS["H200"].bandwidth
    plots.bars(right, {name: 1e6 * one for name, one in rows.items()}, unit="µs", form=",.0f")
    right.set(title="µs at least on an H200")
    bound = "memory" if rows["memory"] > rows["padded"] else "arithmetic"
    figure.suptitle(f"{n:,} rows in {tiles.sum():,} tiles; {bound} sets the time", ha="center")


# %%
explore(
    draw,
    alt="Rows and padding of each expert, and least times of arithmetic and memory",
    size=(9, 3.8),
    tokens=[64, 256, 1024, 2048, 4096, 8192, 16384],
    experts=[64, 16, 160, 256],
    top_k=[6, 2, 8],
    skew=[0, 0.5, 1, 2],
    block=[64, 16, 32, 128, 256],
)

# %% [markdown]
# ## When does it not pay?
#
# **A few tokens**, as in decoding. Sorting and tables cost something themselves, and with one token each chosen expert has one row. There one **gathers**: copies just the matrices that were chosen, and multiplies them all at once. On a CPU, over the number of tokens:


# %%
def by_gathering(x, indices, gates, gate_up, down):
    """The experts' sum by a copy of the matrices of every choice."""
    chosen, rows = indices.flatten(), x.repeat_interleave(indices.shape[1], 0)
    gate, up = torch.bmm(rows[:, None], gate_up[chosen].mT).squeeze(1).chunk(2, -1)
    act = silu(gate) * up * gates.reshape(-1, 1)
    return torch.bmm(act[:, None], down[chosen].mT).view(*indices.shape, -1).sum(1)


# %% tags=["nbval-ignore-output"]
numbers = (1, 2, 4, 8, 16, 64)
ways = {"loop": reference.experts_loop, "one product": one_product, "gathering": by_gathering}
lines = {name: [] for name in ways}
for number in numbers:
    given = layer(64, 6, 64, number)
    runs = {name: functools.partial(way, *given) for name, way in ways.items()}
    seconds = machine.race(runs, 3 if fast() else 9)
    for name, one in seconds.items():
        lines[name].append(1e6 * one / number)
    print(f"{number:4d} tokens: fastest by {min(seconds, key=seconds.get)}")
fig, axes = plots.figure(7, 3.8)
for name, one in lines.items():
    axes.plot(numbers, one, label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens")
axes.set_title("µs a token: 64 experts, top-6, D 128, F 64 (this CPU)")
axes.set_xlim(right=2.5 * numbers[-1])
plots.label_lines(axes)
plots.show(fig, "Time a token over tokens: gathering stays, loop and one product fall.")

# %% [markdown]
# Gathering reads a matrix again for each token that chose it, so it pays for a few tokens at most.
#
# **A few large experts**: look at the first figure again. With 16 experts a loop's products are large, and its steps few; on a CPU, where nothing is launched and nothing waits, it comes near, and with fewer and larger ones still nearer.
#
# **One row an expert.** A tile is multiplied as a whole: 16 rows at least for the tensor cores, and wgmma takes 64. Where experts have one row each, 63 of 64 multiply-adds are padding. It costs no time as long as memory sets it (the explorer), but no kernel makes such a layer efficient. Only more tokens at a time do.
#
# **As one piece of many.** Sorting, copying rows and adding up move bytes as well. In V2-Lite, with 16,384 tokens:

# %%
n = tokens * A
trips = {"copy rows together": 2 * n * D, "SwiGLU apart": 3 * n * F}
trips["sum each token's rows"] = (n + tokens) * D
for name, moved in trips.items():
    least = accounting.roofline_seconds(0, 2 * moved)
    print(f"{name:22s} {1e3 * least:.2f} ms on an H200, at least")
flops, nbytes = expert_work(tokens)
print(f"{'both products':22s} {1e3 * accounting.roofline_seconds(flops, nbytes):.2f} ms")

# %% [markdown]
# So the first and the second are worth fusing. The first goes away if a kernel loads row `token[r]` of $x$ itself, where it lies: one more load, and no copy.
#
# ## In the real DeepSeek
#
# - V3 has 256 routed experts, top-8, $D = 7168$, $F = 2048$ (`n_routed_experts`, `num_experts_per_tok`, `hidden_size`, `moe_intermediate_size`), and drops no token, however skewed the loads (V3 report, 2412.19437).
# - **DeepGEMM**, its library of products, has your three shapes. Its README: for training and prefill rows lie in a *contiguous* layout, in which each expert's segment is aligned to the tile's height, so that no tile crosses. For decoding there is a *masked* layout, since the processor does not know the counts. For the gradient of weights the groups lie along the summed dimension.
# - What came after: SonicMoE (2512.14080) routes so that each expert's count becomes a multiple of the tile: "token rounding", against padding.

# %% [markdown]
# ### What minids ships
#
# `minids/moe/kernels.py` has the same three products. What it does beyond yours:
#
# - a row of $x$ is loaded where its token lies: no copy `x[token]`; the gates multiply in the epilogue, and for training it keeps gate and up;
# - there is no table: a program finds its tile from `ends` alone;
# - 8 tiles of rows by all columns come one after the other, so that what they share is found in L2;
# - SwiGLU's gradient is fused into the gradient of the second product.
#
# The sorting is on the device, too (`dispatch_kernels.py`), by counting. The next cell sets its first product beside yours, with tiles of 64 rows: the kernels move nearly the same, but minids' needs no copies in torch besides.

# %%
if missing():
    print(instead())
else:
    from minids.moe import kernels

    x, indices, gates, gate_up, _ = layer(8, 2, 64, 128)
    x, gate_up = x.half(), gate_up.half()
    plan = reference.dispatch_plan(indices, 8)

    def yours(x, token, gate_up, gates, order, ends):
        """act [n,F] from tokens, by your kernel: a copy of rows, the product, the gates."""
        return my_up(x[token], gate_up, ends, 64) * gates.flatten()[order, None].half()

    one, m = count(yours, x, plan.token, gate_up, gates, plan.order, plan.ends)
    (two, _), theirs = count(kernels.up, x, gate_up, gates, plan.order, plan.ends, False)
    print(f"both give the same: {minids.numerics.relative_error(one, two):.0e} apart")
    if m:
        copies = 2 * len(plan.token) * x[0].nbytes + 2 * one.nbytes + gates.nbytes
        print(f"yours {m.bytes:,} bytes, and about {copies:,} in torch; minids {theirs.bytes:,}")

# %% [markdown]
# ## To remember
#
# 1. Sort by expert, and the loop becomes one product; sizes are bounds, so nobody waits for the GPU.
# 2. A tile has rows of one expert: taller ones waste multiply-adds, flatter ones load each matrix more often.
# 3. Skew is cheap on one device and dear on many; few tokens are bound by memory, whatever the kernel.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** `ends` = 4, 4, 9. Which rows has expert 1?
# <details><summary>none</summary>Yes: it ends where expert 0 does.</details>
# <details><summary>row 4</summary>No: row 4 is the first of expert 2.</details>
#
# **2.** 1,000 rows, 10 experts, tiles of 64: how many tiles at most?
# <details><summary>25</summary>Yes: 15 + 10 are always enough.</details>
# <details><summary>16</summary>No: that is for one expert.</details>
#
# **3.** Expert 7 got no token. Its weights' gradient is
# <details><summary>not needed</summary>No: the optimizer reads it.</details>
# <details><summary>zero, and must be written</summary>Yes.</details>
#
# **4.** Why not one tile of 256 rows for everybody?
# <details><summary>it does not compile</summary>It may; that is not the point.</details>
# <details><summary>experts with few rows would be padding mostly</summary>Yes.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Older layers give each expert room for `1.25 n / E` rows and drop what exceeds it. Take `minids.moe.reference`, 64 experts, top-6, 1,024 tokens, scores drawn at random, to which `2 * (e < 8)` is added before the top-k. What share of the choices is dropped? (Seed 0, `torch.randn`.)
# <details><summary>Expected</summary>3,533/6,144 = 57.5%: each of the eight favoured experts has 548 rows or more, and room for 120; the others have 45 at most. V3 drops none.</details>
# 2. Let V3's router be fair, `torch.rand(M, 256).topk(8)`, and all experts be on one GPU. With tiles of 128 rows, how many tokens does a layer need so that less than 10% of the multiply-adds are padding? Derive it: how large is an expert's padding on average? Then simulate with `dispatch_plan`, every 512 tokens from 8,192 to 24,576.
# <details><summary>Expected</summary>64 rows, half a tile, if all remainders are equally likely. An expert has 8 M / 256 = M / 32 rows, and of M / 32 + 64 = 640 rows that is 64/640 = 10%: M = 18,432. The simulation is a saw about that: a fair router's loads scatter by about √(M / 32) rows (24 there), far less than a tile, so most last tiles are about equally full. At 13,312 tokens an expert has 416 rows and 89 of padding on average, 89/505 = 18%; at 15,360 it has 480 and 41, 41/521 = 8%. The share falls below a tenth first at about 11,000 tokens, and stays below from about 22,000 on.</details>

# %%
status()
