# ---
# title: A kernel for the latent cache
# promise: You write the attention kernel that reads each cached latent once, prove it by counted bytes, and cut long sequences so that a whole GPU works on one of them.
# minutes: 90
# difficulty: 4
# needs: [torch, triton]
# objectives:
#   - attend to a cache in parts, and merge the parts exactly
#   - choose how many parts keep all processors of a GPU busy
#   - write the decode kernel in Triton, with every latent loaded once and no access out of bounds
#   - read from the compiler whether a kernel uses the tensor cores, and whether it spills
#   - tell what bounds decoding with 16 and with 128 heads on named GPUs
# ---

# %%
import functools
import math
import statistics

import torch

import minids
from minids import accounting, triton_env
from minids.lab import check, explore, fast, hint, machine, plots, predict, status
from minids.lab.traffic import call
from minids.lab.tiles import instead, missing, tl, triton
from minids.mla import reference

if not missing():
    from minids.mla import kernels
print(missing() or f"Triton's kernels run here: {triton_env.mode()}")
_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # nothing is trained in this lesson
device = "cuda" if triton_env.mode() == "gpu" else "cpu"

# %% [markdown]
# ## The problem: a cache that is read again and again
#
# Absorbed decoding (lesson 04) needs each cached row $[c_s, k^R_s]$ twice: all its $C+R$ numbers are the key, its first $C$ the value. Plain torch makes three steps of it, and between two steps everything goes through memory. Letters as in lesson 04: $B$ sequences, $H$ heads, $S$ cached positions, $C$ numbers in a latent, $R$ in a rope key.
#
# | step | reads, for each position | writes |
# |---|---|---|
# | scores | the row, $C+R$ | $H$ scores |
# | scale, softmax | $H$, twice | $H$, twice |
# | sum of latents | $H$ weights, $C$ | (one result) |
#
# Nothing in the formula asks for this. The **floor** is to read each row once, $C+R$ numbers, and to keep scores where they are computed. The next cell counts and times 32,768 positions of one sequence. The scale is $192^{-1/2}$, for keys have $P + R = 128 + 64$ numbers before the absorption.

# %% tags=["nbval-ignore-output"]
B, H, C, R = 1, 16, 512, 64
S = 32768 if not fast() else 4096
latents = torch.randn(B, S, C + R, device=device)
q, scale = torch.randn(B, H, C + R, device=device), 192**-0.5


def plain(q, latents, scale, rank):
    """Attention of q [B,H,C+R] over latents [B,S,C+R] in three steps."""
    scores = torch.einsum("bhw,bsw->bhs", q, latents) * scale
    return torch.einsum("bhs,bsc->bhc", scores.softmax(-1), latents[..., :rank])


def spare():
    """One copy of the cache, which reads it once and writes it once."""
    target.copy_(latents)


target = torch.empty_like(latents)
moved, floor = 4 * B * S * ((C + R) + C + 6 * H), latents.nbytes
seconds = {"plain": machine.median_seconds(lambda: plain(q, latents, scale, C))}
seconds["copy"] = machine.median_seconds(spare)
print(f"the cache: {floor / 1e6:.0f} MB; three steps move {moved / 1e6:.0f} MB", end=", ")
print(f"{moved / floor:.2f} times the floor")
print(f"attention {1e3 * seconds['plain']:.1f} ms, one copy {1e3 * seconds['copy']:.1f} ms")

# %% [markdown]
# Is memory to blame for all of that time here? The roofline of lesson 00 answers: attention does so many FLOPs for each byte of cache, and this machine has a ridge, the FLOPs per byte from which on its arithmetic sets the time.

# %% tags=["nbval-ignore-output"]
here = machine.measure(torch.float32)
flops = 2 * B * H * S * (C + R + C)
bound = "arithmetic" if flops / floor > here.ridge else "memory"
print(f"{flops / floor:.0f} FLOP per byte of cache; ridge here {here.ridge:.0f}:", end=" ")
print(f"even at the floor {bound} would set the time on this machine")
for gpu in ("H200", "H100", "A100"):
    for heads in (16, 128):
        intensity = heads * (C + R + C) / (C + R)  # in bfloat16, 2 bytes a number
        what = "arithmetic" if intensity > accounting.ridge(gpu) else "memory"
        print(f"{gpu}, {heads:3d} heads: {intensity:4.0f} FLOP per byte", end=", ")
        print(f"ridge {accounting.ridge(gpu):3.0f}: {what}")

# %% [markdown]
# On a GPU with few heads memory sets the time: each superfluous byte costs. With DeepSeek-V3's 128 heads both are near each other, so a kernel must do both well: read once, and multiply fast.
#
# A GPU is many processors, called **SMs** (streaming multiprocessors); an H200 has 132. A Triton kernel runs as many **programs** (lesson 05); a program runs on one SM. The natural program for decoding takes one sequence and 64 heads, a **head block**, and walks along the cache.
#
# ### Your prediction
#
# One sequence, 32,768 positions, 128 heads: two programs. 130 SMs have nothing to do. If the sequence is cut into the best number of parts, each with programs of its own, and the results are merged: how many times faster will it be? (Merging is not free.) Write a number in place of `None`.

# %%
my_guess = None  # a factor, such as 10
guess = predict("One sequence on 132 SMs: cutting makes it how many times faster?", my_guess)

# %% [markdown]
# ## What a part must leave behind
#
# For one head, with scores $s_j$ and latents $c_j$, attention over a part $I$ of the positions is
#
# $$o_I = \frac{\sum_{j \in I} e^{s_j} c_j}{\sum_{j \in I} e^{s_j}}, \qquad \ell_I = \log \sum_{j \in I} e^{s_j}$$
#
# $\ell_I$ is the **log-sum-exp**: the logarithm of the part's share of the softmax's denominator. $o_I$ alone has forgotten how much the part weighs; with $\ell_I$ nothing is lost.
#
# $e^{89}$ is beyond float32. So the largest score $m$ of the part is subtracted in every exponent, which changes nothing in $o_I$, and comes back in $\ell_I = m + \log \sum e^{s_j - m}$ (online softmax, 2205.14135; lesson 05).
#
# | name | shape |
# |---|---|
# | `q` | `[B, H, C+R]`, absorbed |
# | `latents` | `[B, n, C+R]`, the part's $n$ rows |
# | $o$, $\ell$ | `[B, H, C]`, `[B, H]` |

# %% [markdown]
# ## Exercise 1 · One part
#
# *10 minutes · difficulty ●●○○○*
#
# Write both formulas: scores $s_j = (q \cdot [c_j, k^R_j]) \cdot \mathrm{scale}$ over the whole row, values from its first `rank` = $C$ numbers (V2 report, 2405.04434, section 2.1; V3 report, 2412.19437, eq. 10). The new token may see all positions, so there is no mask. Large scores must not overflow.


# %%
def decode_block(q, latents, scale, rank):
    """(out [B,H,rank], normalised; log-sum-exp [B,H]) of q [B,H,C+R] over latents [B,n,C+R]."""
    # BEGIN SOLUTION
    scores = torch.einsum("bhw,bnw->bhn", q, latents) * scale
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhn,bnc->bhc", weights / total, latents[..., :rank])
    return out, (top + torch.log(total)).squeeze(-1)
    # END SOLUTION


# %%
my_decode_block = check(decode_block)

# %% [markdown]
# ## Exercise 2 · Merge the parts
#
# *10 minutes · difficulty ●●●○○*
#
# Part $i$ holds $e^{\ell_i}$ of the whole denominator, so
#
# $$\ell = \log \sum_i e^{\ell_i}, \qquad o = \sum_i e^{\ell_i - \ell}\, o_i$$
#
# | name | shape |
# |---|---|
# | `outs` | `[N, B, H, C]`, the parts' outputs |
# | `lses` | `[N, B, H]`, the parts' log-sum-exps |
# | result | `[B, H, C]` and `[B, H]` |
#
# Sequences of a batch have different lengths, so a part of a short one may be **empty**: its $\ell_i$ is $-\infty$, and nobody wrote its output, which may hold anything, NaN and infinity too. Each sequence has one part at least that is not empty. The $\ell_i$ may be large, such as 300.


# %%
def merge_splits(outs, lses):
    """(out [B,H,C], log-sum-exp [B,H]) of all parts: outs [N,B,H,C], lses [N,B,H]."""
    # BEGIN SOLUTION
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse).unsqueeze(-1)
    return torch.where(weights == 0, 0.0, weights * outs).sum(0), lse
    # END SOLUTION


# %%
my_merge_splits = check(merge_splits)

# %% [markdown]
# ## The proof: parts make the whole
#
# `reference.attend_absorbed` of lesson 04 attends to everything at once. Below, your two functions do it in parts, between the same absorbed query and the same projection of the result. What should you see? Errors of about $10^{-15}$ in float64 and $10^{-6}$ in float32, with many parts as with one, also for parts of unequal length: the merge is exact, only rounding differs.

# %% tags=["nbval-ignore-output"]
P = V = 128


def in_parts(q_nope, q_rope, c_kv, k_rope, kv_b, scale, parts):
    """attend_absorbed for one new token, in `parts` parts of the cache."""
    query = torch.cat([reference.absorb_query(q_nope, kv_b), q_rope], -1)[:, 0]
    rows = torch.cat([c_kv, k_rope], -1).tensor_split(parts, 1)
    done = [my_decode_block(query, part, scale, c_kv.shape[-1]) for part in rows]
    out, _ = my_merge_splits(*(torch.stack(results) for results in zip(*done, strict=True)))
    return reference.project_values(out[:, None], kv_b, q_nope.shape[-1])


shapes = [(2, 1, 16, P), (2, 1, 16, R), (2, 1000, C), (2, 1000, R), (16, P + V, C)]
wide = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
wide[-1] *= C**-0.5
for dtype in (torch.float64, torch.float32):
    inputs = [tensor.to(dtype) for tensor in wide]
    whole = reference.attend_absorbed(*inputs, scale)
    for parts in (1, 2, 7, 64):
        error = minids.numerics.relative_error(in_parts(*inputs, scale, parts), whole)
        assert error < minids.numerics.TOLERANCE[dtype], "more than rounding"
        print(f"{dtype}, {parts:2d} parts: largest difference {error:.0e}")

# %% [markdown]
# ## How many parts?
#
# The programs of a launch go to the SMs in **waves**: with 133 programs on 132 SMs, 132 run, and one runs alone while the others wait (we let one program run on an SM at a time). A wave that is not full takes as long as a full one.
#
# Let a **row block** be 64 positions, and count time in row blocks. With $N$ parts of each sequence
#
# $$\mathrm{cost}(N) = \Big\lceil \frac{\mathrm{programs} \cdot N}{\mathrm{SMs}} \Big\rceil \cdot \Big( \Big\lceil \frac{\mathrm{blocks}}{N} \Big\rceil + \mathrm{extra}(N) \Big)$$
#
# $\lceil x \rceil$ rounds up; programs $= B \lceil H/64 \rceil$, one for each head block; blocks $= \lceil S/64 \rceil$, the row blocks. A single part has no extra. With more, a program spends one row block's time to begin (an assumption of this model, not a measurement), and each of its heads reads its query ($2(C+R)$ bytes), writes its result in float32 ($4C$), and the merge reads that: the next cell counts in row blocks.

# %%
per_head = 2 * (C + R) + 2 * 4 * C
block_bytes = 64 * 2 * (C + R)
print(f"a head: {per_head} bytes; a row block: {block_bytes}", end=" bytes; ")
print(f"1 / {block_bytes / per_head:.1f}")

# %% [markdown]
# ## Exercise 3 · Choose the number of parts
#
# *10 minutes · difficulty ●●●○○*
#
# Rounded, then: $\mathrm{extra}(N) = 0$ for $N = 1$, and $1 + \min(H, 64) / 14$ for more. Find the $N$ with the least cost:
#
# - a part has two row blocks at least, so $N$ is at most $\lfloor \mathrm{blocks} / 2 \rfloor$ (rounded down), and at most 128; $N = 1$ is always allowed;
# - of equally cheap ones take the smallest.
#
# `min(range(1, 10), key=cost)` gives the first number for which the function `cost` is least; `math.ceil` rounds up.


# %%
def choose_splits(batch, heads, length, sms):
    """Into how many parts to cut each sequence of `length` positions on a GPU with `sms` SMs."""
    # BEGIN SOLUTION
    programs, blocks = batch * math.ceil(heads / 64), math.ceil(length / 64)
    extra = 1 + min(heads, 64) / 14

    def cost(parts):
        waves = math.ceil(programs * parts / sms)
        return waves * (math.ceil(blocks / parts) + (extra if parts > 1 else 0))

    most = max(1, min(blocks // 2, 128))
    return min(range(1, most + 1), key=cost)
    # END SOLUTION


# %%
my_choose_splits = check(choose_splits)


# %%
def cost(parts, batch, heads, length, sms=132):
    """Time in row blocks of 64 positions, as in exercise 3."""
    waves = math.ceil(batch * math.ceil(heads / 64) * parts / sms)
    return waves * (math.ceil(length / 64 / parts) + (1 + min(heads, 64) / 14) * (parts > 1))


print("128 heads, 132 SMs: positions, sequences, parts, faster than one part")
for length in (512, 4096, 32768):
    for batch in (1, 4, 32, 128):
        parts = my_choose_splits(batch, 128, length, 132)
        gain = cost(1, batch, 128, length) / cost(parts, batch, 128, length)
        print(f"{length:6d} {batch:4d} {parts:4.0f} {gain:7.1f}")
parts = my_choose_splits(1, 128, 32768, 132)
guess.compare(cost(1, 1, 128, 32768) / cost(parts, 1, 128, 32768), how="by this count")
if not missing():
    tried = [(b, h, s, 132) for b in (1, 7, 64) for h in (16, 128) for s in range(100, 40000, 999)]
    same = sum(my_choose_splits(*one) == kernels.choose_splits(*one) for one in tried)
    print(f"minids' own choose_splits says the same in {same} of {len(tried)} cases")

# %% [markdown]
# ## Explore: the staircase
#
# **Question:** with 128 heads and one part, at which batch does one sequence more double the time? Where does that step move with 64 heads, and with 16? Does a second part help just behind it?
#
# Time is that of the roofline of an H200, each SM with its 132nd share of bandwidth and arithmetic; dotted: the floor, if all SMs were busy all the time.
#
# <details><summary>Answer</summary>From 66 to 67: 66 sequences are 132 programs of 64 heads, exactly one wave; the 67th begins a second one. With 64 heads and with 16 a sequence is one program, so the step is from 132 to 133. Two parts double the programs: just behind the step they need three waves of half the length instead of two of the whole, so they help, except for short contexts, where the extra of a part eats it up.</details>


# %%
def microseconds(parts, batch, heads, length):
    """Time of `cost` row blocks on an H200; two head blocks share what they read."""
    work = 2 * min(heads, 64) * 64 * (C + R + C), block_bytes / math.ceil(heads / 64)
    each = 132 * accounting.roofline_seconds(*work, "H200")
    return 1e6 * cost(parts, batch, heads, length) * each


def floor_of(batch, heads, length):
    """The roofline's time in µs for all of it."""
    work = 2 * batch * heads * length * (C + R + C), 2 * batch * length * (C + R)
    return 1e6 * accounting.roofline_seconds(*work, "H200")


def draw(figure, heads, length):
    axes, batches = figure.subplots(), range(1, 201)
    for parts in (1, 2, 8):
        times = [microseconds(parts, b, heads, length) for b in batches]
        axes.plot(batches, times, label=f"{parts} part{'s' * (parts > 1)}", marker="")
    floors = [floor_of(b, heads, length) for b in batches]
    axes.plot(batches, floors, label="floor", marker="", linestyle=":", color=plots.INK)
    axes.set(xlabel="sequences in the batch", ylabel="µs", xlim=(0, 200), ylim=(0, None))
    axes.set_title(f"{heads} heads, {length:,} cached positions, one layer, H200 (arithmetic)")
    axes.legend(loc="upper left", frameon=False)


# %%
explore(
    draw,
    alt="Time over the batch for 1, 2 and 8 parts: stairs above a straight floor",
    heads=[128, 64, 16],
    length=(1024, 15360, 1024),
)

# %% [markdown]
# ## The kernel
#
# One program: one sequence `b` and a head block of `BLOCK_H` heads. It holds their queries, and walks along the $n$ rows of its part in row blocks of `BLOCK_N`. A row block is loaded ONCE; as `c_kv` `[BLOCK_N, C]` and `k_rope` `[BLOCK_N, R]` it serves twice:
#
# | | product | shape |
# |---|---|---|
# | as key | `tl.dot(q_c, tl.trans(c_kv))` + the same of `q_r`, `k_rope` | `[BLOCK_H, BLOCK_N]` |
# | as value | `tl.dot(p.to(c_kv.dtype), c_kv)` | `[BLOCK_H, C]` |
#
# `tl.dot` multiplies blocks, on a GPU by its **tensor cores** (units for products of small matrices), and sums in float32; both its inputs must have one dtype, hence `.to`. It takes no size below 16, so `BLOCK_H`, `BLOCK_N`, `C` and `R` are 16 at least. `tl.trans` swaps rows and columns.
#
# From row block to row block three things are kept for each head: the largest score so far $m$, the sum of weights, and the weighted sum of latents. Where $m$ grows to $m'$, both sums shrink by $e^{m - m'}$ (2205.14135).

# %% [markdown]
# ## Exercise 4 · Exercise 1 as a kernel
#
# *20 minutes · difficulty ●●●●●*
#
# What is there: `b`, the heads `h`, columns `c` and `r`, the lanes `j` of a row block, and the queries, loaded. Row $s$ of sequence `b` begins at `latents + b * stride_b + s * stride_n`; its rope key `C` numbers later.
#
# | you write | |
# |---|---|
# | before the loop | $m = -\infty$ `[BLOCK_H]`; sums of 0, `[BLOCK_H]` and `[BLOCK_H, C]`; float32 |
# | `for start in range(0, n, BLOCK_N)` | load, scores, new maximum, shrink, add |
# | after it | `tl.store` to `out + row * C + c` and `lse + b * H + h` |

# %% [markdown]
# | of Triton | gives |
# |---|---|
# | `tl.full((a, b), v, tl.float32)` | a block `[a, b]` full of `v`; `(a,)` is the shape of one dimension |
# | `tl.zeros((a, b), tl.float32)` | the same of zeros |
# | `tl.where(mask, x, y)` | `x` where the mask is true, else `y` |
# | `tl.max(x, 1)`, `tl.sum(x, 1)` | of `[a, b]`, over the columns: `[a]` |
# | `tl.maximum(x, y)`, `tl.exp(x)`, `tl.log(x)` | number by number |
# | `x[:, None]`, `x[None, :]` | of `[a]`: a column `[a, 1]`, a row `[1, a]` |
#
# The last row block may have lanes without a position: mask the loads, with `other=0.0`, and give such scores $-\infty$. Heads beyond `H`: for `out` the mask is `ours`, `[BLOCK_H, 1]`; for `lse`, one number a head, use `h < H`. The check counts bytes: a latent that is loaded twice fails.


# %%
@triton.jit
def decode_block_kernel(q, latents, out, lse, scale, H, n, stride_b, stride_n, C: tl.constexpr,
                        R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out [B,H,C], lse [B,H], both float32, of q [B,H,C+R] over the n rows of latents [B,n,C+R]."""
    b, h = tl.program_id(1), tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, j = tl.arange(0, C)[None, :], tl.arange(0, R)[None, :], tl.arange(0, BLOCK_N)
    row, ours = (b * H + h)[:, None], (h < H)[:, None]
    q_c = tl.load(q + row * (C + R) + c, mask=ours, other=0.0)
    q_r = tl.load(q + row * (C + R) + C + r, mask=ours, other=0.0)
    # BEGIN SOLUTION
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK_H,), tl.float32), tl.zeros((BLOCK_H, C), tl.float32)
    for start in range(0, n, BLOCK_N):
        at, there = latents + b * stride_b + (start + j)[:, None] * stride_n, start + j < n
        c_kv = tl.load(at + c, mask=there[:, None], other=0.0)
        k_rope = tl.load(at + C + r, mask=there[:, None], other=0.0)
        scores = tl.dot(q_c, tl.trans(c_kv)) + tl.dot(q_r, tl.trans(k_rope))
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        p, shrink = tl.exp(scores - top[:, None]), tl.exp(m - top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(c_kv.dtype), c_kv)
        m = top
    tl.store(out + row * C + c, acc / total[:, None], mask=ours)
    tl.store(lse + b * H + h, m + tl.log(total), mask=h < H)
    # END SOLUTION


# %%
my_kernel = check(decode_block_kernel)

# %% [markdown]
# ## All of it together
#
# Your kernel for each part, your choice of how many, your merge: a whole decode. It runs beside the kernel that minids ships, `minids.mla.kernels.decode`, which cuts and merges by itself, knows sequences of unequal length, and is built on the same loop. The **traffic meter** counts each load in Triton's interpreter. What should you see? Rows loaded over the bytes of the cache: 1 where one head block does it all, and no access out of bounds.


# %%
def my_launch(q, latents, scale, rank, block_h=16, block_n=64):
    """decode_block by my_kernel: one program for each sequence and head block."""
    (B, H, width), n = q.shape, latents.shape[1]
    out, lse = torch.empty(B, H, rank, device=q.device), torch.empty(B, H, device=q.device)
    my_kernel[(math.ceil(H / block_h), B)](
        q, latents, out, lse, scale, H, n, *latents.stride()[:2], C=rank, R=width - rank,
        BLOCK_H=block_h, BLOCK_N=block_n, num_stages=2)  # fmt: skip
    return out, lse


def my_decode(q, latents, scale, rank, parts):
    """The whole attention by my_kernel (without Triton: my_decode_block) and my_merge_splits."""
    one = my_decode_block if missing() else my_launch
    done = [one(q, rows, scale, rank) for rows in latents.tensor_split(parts, 1)]
    return my_merge_splits(*(torch.stack(results) for results in zip(*done, strict=True)))[0]


# %%
small = dict(dtype=torch.float16, device=device)
query, rows = torch.randn(2, 16, 576, **small), torch.randn(2, 300, 576, **small)
lengths = torch.tensor([300, 300], device=device)
want = plain(query.double(), rows.double(), scale, C)
made = {"yours": my_decode(query, rows, scale, C, parts=3)}
if not missing():
    made["minids"] = kernels.decode(query, rows, lengths, scale, C, splits=3)[0]
for name, got in made.items():
    print(f"{name}: error {minids.numerics.relative_error(got, want):.0e} of the scale")
if missing():
    print("no kernel runs here: yours is made of exercise 1 in torch, part by part")

# %%
counted = {}
for heads in (16, 64, 128) if triton_env.mode() == "interpreter" else ():
    query = torch.randn(2, heads, 576, **small)
    _, m = call(kernels.decode, query, rows, lengths, scale, C, 2)
    others = 2 * query.nbytes + 2 * 2 * heads * 4 * (C + 2)  # queries and results, of both parts
    counted[f"minids, {heads} heads"] = m, others + 16
    if heads == 16:
        _, m = call(my_decode, query, rows, scale, C, 2)
        counted["yours, 16 heads"] = m, 2 * query.nbytes
for name, (m, others) in counted.items():
    print(f"{name}: {(m.loaded - others) / rows.nbytes:.2f} times the cache loaded", end=", ")
    print(f"{m.flops / 1e6:.0f} MFLOP, {len(m.out_of_bounds)} lines out of bounds")
if not counted:
    print(instead() or "bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1")

# %% [markdown]
# Why 27 MFLOP of yours against 22? Padding is multiplied too. minids cuts 300 rows between row blocks, 3 + 2 of 64: 320 rows. `my_decode` cuts 150 + 150, which take 3 row blocks each: 384.
#
# A head block in minids' kernel has up to 64 heads for a GPU whose tensor cores want that. With 128 heads two head blocks load the same rows. On a GPU these two programs of a sequence run side by side, and the second finds the rows in the **L2 cache**, fast memory that all SMs share. The meter counts what programs ask for, and knows no caches.

# %% [markdown]
# ## What the compiler makes of it
#
# Some words. 32 threads that run in step are a **warp**; a program has 4 or 8. Each thread has at most 255 **registers**, for the numbers at hand; what does not fit **spills** to slow memory. **Shared memory** is the fast memory of one SM, 227 KiB on Hopper (H100, H200), where rows wait to be multiplied. **wgmma** is Hopper's instruction for a product of at least 64 rows by four warps together; the older **mma** takes smaller products, and cannot reach Hopper's full speed.
#
# The next cell compiles minids' kernel for Hopper, called sm_90. No GPU is needed for that. *wgmma* and *mma* in its table count such instructions in the code, not how often they run.


# %%
def variant(arch=90, BLOCK_H=64, BLOCK_N=64, warps=8, SWAP=False):
    """What to compile: minids' decode kernel in bfloat16 at V3's widths."""
    pointers = {"q": "*bf16", "latents": "*bf16", "lengths": "*i32", "out": "*fp32", "lse": "*fp32"}
    types = pointers | {"scale": "fp32"}
    types |= dict.fromkeys(("rows", "heads", "S", "stride_b", "splits"), "i32")
    sizes = dict(BLOCK_H=BLOCK_H, BLOCK_N=BLOCK_N, SWAP=SWAP, BLOCK_C=512, BLOCK_R=64)
    values = dict(C=C, R=R, WIDE=False, **sizes)
    options = dict(arch=arch, num_warps=warps, num_stages=2, aligned=("rows", "heads", "stride_b"))
    return compiled.request(kernels.decode_kernel, types, values, **options)


if not missing():
    from minids.lab import compiled

    wanted = {
        "16 heads, 4 warps": variant(BLOCK_H=16, warps=4),
        "16 heads, 4 warps, swapped": variant(BLOCK_H=16, warps=4, SWAP=True),
        "64 heads, 4 warps": variant(warps=4),
        "64 heads, 8 warps": variant(),
        "64 heads, 8 warps, sm_80": variant(80),
        "64 heads, 8 warps, sm_89": variant(89),
    }
    facts = dict(zip(wanted, compiled.facts_of_all(wanted.values()), strict=True))

# %%
print(instead() or f"{'':27s} wgmma  mma  registers  spilled B  shared KiB  of")
for name, one in facts.items() if not missing() else ():
    limit = compiled.SHARED_KIB[one.arch]
    print(f"{name:27s} {one.wgmma:5d} {one.mma:4d} {one.registers:10d} {one.spills:10d}", end="")
    print(f" {one.shared / 1024:11.0f} {limit:4d}{'' if one.fits else '  DOES NOT FIT'}")

# %% [markdown]
# How to read it:
#
# - **16 heads** in a head block: a product of 16 rows is too small for wgmma. *Swapped* turns the products round, so that 64 positions are the rows and 16 heads the columns. minids does that for up to 32 heads on Hopper.
# - **64 heads, 4 warps**: the sums, 64 × 512 numbers in float32, are 256 for each of 128 threads: more than a thread's registers, and everything else needs some too. It spills, in the innermost loop.
# - **8 warps**: 128 of them for each of 256 threads. On sm_90 that fits: nothing spills.
# - **sm_80** (A100) and **sm_89** (RTX 40) have mma and a smaller shared memory, and there 8 warps spill. A program that does not fit is not slow: it does not start. There minids takes smaller blocks.
#
# And your own kernel? The next cell compiles it with 16 and with 64 heads.

# %%
if missing():
    print(instead())
else:
    names = {"q": "*bf16", "latents": "*bf16", "out": "*fp32", "lse": "*fp32", "scale": "fp32"}
    types = names | dict.fromkeys(("H", "n", "stride_b", "stride_n"), "i32")
    for block_h, warps in ((16, 4), (64, 4), (64, 8)):
        values = dict(C=C, R=R, BLOCK_H=block_h, BLOCK_N=64)
        options = dict(num_warps=warps, num_stages=2, aligned=("stride_b", "stride_n"))
        try:
            one = compiled.facts(my_kernel, types, values, **options)
            print(f"BLOCK_H {block_h}, {warps} warps: {one.registers} registers,", end=" ")
            print(f"{one.spills} B spilled, {one.shared / 1024:.0f} KiB shared", end=", ")
            print(f"{one.wgmma} wgmma, {one.mma} mma")
        except compiled.DoesNotCompile as error:
            print(f"BLOCK_H {block_h}:", str(error)[:300])

# %% [markdown]
# ## The measurement
#
# First this machine: attention in three steps against your parts in torch. A part's rows and scores may stay in the processor's own cache between the steps, so parts can pay without a second processor; each also costs calls. Which wins here, and at how many parts, the clock says. The share is bytes of the cache over time, against the bandwidth of a copy.

# %% tags=["nbval-ignore-output"]


def parts_in_torch(parts):
    """The first cell's attention in parts."""
    done = [my_decode_block(q, rows, scale, C) for rows in latents.tensor_split(parts, 1)]
    return my_merge_splits(*(torch.stack(results) for results in zip(*done, strict=True)))


runs = {"three steps": lambda: plain(q, latents, scale, C)}
for parts in (1, 8, 32, 128):
    runs[f"{parts} part{'s' * (parts > 1)}"] = functools.partial(parts_in_torch, parts)
rounds = range(7)  # in turns, for machines drift
times = [{name: machine.median_seconds(run, 1) for name, run in runs.items()} for _ in rounds]
clock = {name: statistics.median(one[name] for one in times) for name in runs}
for name, one in clock.items():
    share = floor / one / here.bandwidth
    print(f"{name:12s} {1e3 * one:6.1f} ms, {share:4.0%} of this machine's bandwidth")
fastest = min(clock, key=clock.get)
gain = clock["three steps"] / clock[fastest]
words = f"{fastest}, {gain:.2f} times as fast as three steps" if gain > 1 else "the three steps"
print("fastest here:", words)

# %% [markdown]
# Then a GPU, if there is one, with the kernel compiled; and what is recorded of an H200, beside public kernels.

# %% tags=["nbval-ignore-output"]
if triton_env.mode() == "gpu":
    for heads in (16, 128):
        shape = dict(dtype=torch.bfloat16, device=device)
        query, rows = torch.randn(128, heads, 576, **shape), torch.randn(128, 4096, 576, **shape)
        lengths = torch.full((128,), 4096, device=device)
        inputs = query, rows, lengths, scale, C
        one = machine.median_seconds(lambda inputs=inputs: kernels.decode(*inputs), 20)
        speed = 2 * 128 * heads * 4096 * (C + R + C) / one
        print(f"{heads} heads: {1e6 * one:.0f} µs, {rows.nbytes / one / 1e9:.0f} GB/s", end=", ")
        print(f"{speed / 1e12:.0f} TFLOP/s on {torch.cuda.get_device_name()}")
else:
    print("no kernel is compiled for a GPU here, so none is timed")
machine.recorded("mla")

# %% [markdown]
# ## The roofline, by arithmetic
#
# 128 sequences of 4,096 positions, one layer, bfloat16. The bytes are those of the cache, read once, with queries and results. What bounds it: below the ridge memory, above it arithmetic. Each row, $2(C+R)$ bytes, meets $H$ queries with $2H(2C+R)$ FLOPs, so the FLOPs per byte are nearly $H(2C+R)/(C+R)$: the number of heads decides.

# %%
work = {}
for heads in (16, 128):
    nbytes = 2 * 128 * (4096 * (C + R) + heads * (C + R + C))
    work[f"{heads} heads"] = 2 * 128 * heads * 4096 * (C + R + C), nbytes
for gpu in ("H200", "H100", "A100"):
    for name, (flops, nbytes) in work.items():
        bound = "arithmetic" if flops / nbytes > accounting.ridge(gpu) else "memory"
        least = accounting.roofline_seconds(flops, nbytes, gpu)
        print(f"{gpu}, {name:9s} {flops / nbytes:4.0f} FLOP per byte, at least", end=" ")
        print(f"{1e6 * least:5.0f} µs, {flops / least / 1e12:4.0f} TFLOP/s: {bound}")
fig, axes = plots.figure(7.5, 4.2)
plots.roofline(axes, ["H200", "A100"], work)
axes.set_ylim(bottom=axes.get_ylim()[0] / 2)  # room for the names below the dots
plots.show(fig, "Rooflines of H200 and A100; 16 heads on the slope, 128 heads near the ridges.")

# %% [markdown]
# Hollow dots are computed, on the H200's roof. (An H100 multiplies as fast as an H200 and reads more slowly, so its ridge lies further right.) 16 heads stand on the slope: a good kernel is one that reads at full bandwidth, and the tensor cores may idle. 128 heads stand near the corner: on a GPU with more bandwidth for its arithmetic they are compute-bound, and on one with less memory-bound. There wgmma decides, and spills hurt.

# %% [markdown]
# ## When does it not pay?
#
# **Short contexts with few sequences:** few row blocks allow few parts, for each has two at least. Each part still costs its extra, which is as long as 5.6 row blocks with 64 heads in a head block. So 512 positions allow 4 parts, which gain almost nothing. The next cell shows it. **Large batches** fill the GPU by themselves. And a kernel of this kind needs room: blocks that do not fit into a GPU's shared memory must be smaller, and then each row is read for fewer heads, or fewer rows are on their way at once.

# %%
for batch in (1, 66, 128):
    for length in (128, 256, 512, 1024, 8192):
        parts = my_choose_splits(batch, 128, length, 132)
        most = max(1, min(math.ceil(length / 64) // 2, 128))
        gain = cost(1, batch, 128, length) / cost(parts, batch, 128, length)
        print(f"{batch:3d} sequences of {length:4d}: {parts:3.0f} parts", end=" ")
        print(f"of {most:2d} allowed, {gain:4.1f} times faster")
for name, one in facts.items() if not missing() else ():
    if not one.fits:
        print(f"{name}: {one.shared / 1024:.0f} KiB wanted, {compiled.SHARED_KIB[one.arch]} there")

# %% [markdown]
# ## In the real DeepSeek
#
# - V3 has 128 heads, $C = 512$, $R = 64$ (`num_attention_heads`, `kv_lora_rank`, `qk_rope_head_dim`), in 61 layers: each token's step runs such a kernel in every one.
# - **FlashMLA** is DeepSeek's own kernel: split-KV with log-sum-exps, as yours, and pages of 64 rows, so that sequences share memory. Its README reports 3,000 GB/s where memory-bound, and 580, later 660 TFLOP/s where compute-bound, on an H800. The next cell sets that against the GPU's peaks.
# - minids keeps a sequence's rows in one piece. A server that packs many sequences of unknown length adds a table of pages to the addresses, and nothing else changes.
# - With two new tokens a step (multi-token prediction) twice as many rows of queries meet each latent: more FLOPs per byte, for the same bytes.

# %%
h800, peak = accounting.GPUS["H800"], accounting.peak("H800", torch.bfloat16)
print(f"3000 GB/s are {3000e9 / h800.bandwidth:.0%} of an H800's bandwidth", end="; ")
shares = [f"{reported} TFLOP/s {reported * 1e12 / peak:.0%}" for reported in (580, 660)]
print(", ".join(shares), "of its arithmetic")

# %% [markdown]
# ## To remember
#
# 1. A latent is key and value: load it once, use it twice, and nothing but results goes back to memory.
# 2. An output with its log-sum-exp is all that a part must leave; parts merge exactly, in any number.
# 3. The heads decide what bounds decoding; the waves decide how many parts.
#
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Two parts have outputs 1 and 3, and log-sum-exps 0 and $\log 3$. The merge?
# <details><summary>2</summary>No: that is the mean, as if both weighed the same.</details>
# <details><summary>2.5</summary>Yes: the weights are 1/4 and 3/4.</details>
#
# **2.** 70 sequences, 128 heads, 132 SMs, one part: how many waves?
# <details><summary>one</summary>No: these are 140 programs.</details>
# <details><summary>two, and the second nearly empty</summary>Yes: 8 programs run in it.</details>
#
# **3.** Where the maximum grows, what shrinks?
# <details><summary>the output only</summary>No: then the weights no longer sum to 1.</details>
# <details><summary>the sum of weights and the weighted sum</summary>Yes, by the same factor.</details>
#
# **4.** Why does 64 heads with 4 warps spill?
# <details><summary>too little shared memory</summary>No: spills are for lack of registers.</details>
# <details><summary>its sums alone need more registers than a thread has</summary>Yes: 256 for each thread.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. A thousand users share a system prompt of 2,000 tokens; each has 500 of their own. Attend to the shared rows once for all users (their heads are the heads of ONE sequence, so to speak), to the own rows for each, and merge: `decode_block` and `merge_splits` are in `minids.mla.reference`. Show on random tensors that it equals attention over both together; take ten users, for the rows of a thousand, in float64 at V3's width, would fill 11.5 GB. How many times fewer rows are read?
# <details><summary>Expected</summary>Equal to about 1e-15 in float64. 1000 · 2500 rows become 2000 + 1000 · 500: 2,500,000/502,000 = 4.98 times fewer.</details>
# 2. With `minids.accounting`, V3's config and an H200: how many positions of cache would fill its memory, and how many tokens a second can one sequence of 131,072 positions get at most, if reading the cache is all that takes time?
# <details><summary>Expected</summary>70,272 bytes a position over 61 layers: 2.0 million positions fill 141 GB. One token reads 9.2 GB: 1.9 ms, 521 tokens a second at most.</details>

# %%
status()
