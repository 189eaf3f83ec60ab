"""What every model is made of, against its formula: RMSNorm, RoPE and YaRN, attention's mask."""

import math

import pytest
import torch
import torch.nn.functional as F

from minids import layers
from minids.config import ModelConfig
from minids.functions import BlockAttention
from minids.layers import (
    apply_rope,
    causal_attention,
    inverse_frequencies,
    rms_norm,
    rope_tables,
    softmax_scale,
)
from minids.numerics import TOLERANCE, relative_error

CPU = torch.device("cpu")
PUBLISHED = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def yarn(mscale):
    return {**YARN, "mscale": mscale, "mscale_all_dim": mscale}


# YaRN ------------------------------------------------------------------------------------------------------------


def test_yarn_keeps_the_fast_frequencies_and_divides_the_slow_ones():
    plain = inverse_frequencies(64, 10000.0, (), CPU)
    ratio = plain.double() / inverse_frequencies(64, 10000.0, tuple(sorted(YARN.items())), CPU).double()
    index = torch.arange(32)
    assert torch.equal((ratio - 1).abs() < 1e-6, index <= 10)  # low: as they are
    assert torch.equal((ratio - 40).abs() < 1e-4, index >= 23)  # high: 40 times slower
    ramp = (index[11:23] - 10).double() / 13  # f/s * ramp + f * (1 - ramp) in between
    torch.testing.assert_close(1 / ratio[11:23], ramp / 40 + 1 - ramp, rtol=1e-5, atol=0)


def test_frequencies_without_yarn():
    want = [10000 ** (-2 * i / 6) for i in range(3)]
    assert inverse_frequencies(6, 10000.0, (), CPU).tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("scaling", "want"), [(None, 0.0721688), (yarn(1.0), 0.1352337), (yarn(0.707), 0.1147214), (YARN, 0.0721688)]
)
def test_the_published_softmax_scales(scaling, want):
    assert softmax_scale(ModelConfig(**PUBLISHED, rope_scaling=scaling)) == pytest.approx(want, abs=1e-7)


def test_without_both_mscales_the_tables_are_scaled_instead():
    positions = torch.arange(5)
    for scaling, factor in ((yarn(0.707), 1.0), (YARN, 0.1 * math.log(40) + 1)):
        cos, sin = rope_tables(ModelConfig(**PUBLISHED, rope_scaling=scaling), positions)
        assert torch.allclose(cos.square() + sin.square(), torch.tensor(factor**2))


# RoPE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, yarn(1.0)])
def test_the_product_depends_on_the_distance_alone(scaling):
    cfg, q, k = ModelConfig(**PUBLISHED, rope_scaling=scaling), *torch.randn(2, 1, 3, 64)

    def product(q_at, k_at):
        turned = [apply_rope(x, *rope_tables(cfg, torch.tensor([at]))) for x, at in ((q, q_at), (k, k_at))]
        return (turned[0] * turned[1]).sum(-1)

    assert relative_error(product(105, 103), product(5, 3)) < 1e-5
    assert relative_error(product(3, 5), product(5, 3)) > 1e-3
    assert relative_error(product(9, 9), (q * k).sum(-1)) < 1e-5


def test_rope_turns_the_pairs_2i_and_2i_plus_1():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rope_tables(ModelConfig(qk_rope_head_dim=8), torch.arange(5)))
    even, odd, cos_, sin_ = x[..., ::2], x[..., 1::2], cos[:, None], sin[:, None]
    want = torch.stack([even * cos_ - odd * sin_, even * sin_ + odd * cos_], -1).flatten(-2)
    assert relative_error(apply_rope(x, cos, sin), want) < TOLERANCE[torch.float64]
    half = apply_rope(x.bfloat16(), cos.float(), sin.float())
    assert half.dtype == torch.bfloat16 and relative_error(half, want) < TOLERANCE[torch.bfloat16]


# Norm and attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 130])
def test_rms_norm_is_its_formula(dtype, width):
    x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    got = rms_norm(x, weight, 1e-3)
    assert got.dtype == dtype and relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize(("T", "S", "heads", "groups"), [(1, 1, 2, 2), (1, 9, 4, 2), (5, 5, 4, 1), (3, 8, 6, 2)])
def test_queries_are_the_last_positions_and_see_nothing_later(T, S, heads, groups):
    shapes = [(2, T, heads, 6), (2, S, groups, 6), (2, S, groups, 4)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    more = heads // groups
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(more, 2)) * 0.3
    later = torch.arange(S) > torch.arange(S - T, S)[:, None]
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    want = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(more, 2))
    assert relative_error(causal_attention(q, k, v, 0.3), want) < TOLERANCE[torch.float64]


def attention_with_gradients(function, dtype, T, heads, groups):
    """Result of `function(q, k, v, 0.3)` and its gradients; the same inputs for every function."""
    draw, shapes = torch.Generator().manual_seed(5), [(2, T, heads, 6), (2, T, groups, 6), (2, T, groups, 4)]
    inputs = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    out = function(*inputs, 0.3)
    return out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=draw).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 150])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
def test_attention_by_blocks_is_the_fused_one(dtype, T, heads, groups, monkeypatch):
    got = attention_with_gradients(causal_attention, dtype, T, heads, groups)
    monkeypatch.setattr(BlockAttention, "ROOM", 0)
    want = attention_with_gradients(causal_attention, torch.float64, T, heads, groups)
    assert "BlockAttention" in type(got[0].grad_fn).__name__ and "BlockAttention" not in type(want[0].grad_fn).__name__
    for a, b in zip(got, want, strict=True):
        nothing = b.abs().max() < 1e-14  # with one position dq and dk are 0, but for what fp64 rounds
        assert a.dtype == dtype
        assert (a - b).abs().max() < 1e-6 if nothing else relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("widths", "groups"), [((192, 128), 4), ((96, 64), 4), ((64, 64), 2), ((24, 16), 4)])
@pytest.mark.parametrize("T", [2, 100, 128, 1030])
def test_attention_on_a_gpu_whatever_kernel_torch_has_for_it(widths, groups, T):
    draw = torch.Generator().manual_seed(5)
    shapes = [(2, T, 4, widths[0]), (2, T, groups, widths[0]), (2, T, groups, widths[1])]
    inputs = [torch.randn(shape, generator=draw).bfloat16() for shape in shapes]
    grad = torch.randn((2, T, 4, widths[1]), generator=draw).bfloat16()

    def all_of(inputs, grad):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = causal_attention(*inputs, 0.1)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    got = all_of([t.cuda() for t in inputs], grad.cuda())
    for a, b in zip(got, all_of([t.double() for t in inputs], grad.double()), strict=True):
        assert relative_error(a.cpu(), b) < TOLERANCE[torch.bfloat16]


def test_cudnn_gets_mla_as_it_is_and_the_others_get_padded_values(monkeypatch):
    """On Hopper, with a cuDNN that takes 192 and 128; whatever is refused goes to torch's choice, values padded."""
    seen, fused = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        only = [name for name in ("cudnn", "flash") if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
        seen.append((v.shape[-1], only))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(layers, "prefers_cudnn", lambda where: True)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda inputs: inputs.query.shape[-1] == 192)
    results = {}
    for width, T, S in ((192, 5, 5), (24, 5, 5), (192, 1, 5), (192, 3, 5)):
        q, k, v = torch.randn(1, T, 2, width), torch.randn(1, S, 2, width), torch.randn(1, S, 2, 16)
        results[width, T] = causal_attention(q, k, v, 0.1)
    assert seen == [(16, ["cudnn"]), (24, ["cudnn", "flash"]), (192, ["cudnn", "flash"]), (192, ["cudnn", "flash"])]
    assert all(out.shape == (1, T, 2, 16) for (_, T), out in results.items())


@pytest.mark.parametrize("targets", [[0, -1, 2], [0, 4, 2], [1]])
def test_a_loss_against_other_targets_than_the_vocabulary_has_is_refused(targets):
    with pytest.raises(RuntimeError, match=r"out of bounds|invalid for input of size 1"):
        layers.linear_cross_entropy(torch.randn(3, 5), torch.randn(4, 5), torch.tensor(targets), impl="torch")


def test_gradients_of_what_is_ours_on_a_cpu(monkeypatch):
    monkeypatch.setattr(BlockAttention, "ROWS", 3)
    draw = {"dtype": torch.float64, "requires_grad": True}
    q, k, v, x, weight = (torch.randn(shape, **draw) for shape in [(2, 7, 2, 4)] * 2 + [(2, 7, 2, 3), (2, 3, 5), (5,)])
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, 0.3), (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda w: rms_norm(x.detach(), w, 1e-3), weight)
