"""The Linear that trains in FP8: its error is what the format predicts, it keeps bytes, and a model converts."""

import copy
import logging
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minids import fp8, triton_env
from minids.config import ModelConfig
from minids.decode import find_step
from minids.fp8 import Fp8Linear, convert, emulate, grouped_linear, layer, reference
from minids.fp8.reference import E4M3
from minids.generate import generate
from minids.layers import rope_tables
from minids.mla import MLA
from minids.mla import layer as mla_layer
from minids.model import Block, Transformer
from minids.numerics import relative_error

# A number v = 2^e (1 + f) lies in steps of 2^(e-3), so its rounding error is even in +-2^(e-4): mean square 2^2e / 768.
# Over many scales f is spread as log2(1 + f), so the mean of 2^2e / v^2 = 1 / (1 + f)^2 is 3 / (8 ln 2).
ROUNDING = math.sqrt(3 / (8 * math.log(2)) / 768)  # relative, root mean square: 0.0265
# A product a b of factors with such errors, independent of one another: (1 + r)^2 has the variance 2 r^2; a sum of many
# grows with them, so the sum's relative error is the same.
PRODUCT = math.sqrt(2) * ROUNDING  # 0.0375
SHAPES = [(5, 3), (130, 300), (256, 64), (128, 128), (0, 128), (1, 1), (300, 130)]
both = pytest.mark.parametrize("power_of_2", [True, False])


def rms_error(got, want):
    """The root mean square of got - want over that of want."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def same(got, want):
    """Whether two tensors hold the same values, NaN included."""
    return got.shape == want.shape and torch.equal(got.float().nan_to_num(7e7), want.float().nan_to_num(7e7))


def random(*shape, dtype=torch.float32):
    """Numbers whose rows differ in size, with what is special in some."""
    x = torch.randn(shape) * torch.randn(*shape[:-1], 1).mul(3).exp()
    if len(x) > 4:
        x[0, 0], x[1, -1], x[2, 0], x[3], x[4] = math.nan, math.inf, -0.0, 0, 1e-41
    return x.to(dtype)


def gradients(module, x, dy):
    """(y, dx, dW) of a Linear."""
    x = x.clone().requires_grad_()
    module.weight.grad = None
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad, module.weight.grad


def twin(linear, **options):
    """An Fp8Linear with the same Parameter."""
    other = Fp8Linear(linear.in_features, linear.out_features, **options)
    other.weight = linear.weight
    return other


# Emulation ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_emulated_quantisers_give_the_references_bits(shape, dtype, power_of_2):
    x = random(*shape, dtype=dtype)
    got = emulate.quantize_tiles(x, power_of_2, both=True) + emulate.quantize_blocks(x, power_of_2, transposed=True)
    blocks = reference.quantize_blocks(x, power_of_2)
    want = reference.quantize_tiles(x, power_of_2) + reference.quantize_tiles(x.T, power_of_2)
    want += blocks + tuple(t.T for t in blocks)
    assert all(map(same, got, want))
    x_fp8, x_scale = want[:2]
    assert same(emulate.dequantize(x_fp8, x_scale, torch.float32), reference.dequantize_tiles(x_fp8, x_scale))
    assert same(emulate.dequantize_blocks(*blocks, torch.float32), reference.dequantize_blocks(*blocks))
    again = reference.quantize_tiles(reference.dequantize_tiles(x_fp8, x_scale).T, power_of_2)
    assert all(map(same, emulate.requantize_transposed(x_fp8, x_scale, power_of_2), again))


def test_emulated_quantisers_round_every_kind_of_number_as_the_reference():
    """All bf16 patterns, as they are and times 1 +- 2^-12, in a tile whose scale is 1: ties, subnormals, overflow."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 448]
    x = torch.cat([x, x * (1 + 2**-12), x * (1 - 2**-12)]).clamp(-448, 448)
    x = nn.functional.pad(nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127), (1, 0), value=448.0)
    got, scale = emulate.quantize_tiles(x, True)
    assert torch.equal(scale, torch.ones(len(x), 1))
    assert torch.equal(got.view(torch.uint8), reference.round_to_e4m3(x).to(E4M3).view(torch.uint8))


@both
def test_emulated_products_are_the_references(power_of_2):
    x, w, dy = torch.randn(150, 200), torch.randn(130, 200), torch.randn(150, 130)
    linear = Fp8Linear(200, 130, power_of_2=power_of_2)
    linear.weight.data = w
    x_fp8, w_fp8 = reference.quantize_tiles(x, power_of_2), reference.quantize_blocks(w, power_of_2)
    want = (
        reference.fprop(*x_fp8, *w_fp8),
        reference.dgrad(*reference.quantize_tiles(dy, power_of_2), *w_fp8),
        reference.wgrad(dy, *x_fp8, power_of_2),
    )
    for got, oracle in zip(gradients(linear, x, dy), want, strict=True):
        assert relative_error(got, oracle) < 1e-5
    y = emulate.matmul_blockscaled(*x_fp8, *w_fp8, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and relative_error(y, want[0]) < 2**-8


def test_the_byte_of_nan_stays_nan():
    w = torch.tensor([[0x7F, 0xFF, 0x7E]], dtype=torch.uint8).view(E4M3)
    w = emulate.dequantize_blocks(w, torch.ones(1, 1))
    assert w.isnan().tolist() == [[True, True, False]] and w[0, 2] == 448


@pytest.mark.parametrize("codes", [(256, 256), (576, 200)])
def test_scales_of_the_wrong_shape_are_refused(codes):
    w = torch.zeros(codes).to(E4M3)
    for shape in ((1, 1), (4, 1), (codes[0],), (2, codes[1])):
        with pytest.raises(ValueError, match=r"their scales \[.*\]; give \[.*\] \(blocks\) or \[.*\] \(tiles\)"):
            emulate.dequantize_blocks(w, torch.ones(shape))


# Kernels ------------------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(triton_env.mode() != "interpreter", reason="Triton's interpreter is not there")
ENDS = torch.tensor([0, 70, 70, 201, 210], dtype=torch.int32)  # of 5 experts: two have no rows, one has two tiles


@needs_triton
@both
def test_kernels_and_emulation_agree(power_of_2):
    x, w, dy = random(70, 150), torch.randn(130, 150), torch.randn(70, 130)
    x[:2] = 1
    linear = nn.Linear(150, 130, bias=False)
    linear.weight.data = w
    results = [gradients(twin(linear, power_of_2=power_of_2, impl=impl), x, dy) for impl in ("triton", "torch")]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) < 1e-5


@needs_triton
@both
def test_kernels_and_emulation_agree_on_experts(power_of_2):
    x, w, dy = torch.randn(210, 40), torch.randn(5, 130, 40), torch.randn(210, 130)
    results = []
    for impl in ("triton", "torch"):
        x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = grouped_linear(x_, w_, ENDS, power_of_2=power_of_2, impl=impl)
        y.backward(dy)
        results.append((y.detach(), x_.grad, w_.grad))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-5
    columns = [e.quantize_tiles(dy, power_of_2, both=True, ends=ENDS)[2:] for e in (layer.kernels(), emulate)]
    assert all(map(same, *columns))


def test_a_gpu_without_fp8_emulates_unless_kernels_are_asked_for(monkeypatch):
    monkeypatch.setattr(triton_env, "compiles", lambda: True)
    monkeypatch.setattr(triton_env, "mode", lambda: "gpu")
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    for capability, native in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (layer.find_engine("auto", x) is layer.kernels()) == native
        assert layer.find_engine("torch", x) is emulate
        assert layer.find_engine("triton", x) is layer.kernels()
    monkeypatch.setattr(triton_env, "gpu", lambda _: (80, 108))
    with pytest.raises(triton_env.TritonUnavailable, match=r"sm_89 or newer .* this one is sm_80"):
        layer.kernels().quantize_tiles(torch.ones(2, 2))


def test_emulation_is_said_once(caplog):
    layer.say_emulated.cache_clear()
    with caplog.at_level(logging.WARNING, "minids"):
        for _ in range(3):
            Fp8Linear(3, 2)(torch.ones(1, 3))
        Fp8Linear(3, 2, impl="torch")(torch.ones(1, 3))
    assert [record.message[:16] for record in caplog.records] == ["FP8 is emulated:"]
    with pytest.raises(ValueError, match="impl is 'cuda'; it must be one of auto, torch, triton"):
        Fp8Linear(3, 2, impl="cuda")(torch.ones(1, 3))


# The Linear ---------------------------------------------------------------------------------------------------------


@both
def test_errors_are_those_that_the_format_predicts(power_of_2):
    """y, dx and dW are off by sqrt(2) r, r the rounding of one factor (see above), whatever the length of the sum.

    Numbers too small for a tile's normal range are rounded worse; they add next to nothing to a sum of normal numbers.
    Wgrad's x is rounded twice. Between powers of 2 the second rounding finds the number where it is; with amax / 448
    the two add up, to sqrt(3) r if they were independent, and to less where tiles share a scale.
    """
    x, w, dy = torch.randn(512, 640), torch.randn(384, 640), torch.randn(512, 384)
    linear = Fp8Linear(640, 384, power_of_2=power_of_2)
    linear.weight.data = w
    y, dx, dw = gradients(linear, x, dy)
    x, w, dy = x.double(), w.double(), dy.double()
    assert 0.93 * PRODUCT < rms_error(y, x @ w.T) < 1.07 * PRODUCT
    assert 0.93 * PRODUCT < rms_error(dx, dy @ w) < 1.07 * PRODUCT
    low, high = (0.93, 1.07) if power_of_2 else (1.1, math.sqrt(1.5) * 1.03)
    assert low * PRODUCT < rms_error(dw, dy.T @ x) < high * PRODUCT
    assert dw.dtype == torch.float32 and not torch.equal(dw, dw.bfloat16().float())


@both
def test_no_error_is_larger_than_the_format_allows(power_of_2):
    """A factor is off by at most 2^-4 of itself, or by half a step of the subnormals: 2^-10 of its scale."""
    x, w = torch.randn(60, 300) * torch.randn(60, 300).mul(3).exp(), torch.randn(140, 300)
    linear = Fp8Linear(300, 140, power_of_2=power_of_2)
    linear.weight.data = w
    y = linear(x).detach().double()
    x_most = x.abs() * 2**-4 + 2**-9 / 448 * x.abs().amax(1, keepdim=True)  # a scale is below amax / 448 * 2
    w_most = w.abs() * 2**-4 + 2**-9 / 448 * w.abs().amax()
    most = x_most @ w.abs().T + x.abs() @ w_most.T + x_most @ w_most.T
    error = (y - x.double() @ w.double().T).abs()
    assert (error <= most * (1 + 1e-6)).all() and error.max() > 0


def saved_bytes(run):
    """{storage: bytes} of the tensors that autograd keeps while `run()` computes."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # alive until all is counted, so that no storage is counted under another's address
    return kept, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_byte_a_number_and_scales_are_kept_for_backward(dtype):
    M, K, N = 1024, 512, 256
    weights = N * K + 4 * (N // 128) * (K // 128)
    x, linears = torch.randn(M, K, dtype=dtype, requires_grad=True), [Fp8Linear(K, N) for _ in range(2)]
    kept, _ = saved_bytes(lambda: linears[0](x))
    assert sum(kept.values()) == M * K + 4 * M * (K // 128) + weights
    x = x.detach().requires_grad_()
    kept, _ = saved_bytes(lambda: [linear(x) for linear in linears])  # the second one keeps the first one's x
    assert sum(kept.values()) == M * K + 4 * M * (K // 128) + 2 * weights
    temporary = x * 1
    alive, y = weakref.ref(temporary), linears[0](temporary)
    del temporary
    assert alive() is None and y.grad_fn is not None, "x itself is let go"
    kept, _ = saved_bytes(lambda: nn.functional.linear(x, linears[0].weight.to(dtype)))
    assert sum(kept.values()) >= M * K * dtype.itemsize, "a plain Linear keeps x itself"


def test_a_changed_x_is_quantised_anew():
    linear, x = Fp8Linear(64, 32, impl="torch"), torch.randn(8, 64)
    before = linear(x)
    assert torch.equal(linear(x), before)
    x.mul_(2)
    assert torch.equal(linear(x), 2 * before)
    with torch.inference_mode():
        x = torch.randn(8, 64)
        assert torch.equal(linear(x), linear(x.clone()))


def test_nan_and_infinity_never_become_finite():
    linear, x, dy = Fp8Linear(300, 140), torch.randn(300, 300), torch.randn(300, 140)
    for bad in (math.nan, math.inf, -math.inf):
        one = x.clone()
        one[7, 290] = bad
        y, _, dw = gradients(linear, one, dy)
        assert y[7].isnan().all() and y[torch.arange(300) != 7].isfinite().all()
        assert dw[:, 256:].isnan().all(), "the tile of 1x128 that holds it"
        other = dy.clone()
        other[7, 100] = bad
        _, dx, dw = gradients(linear, x, other)
        assert dx[7].isnan().all() and dw[100].isnan().all() and dw[:100].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 3, 37), (0, 37), (2, 0, 37)])
def test_dtypes_and_shapes(dtype, shape):
    linear, x = Fp8Linear(37, 11, bias=True), torch.randn(shape, dtype=dtype, requires_grad=True)
    y = linear(x)
    assert y.shape == (*shape[:-1], 11) and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == dtype and linear.weight.grad.dtype == torch.float32
    assert linear.bias.grad is not None
    plain = nn.functional.linear(x.detach().double(), linear.weight.double(), linear.bias.double())
    assert not y.numel() or relative_error(y, plain) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    assert linear.bfloat16()(x.detach().bfloat16()).dtype == torch.bfloat16


def test_autocast_around_backward_changes_nothing():
    linear, x = Fp8Linear(256, 128), torch.randn(64, 256)
    losses = []
    for inside in (False, True):
        linear.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        losses.append(linear.weight.grad)
    assert torch.equal(*losses)


def test_what_does_not_fit_is_named():
    linear = Fp8Linear(200, 100)
    with pytest.raises(ValueError, match=r"x is \[3, 100\]; the weight is \[100, 200\] and takes \[\.\.\.,200\]"):
        linear(torch.ones(3, 100))
    with pytest.raises(ValueError, match=r"the weight is torch\.float8_e4m3fn without its scales"):
        copy.deepcopy(linear).to(E4M3)(torch.ones(3, 200))
    linear.weight_scale_inv = nn.Parameter(torch.ones(1, 2), requires_grad=False)
    with pytest.raises(ValueError, match="float32 beside the scales of E4M3; a model kept in FP8 is not cast"):
        linear(torch.ones(3, 200))


def test_a_weight_that_is_not_trained_keeps_no_x():
    linear, x = Fp8Linear(256, 128), torch.randn(1024, 256, requires_grad=True)
    linear.weight.requires_grad_(False)
    kept, y = saved_bytes(lambda: linear(x))
    assert sum(kept.values()) == 256 * 128 + 4 * 2
    y.sum().backward()
    assert x.grad is not None and linear.weight.grad is None


# Experts ------------------------------------------------------------------------------------------------------------


@both
def test_each_expert_is_a_linear_of_its_own(power_of_2):
    """So the tiles of its weight gradient hold no other expert's rows, whatever these are."""
    x, w, dy = torch.randn(210, 40), torch.randn(5, 130, 40), torch.randn(210, 130)
    x[:70] *= 1e6  # the first tile of 128 rows would take their scale
    x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = grouped_linear(x_, w_, ENDS, power_of_2=power_of_2)
    y.backward(dy)
    begin = 0
    for e, end in enumerate(ENDS.tolist()):
        linear = Fp8Linear(40, 130, power_of_2=power_of_2)
        linear.weight.data = w[e]
        if end == begin:
            assert not w_.grad[e].any()
            continue
        want = gradients(linear, x[begin:end], dy[begin:end])
        for got, one in zip((y[begin:end], x_.grad[begin:end], w_.grad[e]), want, strict=True):
            assert relative_error(got, one) < 1e-6
        begin = end


def test_no_rows_at_all():
    x, w = torch.zeros(0, 40, requires_grad=True), torch.randn(5, 13, 40, requires_grad=True)
    grouped_linear(x, w, torch.zeros(5, dtype=torch.int32)).sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()


# A model ------------------------------------------------------------------------------------------------------------


def small(**changes):
    sizes = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    sizes |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "initializer_range": 0.2}
    return ModelConfig(**{**sizes, **changes})


MODELS = [
    {},
    {"q_lora_rank": 24, "attention_bias": True},
    {"attention": "gqa", "num_key_value_heads": 2},
    {"n_routed_experts": 0, "tie_word_embeddings": True},
    {"moe_intermediate_size": 128, "hidden_size": 130, "num_attention_heads": 2},
]


def tokens(batch=2, length=24):
    return torch.randint(0, 61, (batch, length))


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids)


@pytest.mark.parametrize("changes", MODELS)
def test_convert_takes_linears_and_experts_and_keeps_parameters(changes):
    model = Transformer(small(**changes))
    parameters, names, ids = dict(model.named_parameters()), set(model.state_dict()), tokens()
    before = logits(model, ids)
    hooked = []
    model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: hooked.append(1))
    assert convert(model) is model
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert set(model.state_dict()) == names
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["lm_head"] is nn.Linear and kinds["embed_tokens"] is nn.Embedding
    plain = [name for name, kind in kinds.items() if kind is nn.Linear]
    assert plain == ["lm_head"] and Fp8Linear in kinds.values()
    after = logits(model, ids)
    assert hooked and 0.005 < relative_error(after, before) < 0.5
    assert torch.equal(logits(convert(model), ids), after), "converting twice is harmless"
    exact = logits(convert(copy.deepcopy(model), power_of_2=False), ids)
    assert not torch.equal(exact, after)
    assert torch.equal(logits(model, ids), after), "the copy is another's"


@pytest.mark.parametrize("changes", MODELS)
def test_a_converted_model_trains_and_its_state_comes_back(changes):
    model = convert(Transformer(small(**changes)).train())
    optimizer, ids, losses = torch.optim.Adam(model.parameters(), 3e-3), tokens(4), []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss, cross_entropy = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(cross_entropy.item())
    assert losses[-1] < 0.9 * losses[0]
    other = convert(Transformer(small(**changes)))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    plain = Transformer(small(**changes))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert relative_error(logits(plain, ids), logits(model, ids)) < 0.5


@pytest.mark.parametrize(
    "model", [nn.Embedding(3, 4), nn.Sequential(nn.ReLU()), nn.ModuleDict({"gate": nn.Linear(2, 2)})]
)
def test_nothing_to_convert_is_said(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no nn.Linear or Experts to convert"):
        convert(model)


def test_a_single_linear_converts():
    linear = convert(nn.Linear(4, 3))
    assert type(linear) is Fp8Linear and linear(torch.ones(2, 4)).shape == (2, 3)


def test_experts_with_a_width_of_whole_blocks_take_one_product_for_gate_and_up(monkeypatch):
    seen = []
    monkeypatch.setattr(layer, "product", lambda *a, plain=layer.product: seen.append(a[1].shape) or plain(*a))
    for width, calls in ((128, 2), (64, 3)):
        model = convert(Transformer(small(moe_intermediate_size=width)))
        experts, seen[:] = model.moe_layers()[0].experts, []
        x, indices, gates = torch.randn(9, 48), torch.randint(0, 6, (9, 2)), torch.rand(9, 2)
        got = experts(x, indices, gates)
        want = type(experts).forward(plain_twin(experts, width), x, indices, gates)
        assert len(seen) == calls and 0.005 < relative_error(got, want) < 0.2


def plain_twin(experts, width):
    """The same experts, not converted."""
    other = type(experts)(6, 48, width)
    other.load_state_dict(experts.state_dict())
    return other


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 24}, {"attention": "gqa", "num_key_value_heads": 2}])
def test_decoding_is_fp8_too(changes, monkeypatch):
    """Token by token through the cache gives what one pass gives: no fast path computes with the masters.

    The absorbed form does not quantise the latents, so it is the expanded one that is compared.
    """
    monkeypatch.setattr(mla_layer, "absorbing_pays", lambda *_: False)
    model, ids = convert(Transformer(small(**changes))).eval(), tokens(1, 20)
    with torch.no_grad():
        want, cache = model(ids), model.new_cache(1, 20)
        got = torch.cat([model(ids[:, :8], cache)] + [model(ids[:, t : t + 1], cache) for t in range(8, 20)], 1)
    plain = Transformer(small(**changes)).eval()
    plain.load_state_dict(model.state_dict())
    assert relative_error(got, want) < 0.02 < relative_error(logits(plain, ids), want)
    monkeypatch.undo()
    assert generate(model, ids, 5).shape == (1, 25)


def test_the_flat_step_refuses_converted_experts():
    model, ids = Transformer(small()).eval(), tokens(1, 8)
    for part in (None, model.layers[1].mlp.experts, model.layers[0].self_attn.o_proj):
        if part is not None:
            convert(part)
        with torch.no_grad():
            cache = model.new_cache(1, 20)
            model(ids, cache)
            step = find_step(model, ids[:, :1], cache, (Transformer, Block))
        assert bool(step) == (part is None)


def test_absorbed_attention_multiplies_the_quantised_weight():
    cfg = small(kv_lora_rank=160)
    attn = MLA(cfg)
    nn.init.normal_(attn.kv_b_proj.weight)
    plain = copy.deepcopy(attn)
    weight = reference.dequantize_blocks(*reference.quantize_blocks(attn.kv_b_proj.weight.detach(), True))
    assert 0.01 < relative_error(weight, attn.kv_b_proj.weight) < 2**-4
    plain.kv_b_proj.weight.data = weight
    convert(attn)
    assert torch.equal(attn.kv_b_proj.dequantized(), weight)
    x, (cos, sin) = torch.randn(1, 5, 48), rope_tables(cfg, torch.arange(5))
    with torch.no_grad():
        q, latents = plain.queries(x, cos, sin), plain.latents(x, cos, sin)
    assert torch.equal(attn.absorbed(*q, latents), plain.absorbed(*q, latents))
    attn.absorbed(*q, latents).sum().backward()
    plain.absorbed(*q, latents).sum().backward()
    assert torch.equal(attn.kv_b_proj.weight.grad, plain.kv_b_proj.weight.grad)


def test_torch_compile_works_around_it():
    net = nn.Sequential(Fp8Linear(64, 96), nn.SiLU(), Fp8Linear(96, 32))
    compiled, x, grads = torch.compile(net, backend="eager"), torch.randn(10, 64), []
    for run in (net, compiled):
        net.zero_grad()
        run(x.clone()).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert torch.equal(compiled(x), net(x)) and all(map(torch.equal, *grads))


def test_public_names():
    assert fp8.kernels.matmul_blockscaled and fp8.quantize_kernels.quantize_tiles
    with pytest.raises(AttributeError, match=r"minids\.fp8 has no 'nothing'; it has Fp8Linear, convert"):
        fp8.nothing  # noqa: B018
