"""The Triton kernels against float64: in the interpreter where there is no GPU, compiled where there is one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_mode import DEVICE, DTYPES, MARKS, interpreted, on_a_gpu

from minids import ModelConfig, Transformer, generate, layer_kernels, layers, triton_env
from minids.lab.traffic import call
from minids.mla import MLA, LatentCache, kernels
from minids.numerics import TOLERANCE, relative_error, seed_everything

pytestmark = MARKS
NAN = float("nan")


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
    (2, 1, 3, 90, 100, 28, [90, 0], 40),
    (2, 1, 2, 5, 16, 4, [0, 0], 2),
    (2, 2, 5, 70, 24, 8, [70, 2], 2),
    (2, 3, 4, 9, 64, 16, [2, 9], 1),
    (1, 5, 13, 80, 24, 8, [68], 3),
]


@pytest.mark.parametrize("dtype", DTYPES)
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
    dtype = data.draw(st.sampled_from(DTYPES))
    seed_everything(S)
    agree(B, T, H, S, C, R, lengths, data.draw(st.sampled_from([None, 1, 2, 3, 7])), dtype)


def test_a_token_that_sees_all_that_is_cached_sees_the_same_with_any_splits():
    q, latents = torch.randn(2, 7, 40, device=DEVICE), torch.randn(2, 333, 40, device=DEVICE)
    lengths = torch.tensor([333, 100], dtype=torch.int32, device=DEVICE)
    whole, lse = kernels.decode(q, latents, lengths, 0.2, 32, splits=1)
    assert whole.shape == (2, 7, 32) and lse.shape == (2, 7)
    for splits in (2, 3, 6, 40):
        out, other = kernels.decode(q, latents, lengths, 0.2, 32, splits=splits)
        assert relative_error(out, whole) < 1e-6 and relative_error(other, lse) < 1e-6


def test_decode_of_a_cache_that_has_room_copies_nothing_and_sees_no_further():
    cache = torch.full((2, 90, 40), NAN, device=DEVICE)
    cache[:, :50] = torch.randn(2, 50, 40, device=DEVICE)
    q, lengths = torch.randn(40, 2, 1, 6, device=DEVICE).permute(1, 2, 3, 0), torch.tensor([50, 70], device=DEVICE)
    out, _ = kernels.decode(q, cache[:, :50], lengths, 0.2, 32, 2)  # a length above S counts as S
    assert relative_error(out, attend(q, cache[:, :50], lengths, 0.2, 32)[0]) < TOLERANCE[torch.float32]


def test_nan_and_large_scores_in_decode():
    q, latents = torch.randn(1, 3, 40, device=DEVICE), torch.randn(1, 100, 40, device=DEVICE)
    lengths = torch.tensor([100], device=DEVICE)
    for scale in (1e-20, 1e4):
        out, _ = kernels.decode(q, latents, lengths, scale, 32, 2)
        assert relative_error(out, attend(q[:, None], latents, lengths, scale, 32)[0][:, 0]) < 1e-3
    latents[0, 80] = NAN  # what a token sees must show
    for splits in (1, 2):
        out, lse = kernels.decode(q, latents, lengths, 0.2, 32, splits)
        assert out.isnan().all() and lse.isnan().all()


BAD = [
    ({"q": torch.zeros(2, 40)}, r"q is \[2, 40\]"),
    ({"q": torch.zeros(3, 5, 40)}, "B and C\\+R must be the same"),
    ({"q": torch.zeros(2, 5, 41)}, "B and C\\+R must be the same"),
    ({"q": torch.zeros(2, 5, 40).double()}, "give both as one of fp32, fp16, bf16"),
    ({"latents": torch.zeros(2, 9, 40).half()}, "give both as one of"),
    ({"latents": torch.zeros(2, 9, 80)[..., ::2]}, "must be contiguous: pass the cache itself"),
    ({"latents": torch.zeros(2, 9, 50)[..., :40]}, "must be contiguous"),
    ({"lengths": torch.zeros(2)}, "give \\[2\\] int32 or int64"),
    ({"lengths": torch.zeros(3, dtype=torch.int64)}, "lengths are \\[3\\]"),
    ({"rank": 40}, "rank is 40; it is C, above 0 and below C\\+R = 40"),
    ({"scale": 0.0}, "scale is 0.0; it must be positive"),
    ({"splits": 0}, "splits is 0"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_what_decode_does_not_take(change, sentence):
    given = {"q": torch.zeros(2, 5, 40), "latents": torch.zeros(2, 9, 40), "lengths": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=sentence):
        kernels.decode(**{**given, "scale": 1.0, "rank": 32, **change})


def test_how_many_splits():
    assert kernels.choose_splits(1, 128, 4096, 1) == 1  # one processor, as in the interpreter
    assert kernels.choose_splits(128, 128, 4096, 132) == 1  # 256 programs: 1.94 waves, and the second is full
    assert kernels.choose_splits(1, 16, 1, 132) == 1
    for batch, rows, length in ((2, 128, 4096), (4, 16, 32768), (40, 128, 8192)):
        splits = kernels.choose_splits(batch, rows, length, 132)
        programs = batch * -(-rows // 64) * splits
        assert splits > 1 and programs / (132 * -(-programs // 132)) > 0.75, (batch, rows, length, splits)


@interpreted
@pytest.mark.parametrize(("H", "splits"), [(5, 1), (16, 3), (64, 2), (100, 1)])
def test_decode_loads_each_latent_once_per_64_heads(H, splits):
    B, S, C, R = 2, 257, 64, 16
    q, latents, lengths = torch.randn(B, H, C + R), torch.randn(B, S, C + R).half(), torch.full((B,), S)
    (out, lse), m = call(kernels.decode, q.half(), latents, lengths, 0.3, C, splits)
    blocks = -(-H // 64)
    programs, cached = B * splits * blocks, latents.nbytes * blocks
    queries, parts = q.numel() * 2 * splits, 0 if splits == 1 else B * H * splits * (C + 2) * 4  # merge: lse twice
    assert m.loaded == cached + queries + programs * 8 + parts and m.out_of_bounds == []
    assert m.launches == (1 if splits == 1 else 2)
    assert m.stored == out.nbytes + lse.nbytes + (splits > 1) * B * H * splits * (C + 1) * 4


@pytest.mark.parametrize("q_lora_rank", [None, 16])
@pytest.mark.parametrize(("past", "T"), [(0, 1), (30, 1), (20, 3)])
def test_mla_decodes_by_the_kernel(q_lora_rank, past, T):
    cfg = ModelConfig(hidden_size=48, num_attention_heads=3, kv_lora_rank=20, q_lora_rank=q_lora_rank)
    attn, x = MLA(cfg).to(DEVICE), torch.randn(2, past + T, 48, device=DEVICE)
    cos, sin = layers.rope_tables(cfg, torch.arange(past + T, device=DEVICE))
    results = []
    for impl in ("torch", "triton"):
        cache = LatentCache(2, past + T + 9, 20, 16, device=DEVICE)
        cache.tensors[0].fill_(NAN)
        with torch.no_grad():
            if past:
                attn(x[:, :past], cos[:past], sin[:past], cache)
            results.append(attn(x[:, past:], cos[past:], sin[past:], cache, impl=impl))
    assert relative_error(*results) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match=r"no backward pass; call it under torch\.no_grad"):
        attn(x, cos, sin, impl="triton")


# Layers ----------------------------------------------------------------------------------------------------------

DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def compare_with_gradients(run, reference, inputs, dtype):
    """`run` of `inputs` in `dtype` against `reference` of them in float64: the result and every gradient."""
    narrow = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().cpu().double().requires_grad_() for x in narrow]
    out, want = run(*narrow), reference(*wide)
    assert out.dtype == dtype and relative_error(out, want) < TOLERANCE[dtype]
    weight = torch.randn(want.shape).to(dtype)
    got = torch.autograd.grad(out, narrow, weight.to(DEVICE))
    for g, x, w in zip(got, narrow, torch.autograd.grad(want, wide, weight.double()), strict=True):
        assert g.dtype == x.dtype and relative_error(g, w) < TOLERANCE[dtype]


def spread(*shape):
    """A tensor [...,n] that is a slice of a wider one, as half of a projection is, with NaN beside it."""
    wide = torch.full((*shape[:-1], shape[-1] + 5), NAN, device=DEVICE)
    wide[..., 2:-3] = torch.randn(shape)
    return wide[..., 2:-3]


@DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1), (2, 9, 130), (40, 24), (3, 1000), (2, 3, 5, 64)])
def test_rms_norm(shape, dtype):
    x, weight = torch.randn(shape, device=DEVICE), torch.randn(shape[-1], device=DEVICE)

    def reference(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    eps = 0.5  # with less, the gradient of a row of one number is the difference of two that are almost equal
    compare_with_gradients(lambda x, w: layer_kernels.rms_norm(x, w, eps), reference, [x, weight], dtype)
    x, eps = spread(*shape), 1e-6
    assert relative_error(layer_kernels.rms_norm(x, weight, eps), reference(x, weight)) < TOLERANCE[torch.float32]


def test_rms_norm_of_rows_shared_by_few_programs(monkeypatch):
    for way in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(layer_kernels, way, 12)  # three programs
    x, weight = torch.randn(1500, 24, device=DEVICE, requires_grad=True), torch.randn(24, device=DEVICE)
    weight.requires_grad_()
    got = [torch.autograd.grad(layer_kernels.rms_norm(x, weight, 1e-6).sum(), (x, weight)) for _ in range(2)]
    want = torch.autograd.grad(layers.rms_norm(x, weight, 1e-6, impl="torch").sum(), (x, weight))
    for a, b, w in zip(*got, want, strict=True):
        assert torch.equal(a, b) and relative_error(a, w) < TOLERANCE[torch.float32]


def test_rms_norm_of_mixed_dtypes_gives_the_wider():
    x, weight = torch.randn(4, 24, device=DEVICE).half(), torch.randn(24, device=DEVICE)
    got, want = (layers.rms_norm(x, weight, 1e-6, impl=impl) for impl in ("triton", "torch"))
    assert got.dtype == want.dtype == torch.float32 and relative_error(got, want) < TOLERANCE[torch.float16]


@DTYPE
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 8), (2, 33, 1, 64), (1, 3, 20, 24), (3, 7, 2, 6)])
def test_rope(shape, dtype):
    x, angles = torch.randn(shape, device=DEVICE), torch.randn(shape[1], shape[-1] // 2, device=DEVICE)
    tables = angles.cos(), angles.sin()

    def reference(x):
        return layers.apply_rope(x, *(t.cpu().double() for t in tables), impl="torch")

    compare_with_gradients(lambda x: layer_kernels.rope(x, *tables), reference, [x], dtype)
    for other in (spread(*shape), torch.randn(*shape[:2], *shape[:1:-1], device=DEVICE).transpose(2, 3), x[0]):
        got, want = layer_kernels.rope(other, *tables), reference(other.cpu().double())
        assert relative_error(got, want) < TOLERANCE[torch.float32]


@DTYPE
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 7), (2, 3, 130), (3, 2100), (100, 24)])
def test_silu_mul(shape, dtype):
    def reference(gate, up):
        return gate * torch.sigmoid(gate) * up

    gate, up = 3 * torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    compare_with_gradients(layer_kernels.silu_mul, reference, [gate, up], dtype)
    gate, up = spread(*shape), spread(*shape)
    assert relative_error(layer_kernels.silu_mul(gate, up), reference(gate, up)) < TOLERANCE[torch.float32]


@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 9), st.sampled_from(DTYPES))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_layers_of_any_sizes(M, D, H, dtype):
    seed_everything(M)
    test_rms_norm((M, D), dtype)
    test_silu_mul((M, D), dtype)
    test_rope((2, M, H, 2 * D), dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy: sigmoid is 1 / (1 + exp(-x))
def test_silu_of_large_numbers_does_not_overflow():
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], device=DEVICE, requires_grad=True)
    out = layer_kernels.silu_mul(gate, torch.ones_like(gate))
    out.sum().backward()
    assert out.tolist() == [0, 0, 0, 200, 1e4] and gate.grad.tolist() == [0, 0, 0.5, 1, 1]


@interpreted
def test_layers_move_their_inputs_and_outputs_once():
    x, weight, dy = torch.randn(700, 96).half(), torch.randn(96).half(), torch.randn(700, 96).half()
    (_, r), m = call(layer_kernels.rms_norm_forward, x, weight, 1e-6)
    assert (m.loaded, m.stored) == (x.nbytes + m.programs * weight.nbytes, x.nbytes + r.nbytes)
    _, back = call(layer_kernels.rms_norm_backward, x, weight, r, dy)
    assert back.loaded == x.nbytes + dy.nbytes + r.nbytes + back.programs * weight.nbytes
    assert back.stored == x.nbytes + back.programs * 96 * 4
    tables = torch.randn(2, 50, 12)
    _, turned = call(layer_kernels.rope, heads := torch.randn(2, 50, 6, 24), *tables)
    assert (turned.loaded, turned.stored) == (heads.nbytes + 2 * tables.nbytes, heads.nbytes)  # the tables, B times
    _, gated = call(layer_kernels.silu_mul, x, dy)
    assert (gated.loaded, gated.stored) == (x.nbytes + dy.nbytes, x.nbytes)
    assert all(met.out_of_bounds == [] for met in (m, back, turned, gated))


def test_the_layers_by_either_implementation():
    x, weight = torch.randn(2, 5, 3, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    tables = torch.randn(5, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    projections = torch.randn(6, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE), torch.randn(8, 6, device=DEVICE)
    for function, *rest in (
        (layers.rms_norm, weight, 0.1),
        (layers.apply_rope, *tables),
        (layers.swiglu, *projections),
    ):
        got, want = (function(x, *rest, impl=impl) for impl in ("triton", "torch"))
        assert relative_error(got, want) < TOLERANCE[torch.float32]


def test_what_the_layers_do_not_take():
    x = torch.zeros(3, 4, 2, 8)
    with pytest.raises(ValueError, match=r"give \[\.\.\.,D\] and \[D\]"):
        layer_kernels.rms_norm(x, torch.zeros(7), 1e-6)
    with pytest.raises(ValueError, match='takes fp32, fp16 and bf16: use impl="torch"'):
        layer_kernels.rms_norm(x.double(), torch.zeros(8), 1e-6)
    with pytest.raises(ValueError, match="rows of x have 20000 numbers; this kernel takes up to 16384"):
        layer_kernels.rms_norm(torch.zeros(1, 20000), torch.zeros(20000), 1e-6)
    with pytest.raises(ValueError, match=r"give \[\.\.\.,T,H,R\] and fp32 tables \[T,R/2\]"):
        layer_kernels.rope(x, torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="give two alike"):
        layer_kernels.silu_mul(x, x[0])
    with pytest.raises(ValueError, match="impl is 'cuda'; it must be one of auto, torch, triton"):
        layers.rms_norm(x, torch.zeros(8), 1e-6, impl="cuda")


# On a GPU alone --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [16, 32, 64, 128])
def test_published_sizes_on_a_gpu(H, dtype):
    agree(3, 1, H, 5000, 512, 64, [5000, 4096, 77], None, dtype, scale=0.05)
    agree(1, 2, H, 3000, 512, 64, [3000], 7, dtype, scale=0.05)


@pytest.mark.gpu
@on_a_gpu
def test_a_model_on_a_gpu_writes_what_it_writes_by_torch(monkeypatch):
    model = Transformer(ModelConfig.preset("tiny")).to(DEVICE).eval()
    prompt, calls, decode = torch.randint(0, 2048, (2, 40)), [], kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *args: calls.append(1) or decode(*args))
    by_kernels = generate(model, prompt, 30)
    assert len(calls) >= 29 * model.cfg.num_hidden_layers
    monkeypatch.setattr(triton_env, "compiles", lambda: False)
    assert torch.equal(by_kernels, generate(model, prompt, 30))
