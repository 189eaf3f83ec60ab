# ---
# title: Numbers in 8 bits
# promise: You read and round 8-bit floating-point numbers by hand, give them scales as DeepSeek-V3 does, and measure which tensors need which scale, and which need none of it.
# minutes: 80
# difficulty: 2
# needs: [torch]
# objectives:
#   - decode the 256 codes of E4M3, and round any number to them
#   - say what a scale does, and why it may be far too large but never too small
#   - quantise in 1 × 128 tiles and 128 × 128 blocks, with scales of one byte
#   - find how large an outlier must be to ruin a tensor, with one scale and with tiles
#   - measure the error of weights, activations and gradients for four ways to share a scale, and count the bytes
# ---

# %%
import functools
import itertools
import math

import torch
import torch.nn.functional as F

import minids
from minids import accounting
from minids.fp8 import reference
from minids.lab import check, explore, fast, hint, load_text, machine
from minids.lab import plots, predict, status, train_live

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem: numbers that vanish
#
# So far a number took 4 bytes (float32) or 2 (bfloat16). DeepSeek-V3 was trained with most of its matrix products in **FP8**: floating-point numbers of one byte, which is 8 bits (binary digits, 0 or 1). A byte has 256 patterns, so there are at most 256 different numbers. What is gained?

# %%
fp8, gpu = torch.float8_e4m3fn, accounting.GPUS["H200"]
print(f"bytes for each number: bfloat16 {torch.bfloat16.itemsize}, FP8 {fp8.itemsize}")
for dtype in (torch.bfloat16, fp8):
    print(f"H200, {dtype}: {gpu.flops[dtype] / 1e12:,.0f} TFLOP/s (published)")

# %% [markdown]
# Half the memory and traffic, and by NVIDIA's datasheets twice the speed of products. And the price? To see it on real numbers we need a model: two layers, $D = 256$ columns, trained for some seconds on the text of lesson 01.

# %% tags=["nbval-ignore-output"]
STEPS = 3 if fast() else 24
if fast():
    print("MINIDS_FAST is set: 3 steps instead of 24, so the figures below mean little")
text = load_text(vocab_size=2048)
sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
cfg = minids.ModelConfig.preset(
    "tiny", attention="mha", num_hidden_layers=2, n_routed_experts=0, **sizes
)


def short(model, inputs, targets):
    """The loss of 8 pieces of 128 tokens of each batch: a quarter of the work."""
    return model.loss(inputs[:8, :128], targets[:8, :128])


torch.manual_seed(0)
model = minids.Transformer(cfg)
run = train_live(model, text, steps=STEPS, loss=short, live=False)
print(f"{accounting.parameters(cfg).total:,} parameters, {STEPS} steps: ", end="")
print(f"{run.rows[-1][2]:.2f} bits per byte of training text")

# %% [markdown]
# The next cell runs 2,048 tokens through the model and back, and keeps five tensors that go into or come out of the products of its last layer.
#
# | name | what | shape |
# |---|---|---|
# | activations | input of the feed-forward, after its norm | `[2048, 256]` |
# | SwiGLU | $\mathrm{silu}(\mathrm{gate}) \cdot \mathrm{up}$, input of `down_proj` | `[2048, 768]` |
# | weights | of `down_proj` | `[256, 768]` |
# | gradients | of the loss with respect to the feed-forward's result | `[2048, 256]` |
# | logit gradients | of the loss with respect to the logits, of the first 512 tokens | `[512, 2048]` |

# %%
mlp, seen = model.layers[-1].mlp, {}
hook = mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
inputs, targets = minids.data.batch(text.tokens, 999, 0, 16, 128)
logits = model(inputs)
hook.remove()
loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
dy, dlogits = torch.autograd.grad(loss, [seen["y"], logits])
_ = torch.set_grad_enabled(False)  # from here on nothing is trained
x = seen["x"]
tensors = {
    "activations": x,
    "SwiGLU": F.silu(mlp.gate_proj(x)) * mlp.up_proj(x),
    "weights": mlp.down_proj.weight,
    "gradients": dy,
    "logit gradients": dlogits[:4],
}
tensors = {name: t.detach().float().flatten(0, -2) for name, t in tensors.items()}
for name, t in tensors.items():
    root = t.square().mean().sqrt()
    print(f"{name:15} {list(t.shape)!s:13} typical {root:.1e}, largest {t.abs().max():.1e}")

# %% [markdown]
# (*Typical* is the **root mean square**: the square root of the mean of all squares.)
#
# What is lost in FP8? Let $\hat x$ be what comes back. The **signal-to-noise ratio** (SNR) compares the sum of the squares (the **energy**) of the numbers with that of the errors, in decibels (dB):
#
# $$\mathrm{SNR} = 10 \log_{10} \frac{\sum x^2}{\sum (x - \hat x)^2}$$
#
# At 0 dB the error is as large as the numbers: if all come back as 0, that is 0 dB. At 20 dB it has a hundredth of their energy. 6 dB more are errors half as large, with a quarter of the energy: one more bit.
#
# First as they are; then each tensor divided by a **scale** before and multiplied by it afterwards, chosen so that the largest magnitude, called the **amax**, becomes 448, the largest number of this format.


# %%
def snr(x, back):
    """10 log10 of the energy of x over that of the error, in dB."""
    return (10 * torch.log10(x.square().sum() / (x - back).square().sum())).item()


def plain(x):
    return x.to(fp8).float()  # torch rounds


def one_scale(x):
    scale = x.abs().max() / 448
    return plain(x / scale) * scale


for name, t in tensors.items():
    gone = ((plain(t) == 0) & (t != 0)).float().mean()
    print(f"{name:15} as it is {snr(t, plain(t)):4.1f} dB, {gone:4.0%} became 0;", end=" ")
    print(f"with a scale {snr(t, one_scale(t)):4.1f} dB")

# %% [markdown]
# Without a scale the gradients are simply gone. With one scale for each tensor all is well: the error has a tiny share of the energy.
#
# Until an **outlier** comes: one number that is far larger than the others. In large language models single activations have been seen that were 100,000 times as large as others ("massive activations", 2402.17762). Here one of half a million numbers is made 100,000 times as large as the typical one, then a million times. What happens to the OTHERS?

# %%
for times in (1, 1e5, 1e6):
    t = tensors["activations"].clone()
    t[0, 0] = times * t.square().mean().sqrt()
    others = one_scale(t).flatten()[1:]
    gone = (others == 0).float().mean()
    print(f"outlier {times:9,.0f} × typical:", end=" ")
    print(f"others {snr(t.flatten()[1:], others):4.1f} dB, {gone:4.0%} of them are 0")

# %% [markdown]
# One number in half a million takes the scale for itself, and nearly all others vanish.
#
# ### Your prediction
#
# Somewhere between 1 and 100,000 the damage begins. How many times as large as the typical number may one outlier be, with one scale for the whole tensor, until the others lose 3 dB, which is twice the energy of the error? Write a number in place of `None`. You find out further down, also for 8-bit whole numbers (int8).

# %%
my_guess = None  # a number of times, such as 5
guess = predict("From which outlier on do the others lose 3 dB in FP8?", my_guess, "× typical")

# %% [markdown]
# ## A number in 8 bits
#
# Write 13 as a number from 1 to 2 times a power of 2: $13 = 1.625 \cdot 2^3$. A **floating-point number** stores just that:
#
# - the **sign**, one bit: 0 for plus, 1 for minus;
# - the **exponent**, here 3. It is stored as a number $e$ without sign, which is larger by a constant, the **bias**, so that negative exponents fit too: with a bias of 7, $e = 10$;
# - the **mantissa**: what comes after the leading 1, here 0.625. In three bits it is counted in eighths: $m = 5$.
#
# **E4M3** has 4 bits of exponent and 3 of mantissa; E5M2 has 5 and 2, and a bias of 15 (2209.05433).

# %%
EXPONENT_BITS = {"E4M3": 4, "E5M2": 5}


def draw_byte(axes, code, format="E4M3"):
    """The eight bits of a code, and the numbers that they mean."""
    wide = EXPONENT_BITS[format]
    fields = {"sign": (0, 1), "exponent e": (1, 1 + wide), "mantissa m": (1 + wide, 8)}
    bits = f"{code:08b}"
    for color, (name, (first, end)) in zip(plots.COLORS, fields.items(), strict=False):
        axes.bar(range(first, end), 1, 0.9, color=color, alpha=0.3)
        means = f"{name} = {int(bits[first:end], 2)}"
        axes.text((first + end - 1) / 2, -0.12, means, ha="center", va="top")
    for place, bit in enumerate(bits):
        axes.text(place, 0.5, bit, ha="center", va="center", fontsize=16)
    axes.set(xlim=(-0.9, 7.9), ylim=(-0.55, 1.05))
    axes.set_axis_off()


fig, axes = plots.figure(6, 1.4)
draw_byte(axes, 0b01010101)
plots.show(fig, "The byte 0 1010 101: sign 0, exponent field 10, mantissa 5, which is 13.")

# %% [markdown]
# Two things are special.
#
# - **$e = 0$.** With a leading 1 everywhere, nothing could be 0. So for $e = 0$ there is none: these are the **subnormal** numbers, eighths of $2^{-6}$, from 0 up to where the normal ones begin.
# - **$e = 15$, $m = 7$** is **NaN** ("not a number"), the mark of a computation that failed, such as 0/0. There is no infinity. So 448 is the largest number: $1.75 \cdot 2^8$. (E5M2 keeps all of its largest $e$, 31, for infinity ($m = 0$) and NaN: it ends at $1.75 \cdot 2^{15} = 57344$.)
#
# $$
# \mathrm{value} = \begin{cases} (-1)^{s} \cdot 2^{\,e-7} \cdot (1 + m/8) & e > 0 \\ (-1)^{s} \cdot 2^{-6} \cdot m/8 & e = 0 \end{cases}
# $$

# %% [markdown]
# ## Exercise 1 · Read a code
#
# *8 minutes · difficulty ●●○○○*
#
# Give the values of all bytes of a tensor by the formula above (2209.05433, table 1).
#
# | name | |
# |---|---|
# | `codes` | any shape, `torch.uint8`: whole numbers from 0 to 255 |
# | result | the same shape, float32 |
#
# `n >> 3` drops the last 3 bits of a whole number, `n & 7` keeps only the last 3 ($7$ is `0b111`); `n >> 3 & 15` does one after the other. uint8 knows no negative numbers: begin with `codes.int()`. `torch.where(condition, a, b)` takes from `a` where the condition holds, else from `b`; `torch.nan` is NaN.


# %%
def decode_e4m3(codes):
    """The value of each byte of codes (uint8, any shape) in E4M3; float32."""
    # BEGIN SOLUTION
    codes = codes.int()
    sign, e, m = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    value = torch.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))
    return torch.where((e == 15) & (m == 7), torch.nan, sign * value)
    # END SOLUTION


# %%
my_decode = check(decode_e4m3)

# %% [markdown]
# All 256 of them, next to what torch makes of the same bytes:

# %%
codes = torch.arange(256, dtype=torch.uint8)
values = {"E4M3": my_decode(codes), "E5M2": codes.view(torch.float8_e5m2).float()}
same = torch.equal(values["E4M3"].nan_to_num(), codes.view(fp8).float().nan_to_num())
print(f"torch reads the codes in the same way: {same}")
for format, v in values.items():
    finite = v[:128][v[:128].isfinite()]  # without the negative half
    small = (finite < 1).sum() / len(finite)
    print(f"{format}: {2 * len(finite) - 1} numbers, the largest {finite.max():,.0f};", end=" ")
    print(f"smallest above 0: {finite[1]:.2g}; {small:.0%} of the positive lie below 1")

# %% [markdown]
# ## Explore: gaps
#
# **Question:** the gap from a number to the next doubles now and then. At which codes does it, and for how many codes at the lower end does it stay the same? What does E5M2 have more of, and what less?


# %%
def draw(figure, code, format):
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 2.2])
    draw_byte(top, code, format)
    half = values[format][:128]
    half = half[half.isfinite()]
    bottom.plot(range(1, len(half)), half[1:], marker="", label="value")
    stairs = {"marker": "", "drawstyle": "steps-post", "label": "gap to next"}
    bottom.plot(range(len(half) - 1), half.diff(), **stairs)
    value, place, sign = values[format][code].item(), code & 127, -1 if code > 127 else 1
    near = [f"{sign * half[n]:.5g}" for n in (place - 1, place + 1) if 0 <= n < len(half)]
    words = f"code {code}: {value:.6g}; beside it: {', '.join(near)}"
    if place < len(half):
        bottom.plot([place], [max(abs(value), half[1] / 2)], "o", color=plots.INK, label="_")
    if place < len(half) - 1:
        gap = (half[place + 1] - half[place]).item()
        bottom.plot([place], [gap], "s", color=plots.INK, label="_")
        words += f"; gap to the next: {gap:.3g}"
    ends = (half[1] / 4, half[-1] * 4)
    bottom.set(yscale="log", xlabel="code without its sign bit", ylim=ends, xlim=(-2, 128))
    top.set_title(words)
    plots.label_lines(bottom)


# %%
alt = "The bits of one code, and over all codes the value and the gap to the next"
gaps = explore(draw, alt, (7.5, 4.6), code=(0, 255), format=["E4M3", "E5M2"])
if gaps is not None:  # the controls are there
    gaps.children[0].value = 0b01010101
gaps

# %% [markdown]
# <details><summary>Answer</summary>In E4M3 it doubles at codes 16, 24, 32 and so on, each time that e grows and m starts again from 0. The codes 0 to 15 all have the gap 2^-9: the subnormals (0 to 7) and those with e = 1 (8 to 15). In E5M2 it doubles after every 4 codes: more powers of 2, so a far wider range, but only 4 numbers for each instead of 8. (A dot at the lower edge stands for 0, which has no place on this axis.)</details>
#
# ## From any number to one of these
#
# To **quantise** is to replace a number by the nearest that the format has. Between $2^k$ and $2^{k+1}$ the numbers of E4M3 lie $2^{k-3}$ apart, the **step**. Below $2^{-6}$ the step stays $2^{-9}$.
#
# Exactly halfway, as 17 is between 16 and 18, both are equally near. Always taking the larger would shift sums upwards. The rule is **to even**: take the one whose mantissa $m$ is even, here 16 ($m = 0$), not 18 ($m = 1$). `torch.round` does the same with whole numbers: 2.5 becomes 2, and 3.5 becomes 4.

# %% [markdown]
# ## Exercise 2 · Round
#
# *12 minutes · difficulty ●●●○○*
#
# Write the rounding. For each number:
#
# - the nearest of E4M3, ties to even;
# - beyond 448 it **saturates**: 448, or -448;
# - NaN and the infinities give NaN, so that a broken computation stays visible.
#
# | name | |
# |---|---|
# | `x` | any shape, float32 |
# | result | the same shape and dtype |
#
# `torch.frexp(x)` gives `.mantissa` and `.exponent` with $x = \mathrm{mantissa} \cdot 2^{\mathrm{exponent}}$, the mantissa from 0.5 to 1. For 13 the exponent is 4, though 13 lies between $2^3$ and $2^4$: its leading bit is worth $2^3$. `2.0 ** n` of a tensor `n`, `.clamp(low, high)`, `.clamp_min(low)` and `.isfinite()` may help. (torch's own cast saturates since version 2.12, infinities too; before, it gave NaN beyond 464: pytorch, pull request 178817.)


# %%
def round_to_e4m3(x):
    """The nearest number of E4M3 for each of x, in x's dtype; NaN for NaN and infinities."""
    # BEGIN SOLUTION
    exponent = (torch.frexp(x).exponent - 1).clamp_min(-6)
    step = torch.ldexp(torch.ones_like(x), exponent - 3)
    nearest = torch.round(x / step) * step
    return torch.where(x.isfinite(), nearest.clamp(-448, 448), torch.nan)
    # END SOLUTION


# %%
my_round = check(round_to_e4m3)

# %% [markdown]
# How large can an error be? Half a step, and a step is an eighth of $2^k$: at most 1/16 of a normal number. Below $2^{-6}$ it can be all of it. Here your function rounds numbers from $2^{-12}$ to $2^{9}$.

# %%
x = torch.logspace(-12, 9.2, 4000, base=2)
fig, axes = plots.figure(7.5, 3)
axes.plot(x, (my_round(x) - x).abs() / x, marker="", linewidth=0.8)
axes.axhline(1 / 16, color=plots.INK, linestyle=":")
axes.text(2.0**-12, 1 / 16, " 1/16", va="bottom")
axes.axvspan(2.0**-12, 2.0**-6, color=plots.COLORS[1], alpha=0.15)
axes.axvspan(448, 2**9.2, color=plots.COLORS[3], alpha=0.25)
axes.set_xscale("log", base=2)
axes.set(xlabel="number", ylabel="error / number", ylim=(0, 0.3), xlim=(2.0**-12, 2**9.2))
axes.text(2.0**-11.8, 0.25, "subnormal,\nor 0", va="center")
axes.text(2.0**1, 0.27, "normal", ha="center")
axes.annotate("too large", (448, 0.2), xytext=(-6, 0), textcoords="offset points", ha="right")
plots.show(fig, "Relative error of rounding: at most 1/16 between 2^-6 and 448, larger outside.")

# %% [markdown]
# ## What a scale does
#
# The scale moves a tensor along this axis: $x / \mathrm{scale}$ is what is rounded. With $\mathrm{scale} = \mathrm{amax} / 448$ the largest magnitude lands on 448.
#
# **Question:** what if the scale is wrong? Make it too large or too small by powers of 2. How far can you go to either side until the SNR falls by 3 dB? For which tensor is there least room, and why?
#
# Above: how often a number occurs in the tensor, and below it a line for each of E4M3's numbers, times the scale. Below: the same by magnitude, on an axis of powers of 2; shaded are the subnormals and what becomes 0 (left), and what saturates (right).


# %%
@functools.cache
def sample(name):
    """At most 20,000 numbers of a tensor, its largest among them."""
    flat = tensors[name].flatten().sort().values
    return torch.cat([flat[:1], flat[:: max(1, len(flat) // 20000)], flat[-1:]])


def rug(axes, places, height):
    """A short line upwards from the axis at each of `places`."""
    axes.vlines(places, 0, height, color=plots.COLORS[3], linewidth=0.6)


def draw(figure, tensor, scale_times_2_to_the):
    x = sample(tensor)
    scale = x.abs().max() / 448 * 2.0**scale_times_2_to_the
    back = my_round(x / scale) * scale
    top, bottom = figure.subplots(2, 1)
    numbers = values["E4M3"][values["E4M3"].isfinite()] * scale
    amax = 1.05 * x.abs().max().item()
    counts, *_ = top.hist(x.numpy(), 101, range=(-amax, amax), color=plots.COLORS[0])
    rug(top, numbers[numbers.abs() < amax], -0.25 * counts.max())
    top.set(yticks=[], xlabel="number", xlim=(-amax, amax))
    show_magnitudes(bottom, x[x != 0].abs().log2(), numbers[numbers > 0].log2())
    clipped = (x.abs() > 448 * scale).float().mean()
    gone = ((back == 0) & (x != 0)).float().mean()
    words = f"SNR {snr(x, back):.1f} dB; {gone:.1%} become 0, {clipped:.1%} saturate"
    top.set_title(words)


# %%
def show_magnitudes(axes, powers, numbers):
    """The histogram of log2|x|, and where the logarithms of E4M3's numbers lie."""
    low = min(powers.quantile(0.001).item(), numbers.min().item()) - 1
    high = max(powers.max().item(), numbers.max().item()) + 1
    counts, *_ = axes.hist(powers.numpy(), 120, range=(low, high), color=plots.COLORS[0])
    rug(axes, numbers, -0.25 * counts.max())
    subnormal = numbers.min().item() + 3  # from 2^-9 to 2^-6
    axes.axvspan(low, subnormal, color=plots.COLORS[1], alpha=0.15)
    axes.axvspan(numbers.max().item(), high, color=plots.COLORS[3], alpha=0.25)
    axes.text(subnormal, counts.max(), "coarse or 0  ", ha="right", va="top")
    axes.set(yticks=[], xlabel="log2 of the magnitude", xlim=(low, high))


alt = "Histograms of a tensor with E4M3's numbers times the scale below them"
controls = {"tensor": [*tensors], "scale_times_2_to_the": (-4, 20)}
wrong_scale = explore(draw, alt, (7.5, 5), **controls)
if wrong_scale is not None:  # the controls are there
    wrong_scale.children[1].value = 0
wrong_scale

# %% [markdown]
# <details><summary>Answer</summary>Too small is bad at once: with half the scale the largest numbers saturate. Too large does nothing for a long time: for the activations many powers of 2 (the next cell counts them). Numbers slide to smaller exponents, and each exponent has the same 8 numbers; harm begins where numbers of TYPICAL size reach the subnormals. In SwiGLU and the logit gradients the largest number is further above the typical one than in the others (amax / typical, below): typical numbers lie further to the left from the start, and there is less room.</details>
#
# The next cell says it for all five.


# %%
def room(x):
    """Up to which power of 2 a scale may be too large until 3 dB are lost."""
    best, scale = snr(x, one_scale(x)), x.abs().max() / 448
    powers = range(1, 30)
    lost = (snr(x, my_round(x / (scale * 2.0**k)) * scale * 2.0**k) < best - 3 for k in powers)
    return next((k - 1 for k, bad in zip(powers, lost, strict=True) if bad), 29)


for name in tensors:
    x = sample(name)
    half = snr(x, my_round(2 * x / (x.abs().max() / 448)) * (x.abs().max() / 448) / 2)
    print(f"{name:15} 2^{room(x)} too large costs less than 3 dB;", end=" ")
    print(f"2 times too small leaves {half:.1f} dB", end="; ")
    print(f"amax / typical {x.abs().max() / x.square().mean().sqrt():.0f}")

# %% [markdown]
# ## A scale in one byte
#
# If a scale may be too large, it can be rounded UP to a power of 2. That is worth something:
#
# - multiplying by $2^k$ changes the exponent alone: it rounds nothing;
# - only the exponent must be stored, in one byte instead of the four of float32. This format is called **ue8m0**: no sign, 8 bits of exponent, no mantissa.
#
# $$s' = 2^{\lceil \log_2 s \rceil}$$
#
# $\lceil x \rceil$ rounds up. DeepSeek-V3 does so for some tensors; from V3.1 on every scale is such a power.

# %% [markdown]
# ## Exercise 3 · Power-of-2 scales
#
# *6 minutes · difficulty ●●○○○*
#
# | name | |
# |---|---|
# | `scale` | any shape, float32, positive or NaN |
# | result | the same shape, float32: the least power of 2 that is at least `scale` |
#
# A power of 2 stays what it is; NaN stays NaN.
#
# Two ways lead there, and each has a trap. `log2` rounds: what does it give in float32 for the number just above $2^{60}$? And `torch.frexp` (exercise 2) gives an exponent for everything, for NaN too.


# %%
def power_of_two_scale(scale):
    """The least power of 2 that is at least `scale`, float32; NaN where scale is NaN."""
    # BEGIN SOLUTION
    exponent = scale.double().log2().ceil()
    return exponent.exp2().float()
    # END SOLUTION


# %%
my_power_of_two_scale = check(power_of_two_scale)

# %% [markdown]
# ## Scales for a few
#
# One scale serves a whole tensor: then one outlier spoils all. The other extreme, a scale for each number, would cost more than it saves. Between them there is a choice of how many numbers share one, the **granularity**.
#
# The map shows the amax of 128 neighbours each, for 64 tokens of the logit gradients. If one scale had to serve them all, it would be that of the brightest field.

# %%
few = tensors["logit gradients"][:64].unflatten(-1, (-1, 128)).abs().amax(-1)
fig, axes = plots.figure(7.5, 4)
labels = {"xlabel": "128 neighbours each", "ylabel": "token"}
plots.heat(axes, few.log2(), "log2 of the amax", **labels)
plots.show(fig, "The largest magnitudes of 128 neighbours each differ by many powers of 2.")
print(f"from 2^{few.min().log2():.0f} to 2^{few.max().log2():.0f}")

# %% [markdown]
# DeepSeek-V3 takes two shapes (2412.19437, section 3.3.2).
#
# - **Tiles, 1 × 128**, for activations and gradients: a token (a row) is cut into pieces of 128 neighbours, each with its own scale.
# - **Blocks, 128 × 128**, for weights.
#
# Both times the 128 lie along the dimension $K$ over which a product $y_{mn} = \sum_k x_{mk} w_{nk}$ sums. Over 128 summands the scale is then one constant, which can be taken out of the sum. Lesson 11 builds on that.

# %% [markdown]
# ## Exercise 4 · Tiles
#
# *12 minutes · difficulty ●●●○○*
#
# $$s = \max_{\text{tile}} |x| \,/\, 448, \qquad x_{fp8} = \mathrm{round}(x / s)$$
#
# | name | shape, dtype |
# |---|---|
# | `x` | `[..., K]`, any number of axes before it; float32 or bfloat16 |
# | `power_of_2` | if True, scales go through `my_power_of_two_scale` (exercise 3) before dividing |
# | first result | `[..., K]`: rounded by `my_round`, then cast to `torch.float8_e4m3fn` |
# | second result | `[..., ceil(K/128)]`, float32: $s$, so that $x \approx x_{fp8} \cdot s$ |
#
# - Compute in float32, also where `x` is bfloat16.
# - If 128 does not divide $K$, the last tile has fewer numbers. `F.pad(x, (0, n))` appends `n` zeros to each row; `-K % 128` is how many are missing.
# - A tile of zeros must not give 0/0: the smallest scale is `2.0**-126`, the smallest normal number of float32.
# - A tile with a NaN gets the scale NaN.
#
# `y.unflatten(-1, (-1, 128))` cuts the last axis into two; `y.amax(-1)` is the largest along the last.


# %%
def quantize_tiles(x, power_of_2=False):
    """(x_fp8 [...,K] float8_e4m3fn, scale [...,ceil(K/128)] float32) of x [...,K]."""
    # BEGIN SOLUTION
    K = x.shape[-1]
    tiles = F.pad(x.float(), (0, -K % 128)).unflatten(-1, (-1, 128))
    scale = (tiles.abs().amax(-1) / 448).clamp_min(2.0**-126)
    if power_of_2:
        scale = my_power_of_two_scale(scale)
    x_fp8 = my_round(tiles / scale.unsqueeze(-1)).flatten(-2)[..., :K]
    return x_fp8.to(torch.float8_e4m3fn), scale
    # END SOLUTION


# %%
my_quantize_tiles = check(quantize_tiles)

# %% [markdown]
# ## Exercise 5 · Blocks
#
# *10 minutes · difficulty ●●●○○*
#
# The same for a weight matrix (zeros and NaN as well), in squares: block $(i, j)$ holds rows $128i$ to $128i + 127$ and columns $128j$ to $128j + 127$, and fewer at the edges.
#
# | name | shape, dtype |
# |---|---|
# | `w` | `[N, K]`, float32 |
# | `power_of_2` | as in exercise 4 |
# | first result | `[N, K]`, `torch.float8_e4m3fn` |
# | second result | `[ceil(N/128), ceil(K/128)]`, float32 |
#
# `F.pad(w, (0, a, 0, b))` appends `a` columns and `b` rows of zeros. `y.reshape(n, 128, k, 128)` of a matrix `[128n, 128k]` gives each block two axes of its own; `y.amax((1, 3), keepdim=True)` is the largest over two axes, which stay with size 1.


# %%
def quantize_blocks(w, power_of_2=False):
    """(w_fp8 [N,K] float8_e4m3fn, scale [ceil(N/128),ceil(K/128)] float32) of w [N,K]."""
    # BEGIN SOLUTION
    N, K = w.shape
    padded = F.pad(w.float(), (0, -K % 128, 0, -N % 128))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).clamp_min(2.0**-126)
    if power_of_2:
        scale = my_power_of_two_scale(scale)
    w_fp8 = my_round(blocks / scale).reshape(padded.shape)[:N, :K]
    return w_fp8.to(torch.float8_e4m3fn), scale[:, 0, :, 0]
    # END SOLUTION


# %%
my_quantize_blocks = check(quantize_blocks)

# %% [markdown]
# ## How large must an outlier be?
#
# The experiment of the beginning, now with all sizes from 1 to $2^{24}$ times the typical number, in three formats with one scale for the tensor, and with your tiles. **int8** are the whole numbers from -127 to 127: equal steps everywhere, which is the difference to a floating-point format.
#
# What should you see? int8 suffers first: its step is amax/127, whatever the size of a number. E4M3 holds out until the outlier pushes the others among the subnormals, E5M2 longer still. With tiles only the 127 neighbours of the outlier suffer.


# %%
LARGEST = {"E4M3": 448.0, "E5M2": 57344.0, "int8": 127.0}


def stored(x, scale, format):
    """What comes back of x, divided by scale, rounded to a format, multiplied by scale."""
    y = x / scale
    if format == "E4M3":
        return my_round(y) * scale
    return (y.round() if format == "int8" else y.to(torch.float8_e5m2).float()) * scale


def with_outlier(format, times, tiles=False):
    """The SNR of all other activations beside one that is `times` the typical one."""
    x = tensors["activations"].clone()
    x[0, 0] = times * x.square().mean().sqrt()
    if tiles:
        back = reference.dequantize_tiles(*my_quantize_tiles(x))  # codes times scales
    else:
        back = stored(x, x.abs().max() / LARGEST[format], format)
    return snr(x.flatten()[1:], back.flatten()[1:])


factors = [2.0**k for k in range(25)]
curves = {f"{format}, one scale": [with_outlier(format, t) for t in factors] for format in LARGEST}
curves["E4M3, tiles"] = [with_outlier("E4M3", t, tiles=True) for t in factors]

# %% tags=["nbval-ignore-output"]
fig, axes = plots.figure(8, 3.8)
for name, curve in curves.items():
    axes.plot(factors, curve, label=name, markersize=4)
axes.set_xscale("log", base=2)
axes.set(xlabel="outlier / typical number", ylabel="SNR of the others, dB")
plots.label_lines(axes)
plots.show(fig, "SNR of the others over the size of one outlier, for four ways to store.")


def first_damage(curve):
    """The outlier at which 3 dB are lost, on a straight line between two of the curve's points."""
    limit = curve[0] - 3
    for k, (before, after) in enumerate(itertools.pairwise(curve)):
        if after < limit:
            return 2 ** (k + (before - limit) / (before - after))
    return math.inf


for name, curve in curves.items():
    damage = first_damage(curve)
    words = f"3 dB lost from {damage:,.0f} × typical on"
    print(f"{name}: {'still within 3 dB at 2^24' if damage == math.inf else words}")
guess.compare(first_damage(curves["E4M3, one scale"]))

# %% [markdown]
# "One outlier ruins everything" is true of whole numbers at once, and of E4M3 only far later, as the lines above say. That is the strength of a floating-point format: its digits do not depend on the scale, only its range does.

# %% [markdown]
# ## Which tensor needs what?
#
# Now without planted outliers. Four granularities, three formats, five real tensors. Two numbers each: the SNR over all numbers, and after the bar that of the worst tenth of the 1 × 128 tiles (the tile that only a tenth of the others does worse than). The second one tells whether small numbers far from the large ones survive: the first hardly notices them.


# %%
def shared_amax(x, how):
    """For each number of x [M, K] the largest magnitude of those that share its scale."""
    M, K = x.shape
    rows, columns = {"tensor": (M, K), "row": (1, K), "block": (128, 128), "tile": (1, 128)}[how]
    parts = x.abs().reshape(M // rows, rows, K // columns, columns)
    return parts.amax((1, 3), keepdim=True).expand_as(parts).reshape(M, K)


def both(x, back):
    """(SNR of all, SNR that a tenth of the tiles does not reach)."""
    tiles, errors = (y.unflatten(-1, (-1, 128)).square().sum(-1) for y in (x, x - back))
    each = 10 * torch.log10(tiles / errors.clamp_min(1e-45))
    return snr(x, back), each[tiles > 0].quantile(0.1).item()


ways = ("tensor", "row", "block", "tile")
measured = {}
for format, top in LARGEST.items():
    for name, x in tensors.items():
        for how in ways:
            scale = (shared_amax(x, how) / top).clamp_min(2.0**-126)
            measured[format, name, how] = both(x, stored(x, scale, format))
            power = stored(x, my_power_of_two_scale(scale), format)
            measured[format, name, f"{how}, 2^k"] = both(x, power)
back = reference.dequantize_tiles(*my_quantize_tiles(tensors["SwiGLU"]))
same = both(tensors["SwiGLU"], back) == measured["E4M3", "SwiGLU", "tile"]
print("your tiles give the same:", same)

# %%
columns = ("tensor", "row", "block", "tile", "tile, 2^k")
print(f"{'SNR in dB: all | worst tenth':28}" + "".join(f"{how:>13}" for how in columns))
for format in LARGEST:
    for name in tensors:
        line = (measured[format, name, how] for how in columns)
        cells = "".join(f"{f'{whole:.1f} | {worst:.1f}':>13}" for whole, worst in line)
        print(f"{format:6} {name:21}{cells}")

# %% tags=["nbval-ignore-output"]
fig, panels = plots.figure(9, 3.6, columns=3)
for axes, format in zip(panels, LARGEST, strict=True):
    for name in tensors:
        worst = [measured[format, name, how][1] for how in ways]
        axes.plot(ways, worst, label=name, markersize=4)
    axes.set(title=format, ylim=(-2, 46))
panels[0].set_ylabel("SNR of the worst tenth, dB")
fig.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
)
plots.show(fig, "SNR of the worst tenth of the tiles over granularity, for E4M3, E5M2 and int8.")
for format in LARGEST:
    gains = {n: measured[format, n, "tile"][1] - measured[format, n, "tensor"][1] for n in tensors}
    most = max(gains, key=gains.get)
    print(f"{format}: tiles instead of one scale gain {min(gains.values()):.1f} dB", end=" ")
    print(f"to {gains[most]:.1f} dB (the most: {most})")
rounded = [measured["E4M3", n, "tile"][0] - measured["E4M3", n, "tile, 2^k"][0] for n in tensors]
print(f"E4M3: powers of 2 cost {min(rounded):.1f} to {max(rounded):.1f} dB in tiles")
better = [measured["E4M3", n, "tile"][0] - measured["E5M2", n, "tile"][0] for n in tensors]
print(f"E4M3 is better than E5M2 by {min(better):.1f} to {max(better):.1f} dB in tiles")

# %% [markdown]
# What these numbers say:
#
# - **Three bits of mantissa are worth much the same in every tensor**, whatever the scale, while numbers stay above the subnormals; E5M2 has one bit fewer: 6 dB less.
# - **In E4M3 this small model hardly needs tiles.** They mostly add that the largest number of each becomes exactly 448, without error; a power-of-2 scale gives that up.
# - **int8 needs them**, for the logit gradients most of all, then for SwiGLU. With them its worst tenth beats E4M3's on every tensor: without outliers equal steps are better.
# - **The logit gradients are a case of their own.** One number in each row, that of the right token, has nearly all the energy, and often is the amax, stored without error: the SNR over all is high. Look at the other number: with one scale int8 makes zeros of whole tiles. (DeepSeek-V3 keeps its head out of FP8.)

# %% [markdown]
# ### So why tiles?
#
# E4M3 covers $2^{-9}$ to 448, some 18 powers of 2; E5M2 32. Earlier recipes took E5M2 for gradients, for its range, and paid with 6 dB. DeepSeek-V3 takes E4M3 everywhere, and says that its fine scales make that possible (2412.19437, section 3.3.2): the range that the exponent lacks is in the scales.
#
# And large models do have the outliers that this one lacks: besides the massive activations above, a 7B model in FP8 has diverged after 200 billion tokens, because SwiGLU had begun to make outliers (2409.12517). Nothing of that shows in the first seconds of a small model. Scales for a few numbers are an insurance against what nobody measured.

# %% [markdown]
# ### What do these decibels mean for the model?
#
# Replace all its weight matrices (not embedding and head) by what comes back from FP8, or from other formats: how much does the loss on held-out text change?

# %% tags=["nbval-ignore-output"]
held = minids.data.encode_files(text.tokenizer, text.corpus.heldout[:4])
batch = minids.data.batch(held, 0, 0, 4 if fast() else 16, 128)
linears = (m for m in model.layers.modules() if isinstance(m, torch.nn.Linear))
matrices = [linear.weight for linear in linears]
originals = [w.clone() for w in matrices]
nats = model.loss(*batch)[1].item()
print(f"float32: {nats:.4f} nats per token")
for format, how in (("E4M3", "block"), ("E5M2", "block"), ("int8", "block"), ("int8", "tensor")):
    for w, original in zip(matrices, originals, strict=True):
        w.copy_(stored(original, shared_amax(original, how) / LARGEST[format], format))
    print(f"{format}, one scale for each {how}: {model.loss(*batch)[1].item() - nats:+.4f}")
for w, original in zip(matrices, originals, strict=True):
    w.copy_(original)

# %% [markdown]
# The smallest of these differences are chance, up or down: rounding hits both ways. And that is the forward pass with rounded weights alone; training rounds activations and gradients too, and adds up long sums of products: lessons 11 and 12.
#
# ## What scales cost
#
# Bytes, read off live tensors: one float32 scale for 128 numbers of one byte is 4/128 = 3.1%; as ue8m0 (torch has that as `float8_e8m0fnu`) a quarter of it; blocks nearly nothing.

# %%
x, w = tensors["SwiGLU"], tensors["weights"]
x_fp8, x_scale = my_quantize_tiles(x, power_of_2=True)
w_fp8, w_scale = my_quantize_blocks(w)
byte = x_scale.to(torch.float8_e8m0fnu)
print(f"the scales in one byte are the same numbers: {torch.equal(byte.float(), x_scale)}")
for name, numbers, scales in (
    ("1 × 128, float32", x_fp8, x_scale),
    ("1 × 128, ue8m0", x_fp8, byte),
    ("128 × 128, float32", w_fp8, w_scale),
):
    share, whole = scales.nbytes / numbers.nbytes, numbers.nbytes + scales.nbytes
    print(
        f"{name:19} {numbers.nbytes:9,} + {scales.nbytes:6,} bytes of scales ({share:.2%})",
        end=", ",
    )
    print(f"{whole / (2 * numbers.numel()):.1%} of bfloat16")
total = accounting.parameters(minids.ModelConfig.preset("deepseek-v3")).total
print(f"V3, were all its {total / 1e9:.0f}B parameters in blocks:", end=" ")
print(f"{4 * total / 128**2 / 1e6:,.0f} MB of scales; in tiles {4 * total / 128 / 1e9:,.1f} GB")

# %% [markdown]
# That is one reason for blocks. The other: the input gradient (lesson 12) needs the weights transposed, and a square block stays a block when it is turned; a tile does not.
#
# ## When does it not pay?
#
# **Long sums.** FP8 is for the factors of products. A sum that is KEPT in few bits stops growing when the step is twice the summand. The next cell adds ones.

# %%
total = {"E4M3": torch.zeros(()), "bfloat16": torch.zeros((), dtype=torch.bfloat16)}
total["float32"] = torch.zeros(())
for _ in range(1000):
    total["E4M3"] = my_round(total["E4M3"] + 1)
    total["bfloat16"] += 1
    total["float32"] += 1
for format, value in total.items():
    print(f"1000 × 1 added up in {format}: {value.item():,.0f}")

# %% [markdown]
# 16 + 1 = 17 is a tie, and goes to even: back to 16. Norms, softmax, losses, optimizers and the sums inside products are therefore kept in more bits.
#
# **Small or narrow tensors.** A tile that is not full costs a scale all the same. And rounding is work: it reads and writes everything once more, before the product can begin.

# %% tags=["nbval-ignore-output"]
for K in (8, 64, 128, 130, 1024):
    numbers, scales = my_quantize_tiles(torch.randn(64, K))
    size = (numbers.nbytes + scales.nbytes) / (2 * numbers.numel())
    print(f"[64, {K}]: {size:.1%} of bfloat16")
here, (x, w) = torch.get_num_threads(), (torch.randn(512, 768), torch.randn(256, 768))
x_tiles, w_blocks = my_quantize_tiles(x), my_quantize_blocks(w)


def from_fp8():
    """The product of what is stored in FP8, on a machine that multiplies float32."""
    return reference.dequantize_tiles(*x_tiles) @ reference.dequantize_blocks(*w_blocks).T


runs = {"float32 product": lambda: x @ w.T, "quantise x": lambda: my_quantize_tiles(x)}
runs["back from FP8, then the product"] = from_fp8
for name, seconds in machine.race(runs, rounds=31).items():
    print(f"{name}: {1e3 * seconds:.2f} ms on {here} threads of this machine")

# %% [markdown]
# **Machines without FP8 arithmetic.** Any machine can STORE these bytes; only some multiply them. NVIDIA's GPUs do from compute capability 8.9 on (sm_89: the RTX 40 series; sm_90: H100, H200). On older ones, and on the processor above, numbers go back to a wider format first: **emulated**, which saves memory and costs time. Here:

# %% tags=["nbval-ignore-output"]
if not torch.cuda.is_available():
    print("no GPU: FP8 is stored, and its products are emulated")
else:
    major, minor = torch.cuda.get_device_capability()
    able = "multiplied" if (major, minor) >= (8, 9) else "stored, and its products are emulated"
    print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}: FP8 is {able}")
machine.recorded("fp8")

# %% [markdown]
# **Tensors without outliers**: see the table above. There one scale is enough in E4M3, and cheaper to apply: one factor for a whole product. It is not cheaper to find: the whole tensor must be read before its first number can be rounded, while a tile has its scale at hand.
#
# ## In the real DeepSeek
#
# | | yours | DeepSeek-V3 (2412.19437, section 3.3, appendix B) |
# |---|---|---|
# | activations, gradients | E4M3, 1 × 128 | the same |
# | weights | E4M3, 128 × 128 | the same |
# | scale | amax/448, of the numbers at hand | the same ("online") |
# | powers of 2 | on demand | only for inputs of the Linear after attention, activations before the experts' up-projection, gradients before their down-projection; from V3.1 on all (ue8m0) |
# | smallest scale | $2^{-126}$ | the official inference code clamps the amax to $10^{-4}$ |
# | not in FP8 | | embedding, head, gates, norms, attention itself |
#
# In the published checkpoints each FP8 matrix `X.weight` comes with `X.weight_scale_inv`. In spite of its name it is the **multiplier**: your second result, not its reciprocal.

# %%
kv_a = torch.randn(576, 7168)  # kv_a_proj_with_mqa of V3: 512 + 64 rows
w_fp8, weight_scale_inv = my_quantize_blocks(kv_a)
print(f"weight {list(w_fp8.shape)} {w_fp8.dtype}, weight_scale_inv {list(weight_scale_inv.shape)}")
error = snr(kv_a, reference.dequantize_blocks(w_fp8, weight_scale_inv))
print(f"times its multipliers it comes back with {error:.1f} dB")

# %% [markdown]
# What did not work: 128 × 128 blocks for gradients too. A model of 16B parameters diverged with them, trained on about 300B tokens (appendix B). In your map, that of the logit gradients, a block of 128 tokens would have the scale of its bright fields. Lesson 12 tries to reproduce the divergence.
#
# ## To remember
#
# 1. E4M3 keeps every normal number to within 1/16, from $2^{-6}$ to 448; a scale moves that window over the tensor.
# 2. A scale that is too small is fatal, one that is too large is harmless up to some hundred- or thousandfold: so it may be a power of 2.
# 3. Tiles buy range, not digits: they matter where numbers that count lie further apart than E4M3's full precision reaches, $448 / 2^{-6} = 28{,}672$-fold (with int8 far earlier), and cost $4/128 = 3.1\,\%$ (as ue8m0 $1/128 = 0.8\,\%$).

# %% [markdown]
# ## Quiz
#
# Open an answer to see whether it is right.
#
# **1.** Which number has the code `0 0000 001`?
# <details><summary>2^-7 · (1 + 1/8)</summary>No: with e = 0 there is no leading 1.</details>
# <details><summary>2^-9</summary>Yes: 2^-6 · 1/8, the smallest above 0.</details>
#
# **2.** All weights of a tensor are multiplied by 8 before it is quantised with scales amax/448. What happens to the SNR?
# <details><summary>nothing</summary>Yes: the scales become 8 times as large, the codes stay the same.</details>
# <details><summary>it rises by 18 dB</summary>No: the error grows by 8 as well.</details>
#
# **3.** One outlier of 50 × typical. Which format suffers more with one scale?
# <details><summary>int8</summary>Yes: its step is amax/127, so typical numbers keep 2 or 3 steps.</details>
# <details><summary>E4M3</summary>No: the others only move to smaller exponents, which have as many numbers.</details>
#
# **4.** A checkpoint's weights come out far too large. What may have happened?
# <details><summary>someone divided by weight_scale_inv</summary>Yes: it is the multiplier, and smaller than 1 for usual weights.</details>
# <details><summary>the bias was 8</summary>No: then all are half as large.</details>

# %% [markdown]
# ## Homework
#
# Each begins with `import minids`.
#
# 1. Write `decode_e5m2` and `round_to_e5m2` (beyond its largest number E5M2 goes on to infinity, from 61,440 on, which is halfway to the next) and hold both against `torch.float8_e5m2`: all 256 codes, then random numbers. Now round numbers from 16 to 32 to E4M3 first, and the result to E5M2. Which of them come out otherwise than with E5M2 at once?
# <details><summary>Expected</summary>A quarter: what lies between 18 and 19, 21 and 22, 26 and 27, 29 and 30. E4M3 moves it to 18, 22, 26 or 30, halfway between two numbers of E5M2, and the tie then goes to even, away from the nearest. Rounding twice is not rounding once.</details>
# 2. Tiles of other widths: 16, 32, 64, 128, 256. For int8, E4M3 and **E2M1** (4 bits: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign), with float32 and with ue8m0 scales, draw the SNR of the SwiGLU tensor over the bytes for each number. `tensors["SwiGLU"]` is in this notebook: work at its end, or take the tensor along with `torch.save`. Which point would you choose?
# <details><summary>Expected</summary>A number takes 1 + 4/n bytes in a tile of n with a float32 scale, 1 + 1/n with ue8m0, in E2M1 half a byte less: 1.25 and 1.0625 for n = 16. So ue8m0 buys tiles a quarter as wide for the same bytes. Look whether int8 and E2M1, whose ranges are short, gain more from narrow tiles than E4M3 does; with ue8m0 E4M3 has little to gain, as long as its numbers stay above the subnormals. E2M1 has two bits of mantissa fewer than E4M3: 2 · 6 = 12 dB less, or worse.</details>

# %%
status()
