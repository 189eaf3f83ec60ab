# %% [markdown]
# # 01 A working transformer
#
# In this lesson you write the two smallest pieces of a modern transformer, train the whole of it on real text on your own machine, and see whether it beats gzip.
#
# *20 minutes · easy · needs torch and matplotlib, no GPU*
#
# You will
# 1. write RMSNorm and rotary position embedding (RoPE), and see them equal the reference,
# 2. train a mini-DeepSeek for a minute on Python's standard library,
# 3. read its loss in bits per byte, beside gzip and xz on the same files, and read what it writes.

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import minids
from minids import data, layers, report, train

torch.manual_seed(0)
cfg = minids.ModelConfig.preset("tiny")
print(f"{minids.accounting.parameters(cfg).total:,} parameters, {minids.accounting.parameters(cfg).active:,} active")

# %% [markdown]
# ## The problem
#
# A language model gives a probability to the next token. The better it predicts, the fewer bits a text needs: $-\log_2 p$ for each token. Divided by the bytes of the text this is **bits per byte**, which does not depend on the vocabulary, and which any compressor has too.
#
# Before you train anything: what do gzip and xz need for the files that the model will never see?

# %% tags=["nbval-ignore-output"]
corpus = data.load_corpus("stdlib")
print(f"{len(corpus.train)} files to learn from, {len(corpus.heldout)} held out")
print(f"gzip {corpus.gzip_bpb:.2f} bits per byte, xz {corpus.xz_bpb:.2f}")

# %% [markdown]
# ### Your prediction
#
# How many bits per byte will a model of 2 million parameters need after one minute on this machine? Uniform guessing among 256 bytes needs 8.

# %%
my_prediction = 2.0  # bits per byte: change it

# %% [markdown]
# ## Exercise 1: RMSNorm
#
# Every block normalises its input first, so that its size stays the same however deep the model is (Zhang and Sennrich, 1910.07467):
#
# $$\mathrm{RMSNorm}(x) = \frac{x}{\sqrt{\frac1D \sum_i x_i^2 + \epsilon}} \odot w$$
#
# | name | shape | meaning |
# |---|---|---|
# | `x` | `[..., D]` | hidden states |
# | `weight` | `[D]` | the learned $w$ |
# | `eps` | a number | keeps the root from 0 |


# %%
def rms_norm(x, weight, eps):
    """x [..., D] divided by its root mean square over the last dimension, times weight [D]."""
    # BEGIN SOLUTION
    mean_square = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * weight
    # END SOLUTION


# %% [markdown]
# ## Exercise 2: RoPE
#
# Attention alone does not know the order of its tokens. RoPE (2104.09864) turns each pair $(x_{2i}, x_{2i+1})$ of queries and keys by the angle $t\,f_i$ at position $t$. The product of a turned query and a turned key then depends on the distance of their positions alone.
#
# $$\begin{pmatrix} y_{2i} \\ y_{2i+1} \end{pmatrix} = \begin{pmatrix} \cos & -\sin \\ \sin & \cos \end{pmatrix} \begin{pmatrix} x_{2i} \\ x_{2i+1} \end{pmatrix}$$
#
# `x` is `[B, T, H, R]`, `cos` and `sin` are `[T, R/2]`. Keep the pairs interleaved, as in DeepSeek's checkpoints.


# %%
def apply_rope(x, cos, sin):
    """Turn the pairs (2i, 2i+1) of x [B, T, H, R] by the angles of cos and sin [T, R/2]."""
    # BEGIN SOLUTION
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2)
    # END SOLUTION


# %% [markdown]
# The cell below compares your functions with the package's, over shapes that divide nothing. It says `NOT ATTEMPTED` where you have written nothing yet, and goes on.


# %%
def verdict(name, mine, reference, cases):
    """Print PASS, NOT ATTEMPTED or the first case that differs."""
    for case in cases:
        try:
            got, want = mine(*case), reference(*case)
        except NotImplementedError:
            return print(f"{name}: NOT ATTEMPTED")
        except Exception as error:
            return print(f"{name}: FAIL, your function raised {type(error).__name__}: {error}")
        shape = getattr(got, "shape", None)
        if shape != want.shape:
            return print(f"{name}: FAIL, the result is {shape}, expected {tuple(want.shape)}")
        if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
            at = tuple(int(i) for i in ((got - want).abs() > 1e-5).nonzero()[0])
            return print(f"{name}: FAIL at {at}: got {got[at]:.4f}, expected {want[at]:.4f}")
    print(f"{name}: PASS")


shapes = [(1, 1, 1, 16), (3, 7, 2, 16), (2, 33, 5, 16)]
norms = [(torch.randn(s) * 3, torch.randn(16), 1e-2) for s in shapes]
verdict("01.1 rms_norm", rms_norm, layers.rms_norm, norms)
turns = [(torch.randn(s), *layers.rope_tables(cfg, torch.arange(s[1]))) for s in shapes]
verdict("01.2 apply_rope", apply_rope, layers.apply_rope, turns)

# %% [markdown]
# ## The whole model
#
# `minids.Transformer` stacks blocks of two steps, each behind a norm and added to its input:
#
# $$h = x + \mathrm{Attention}(\mathrm{RMSNorm}(x)), \qquad y = h + \mathrm{FeedForward}(\mathrm{RMSNorm}(h))$$
#
# In `tiny` the attention is Multi-head Latent Attention (lesson 03) and the feed-forward a mixture of experts (lesson 07); here both are just parts that work. The next cell trains it. It is the command `python -m minids.train --preset tiny --steps 60 --out DIR`.

# %% tags=["nbval-ignore-output"]
folder = Path(tempfile.mkdtemp()) / "run"
code = train.main(["--preset", "tiny", "--steps", "60", "--out", str(folder)])
assert code == 0, "training stopped; the line above says why"

# %% tags=["nbval-ignore-output"]
rows = report.read_log(folder / "log.jsonl")
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot([row["step"] for row in rows], [row["bits_per_byte"] for row in rows], label="training")
axes.axhline(corpus.gzip_bpb, ls=":", color="gray", label=f"gzip {corpus.gzip_bpb:.2f}")
axes.axhline(corpus.xz_bpb, ls="--", color="gray", label=f"xz {corpus.xz_bpb:.2f}")
axes.set(xlabel="step", ylabel="bits per byte", title="Sixty steps of tiny on the standard library")
axes.legend()
plt.show()

# %% [markdown]
# ## What it learnt
#
# The held-out loss decides: these files the model never saw. How far off was your prediction?

# %% tags=["nbval-ignore-output"]
import json

result = json.loads((folder / "run.json").read_text())["result"]
bits = result["bits_per_byte"]
print(f"held-out: {bits:.2f} bits per byte; gzip {result['gzip']:.2f}, xz {result['xz']:.2f}")
print(f"your prediction was {my_prediction:.2f}, off by {abs(my_prediction - bits):.2f}")

# %% [markdown]
# Sixty steps are a taste. `make train` takes five minutes and passes both compressors. The model that was written opens with one line:

# %% tags=["nbval-ignore-output"]
model = minids.Transformer.from_pretrained(folder / "model")
tokenizer = data.load_tokenizer(corpus, cfg.vocab_size)
prompt = torch.tensor([tokenizer.encode("import ").ids])
print(tokenizer.decode(minids.generate(model, prompt, 40, temperature=0.8, seed=0)[0].tolist()))

# %% [markdown]
# ## To remember
#
# - A block is attention and a feed-forward, each behind a norm and added to its input.
# - RoPE turns queries and keys, so that their product depends on the distance alone.
# - Bits per byte compares any model with any compressor, on files that neither has seen.
#
# **Homework.** With `import minids`: (1) build `ModelConfig.preset("tiny", attention="mha")` and compare its parameters by `minids.accounting`. (2) Show that turning a query at 5 and a key at 3 gives the same product as at 105 and 103.

# %%
uniform = math.log2(cfg.vocab_size)
print(f"a uniform guess among {cfg.vocab_size} tokens costs {uniform:.0f} bits per token")
