"""The Triton kernels against float64: in the interpreter where there is no GPU, compiled where there is one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import triton_env
from minids.numerics import TOLERANCE, relative_error, seed_everything

pytest.importorskip("triton")
if triton_env.mode() == "absent":
    pytest.skip("triton was imported without TRITON_INTERPRET=1 and there is no GPU", allow_module_level=True)

from minids.lab.meter import call  # noqa: E402
from minids.mla import kernels  # noqa: E402

DEVICE = "cuda" if triton_env.mode() == "gpu" else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the meter counts in the interpreter; set TRITON_INTERPRET=1")
NAN = float("nan")


@pytest.fixture(autouse=True)
def seed():
    seed_everything(5)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel must write itself is NaN before: new_empty, empty and empty_like give NaN."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, filled)


# Decode ----------------------------------------------------------------------------------------------------------


def attend(q, latents, lengths, scale, rank):
    """`decode` in float64, one token at a time, from nothing but what each may see; q [B,T,H,C+R]."""
    q, latents = q.double().cpu(), latents.double().cpu()
    out = q.new_zeros(*q.shape[:-1], rank)
    lse = q.new_full(q.shape[:-1], -math.inf)
    for b, length in enumerate(lengths.tolist()):
        for t in range(q.shape[1]):
            seen = min(length, latents.shape[1]) - (q.shape[1] - 1 - t)
            if seen > 0:
                scores = q[b, t] @ latents[b, :seen].T * scale
                lse[b, t], out[b, t] = scores.logsumexp(-1), scores.softmax(-1) @ latents[b, :seen, :rank]
    return out, lse


def agree(B, T, H, S, C, R, lengths, splits, dtype=torch.float32, scale=0.3):
    """Decode with NaN in every latent that no token may see, and compare with `attend`."""
    q = torch.randn(B, T, H, C + R, device=DEVICE).to(dtype)
    latents = torch.randn(B, S, C + R, device=DEVICE).to(dtype)
    lengths = torch.tensor(lengths, device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        latents[b, length:] = NAN
    out, lse = kernels.decode(q, latents, lengths, scale, C, splits)
    want_out, want_lse = attend(q, latents, lengths, scale, C)
    assert out.shape == (B, T, H, C) and out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, want_out) < TOLERANCE[dtype]
    sees = want_lse > -math.inf
    assert torch.equal(lse.cpu() > -math.inf, sees) and out.cpu()[~sees].eq(0).all()
    if sees.any():  # of 16-bit inputs the scores are exact products, summed in fp32
        assert relative_error(lse.cpu()[sees], want_lse[sees]) < TOLERANCE[torch.float32]


SHAPES = [  # B, T, H, S, C, R, lengths, splits
    (1, 1, 1, 1, 1, 1, [1], 1),
    (3, 1, 5, 70, 24, 8, [0, 1, 70], 1),
    (3, 1, 5, 70, 24, 8, [0, 1, 70], 3),
    (4, 1, 4, 64, 64, 16, [64, 63, 2, 0], 2),
    (2, 1, 17, 129, 64, 16, [65, 129], 5),
    (2, 1, 33, 65, 40, 6, [65, 64], 2),
    (1, 1, 64, 200, 64, 16, [200], 2),
    (1, 1, 130, 40, 20, 10, [33], 1),
    (2, 1, 3, 300, 16, 16, [300, 7], 4),
    (2, 1, 3, 90, 100, 28, [90, 0], 128),
    (2, 1, 2, 5, 16, 4, [0, 0], 2),
    (2, 2, 5, 70, 24, 8, [70, 2], 2),
    (2, 3, 4, 9, 64, 16, [2, 9], 1),
    (1, 5, 13, 80, 24, 8, [68], 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape, dtype):
    agree(*shape, dtype=dtype)


@pytest.mark.parametrize("H", [16, 128])
def test_decode_of_the_published_width(H):
    agree(2, 1, H, 130, 512, 64, [130, 77], 2, torch.bfloat16, scale=0.05)


@given(st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_decode_of_any_sizes(data):
    B, T, H = (data.draw(st.integers(1, most), label=name) for name, most in (("B", 3), ("T", 3), ("H", 40)))
    S, C, R = (data.draw(st.integers(1, most), label=name) for name, most in (("S", 150), ("C", 70), ("R", 20)))
    lengths = data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B), label="lengths")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    agree(B, T, H, S, C, R, lengths, data.draw(st.sampled_from([None, 1, 2, 3, 7])), dtype)
