"""The homework can be done with the package alone, and what a lesson says of its results is what comes out."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minids
from minids import accounting, lab, layers, mla, moe, triton_env
from minids.bench import ladder
from minids.fp8 import reference as fp8
from minids.lab import assemble
from minids.lab.tiles import tl, triton
from minids.numerics import TOLERANCE, relative_error
from minids.run import BALANCE

interpreted = pytest.mark.skipif(
    triton_env.mode() != "interpreter" or bool(triton_env.interpreter_fault()), reason="the meter needs the interpreter"
)
SOLUTIONS = Path(__file__).resolve().parents[1] / "solutions"


def says(lesson, *texts):
    """Whether the homework of a lesson ("00") has each of the `texts`."""
    (source,) = SOLUTIONS.glob(f"{lesson}_*.py")
    homework = source.read_text("utf-8").partition("## Homework")[2]
    return all(text in homework for text in texts)


# 00 ---------------------------------------------------------------------------------------------------------------


def test_00_1_one_row_waits_for_memory_on_every_gpu():
    flops, nbytes = 2 * 8192**2, 2 * (8192 + 8192**2 + 8192)
    assert says("00", f"{flops:,} FLOPs and {nbytes:,} bytes")
    for name in accounting.GPUS:
        seconds = accounting.roofline_seconds(flops, nbytes, name)
        assert seconds == nbytes / accounting.GPUS[name].bandwidth
        assert says("00", name, f"{seconds * 1e6:.0f} µs")
    assert says("00", f"{accounting.GPUS['H200'].bandwidth / accounting.GPUS['H100'].bandwidth:.2f} times slower")


def test_00_2_tokens_per_second_and_the_cache_that_weighs_as_much():
    cfg = minids.ModelConfig.preset("deepseek-v3")
    active, cached = accounting.parameters(cfg).active, accounting.kv_bytes_per_token(cfg, torch.bfloat16)
    seconds = active / accounting.GPUS["H200"].bandwidth
    assert says("00", f"{active / 1e9:.1f} billion", f"{seconds * 1e3:.1f} ms", f"{int(1 / seconds)} tokens")
    assert says("00", f"{round(active / cached, -3):,.0f} tokens")


# 01 ---------------------------------------------------------------------------------------------------------------


def test_01_1_one_key_and_value_for_all_heads():
    mha, mqa = (
        minids.ModelConfig.preset("tiny", n_routed_experts=0, **heads)
        for heads in ({"attention": "mha"}, {"attention": "gqa", "num_key_value_heads": 1})
    )
    least, most = accounting.kv_bytes_per_token(mqa), accounting.kv_bytes_per_token(mha)
    assert says("01", f"{least} bytes a token instead of {most:,}")
    least, most = accounting.parameters(mqa).total, accounting.parameters(mha).total
    assert says("01", f"({least:,} parameters, not {most:,})")


def test_01_2_the_mini_deepseek_beside_the_plain_model():
    tiny = minids.ModelConfig.preset("tiny")
    total, active = accounting.parameters(tiny)
    plain = accounting.parameters(minids.ModelConfig.preset("tiny", attention="mha", n_routed_experts=0)).active
    assert says("01", f"with {active:,} of its {total:,} parameters, and with {plain:,} of the first model's")
    assert says("01", f"{accounting.kv_bytes_per_token(tiny)} bytes a token")


# 02 ---------------------------------------------------------------------------------------------------------------


def test_02_1_a_cache_in_fewer_bits_moves_the_logits_by_its_digits():
    torch.manual_seed(0)
    model = minids.Transformer(minids.ModelConfig.preset("tiny", attention="gqa", n_routed_experts=0)).eval()
    tokens, logits = torch.randint(2048, (1, 50)), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        cache = model.new_cache(1, 64, dtype=dtype)
        with torch.no_grad():
            logits[dtype] = torch.cat([model(tokens[:, t : t + 1], cache) for t in range(50)], 1)
    exact, *rounded = logits.values()
    errors = [relative_error(one[:, -1], exact[:, -1]) for one in rounded]
    changed = [(one.argmax(-1) != exact.argmax(-1)).sum() for one in rounded]
    assert 1e-3 < errors[0] < 1e-2 < errors[1] < 1e-1 and 8 < errors[1] / errors[0] < 32
    assert changed[0] <= 1 <= changed[1] < 10
    assert says("02", "some thousandths", "some hundredths", "hardly a token changes", "2^4 = 16")


def test_02_2_users_of_a_published_model():
    cfg = accounting.published("llama-3.1-8b")
    weights, cached = 2 * accounting.parameters(cfg).total, accounting.kv_bytes_per_token(cfg)
    assert says("02", f"{cached:,} bytes per token", f"{weights / 1e9:.1f} GB of weights")
    small, large = (int((accounting.GPUS[name].memory - weights) // (8192 * cached)) for name in ("RTX 4090", "H200"))
    assert says("02", f"24 GB serves {small} such users", f"141 GB serves {large}")


# 03 ---------------------------------------------------------------------------------------------------------------


def test_03_1_a_narrower_latent_saves_cache_and_parameters():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "n_routed_experts": 0}
    sizes |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    configs = [minids.ModelConfig.preset("tiny", **sizes, kv_lora_rank=rank) for rank in (4, 8, 16, 48)]
    cached = [accounting.kv_elements_per_token(cfg) // 2 for cfg in configs]
    assert says("03", "{}, {}, {} and {} numbers per token and layer".format(*cached))
    least, *_, most = (accounting.parameters(cfg).total for cfg in configs)
    assert says("03", f"{most - least:,} parameters fewer")


def test_03_2_the_gqa_in_place_of_kimi_k2_s_mla():
    cfg = minids.ModelConfig.preset("kimi-k2")
    heads = (n for n in range(1, cfg.num_attention_heads + 1) if cfg.num_attention_heads % n == 0)
    options = ({"attention": "gqa", "num_key_value_heads": n, "head_dim": cfg.v_head_dim} for n in heads)
    rivals = (minids.ModelConfig.preset("kimi-k2", **option) for option in options)
    kept = accounting.kv_elements_per_token(cfg)
    gqa = next(rival for rival in rivals if accounting.kv_elements_per_token(rival) >= kept)
    assert says("03", f"One with {gqa.num_key_value_heads} heads", f"{kept // cfg.num_hidden_layers} numbers in a")
    ours, theirs = (cfg.max_position_embeddings * accounting.kv_bytes_per_token(one) / 1e9 for one in (cfg, gqa))
    assert says("03", f"{cfg.max_position_embeddings:,} tokens", f"MLA takes {ours:.1f} GB, that GQA {theirs:.1f} GB")


# 04 ---------------------------------------------------------------------------------------------------------------


def test_04_1_a_prompt_in_pieces():
    cfg, forms = minids.ModelConfig.preset("deepseek-v3"), ("expanded", "absorbed")
    sizes = {"H": cfg.num_attention_heads, "C": cfg.kv_lora_rank, "R": cfg.qk_rope_head_dim}
    sizes |= {"P": cfg.qk_nope_head_dim, "V": cfg.v_head_dim}

    def piece(n, end):
        return min(minids.mla.reference.decode_flops(form, **sizes, T=n, S=end) for form in forms)

    tera = {n: sum(piece(n, end) for end in range(n, 4097, n)) / 1e12 for n in (16, 64, 256, 1024, 4096)}
    best = min(tera, key=tera.get)
    assert says("04", f"{best}, with {tera.pop(best):.2f} TFLOP")
    assert says("04", "{:.2f}, {:.2f}, {:.2f} and {:.2f}".format(*tera.values()))


def test_04_2_the_crossover_of_small_and_of_a_narrow_latent():
    cfg = minids.ModelConfig.preset("small")
    C, P, V = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    wide, narrow = (minids.mla.reference.crossover(rank, P, V, 2048) for rank in (C, 64))
    assert P == V and says("04", f"C = {C} and P = V = {P}: the crossover is at {wide:.1f} new tokens")
    assert P + V == 2 * 64 and says("04", f"it is at S = {narrow:,.0f}")


# 05 ---------------------------------------------------------------------------------------------------------------


@interpreted
def test_05_1_swiglu_as_one_kernel_moves_three_tensors():
    from minids.layer_kernels import silu_mul

    gate, up = torch.randn(2, 64, 384)
    with lab.meter() as m:
        y = silu_mul(gate, up)
    assert relative_error(y, F.silu(gate) * up) < TOLERANCE[torch.float32]
    assert m.bytes == 3 * y.nbytes and not m.out_of_bounds
    assert says("05", f"{m.bytes:,} (three tensors of {y.nbytes:,} bytes)", f"{5 * y.nbytes:,} (five)", f"{5 / 3:.2f}")


@triton.jit
def add_norm_kernel(x, a, weight, h, y, M, N, eps, BLOCK: tl.constexpr):
    """h = x + a and y = rms_norm(h), rows p, p + P, ... of M; a block holds a row."""
    column = tl.arange(0, BLOCK)
    inside = column < N
    w = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        at = row * N + column
        value = tl.load(x + at, mask=inside, other=0.0) + tl.load(a + at, mask=inside, other=0.0)
        tl.store(h + at, value, mask=inside)
        r = 1.0 / tl.sqrt(tl.sum(value * value, 0) / N + eps)
        tl.store(y + at, value * r * w, mask=inside)


@interpreted
def test_05_2_add_and_norm_in_one_kernel_make_four_trips():
    (M, N), weight = (32, 1000), torch.rand(1000)
    x, a = torch.randn(2, M, N)
    h, y = torch.full((2, M, N), torch.nan)
    with lab.meter() as m:
        add_norm_kernel[(1,)](x, a, weight, h, y, M, N, 1e-5, BLOCK=1024)
    assert torch.equal(h, x + a)
    assert relative_error(y, layers.rms_norm(h, weight, 1e-5)) < TOLERANCE[torch.float32]
    assert m.bytes == 4 * x.nbytes + weight.nbytes and not m.out_of_bounds
    assert says("05", f"{m.bytes:,} bytes: 4 tensors of {x.nbytes:,}, and the weight, {weight.nbytes:,}")


# 06 ---------------------------------------------------------------------------------------------------------------


def test_06_1_a_shared_prompt_is_read_once():
    users, heads, shared, own, C, R = 10, 4, 200, 50, 32, 16
    q, prompt, rows = (torch.randn(n, m, C + R).double() for n, m in ((users, heads), (1, shared), (users, own)))
    scale = (C + R) ** -0.5
    both = torch.cat([prompt.expand(users, -1, -1), rows], 1)
    want, _ = mla.reference.decode_block(q, both, scale, C)
    out, lse = mla.reference.decode_block(q.view(1, users * heads, -1), prompt, scale, C)
    parts = (out.view(users, heads, C), lse.view(users, heads)), mla.reference.decode_block(q, rows, scale, C)
    got, _ = mla.reference.merge_splits(*(torch.stack(results) for results in zip(*parts, strict=True)))
    assert relative_error(got, want) < 1e-14
    plain, fewer = 1000 * (2000 + 500), 2000 + 1000 * 500
    assert says("06", f"{plain:,}/{fewer:,} = {plain / fewer:.2f} times", f"{plain * (512 + 64) * 8 / 1e9:.1f} GB")


def test_06_2_a_cache_that_fills_an_h200_and_one_long_sequence():
    cfg, h200 = minids.ModelConfig.preset("deepseek-v3"), accounting.GPUS["H200"]
    each = accounting.kv_bytes_per_token(cfg, torch.bfloat16)
    assert says("06", f"{each:,} bytes a position over {cfg.num_hidden_layers} layers")
    assert says("06", f"{h200.memory / each / 1e6:.1f} million positions fill {h200.memory / 1e9:.0f} GB")
    seconds = 131_072 * each / h200.bandwidth
    assert says("06", f"{131_072 * each / 1e9:.1f} GB: {1e3 * seconds:.1f} ms, {1 / seconds:.0f} tokens a second")


# 07 ---------------------------------------------------------------------------------------------------------------


def race_of_07(**changes):
    """The config of lesson 07's MoE, with changes."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    sizes |= {"attention": "mha", "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"n_routed_experts": 64, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    return minids.ModelConfig(**{**sizes, **changes})


def test_07_1_the_layer_is_a_small_part_beside_a_large_vocabulary():
    sizes = (300, 2048)
    active = [accounting.parameters(race_of_07(vocab_size=size)).active for size in sizes]
    layer = accounting.moe_parameters(race_of_07()).active
    assert says("07", "{:,} of {:,} active parameters in the race, of {:,} now".format(layer, *active))
    assert 64 * sizes[1] > (active[1] - layer) / 2 and says("07", "the head has most of the others")


def test_07_2_teams_and_routers_of_finer_experts_and_a_top_1_that_learns_balance_alone():
    shapes = [(16 * finer, 128 // finer, finer) for finer in (1, 2, 4, 8)]
    assert says("07", "{} experts of {} with top-{}".format(*shapes[0]))
    assert says("07", *("{} of {} with top-{}".format(*shape) for shape in shapes[1:]))
    names = ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")
    configs = [race_of_07(n_shared_experts=0, **dict(zip(names, shape, strict=True))) for shape in shapes]
    assert says("07", "{:,}, {:,}, {:,} and {:,} teams".format(*(math.comb(E, A) for E, _, A in shapes)))
    active = (accounting.parameters(cfg).active for cfg in configs)
    assert says("07", "not quite equal: {:,}, {:,}, {:,} and {:,}.".format(*active))
    for normalised in (True, False):
        configs[0].norm_topk_prob = normalised
        layer = minids.moe.MoE(configs[0])
        layer(torch.ones(1, 1, 64)).sum().backward()
        assert (layer.gate.weight.grad.abs().max() < 1e-6) == normalised


# 08 ---------------------------------------------------------------------------------------------------------------


def test_08_1_a_slower_bias_needs_more_steps():
    race = (SOLUTIONS / "08_balance.py").read_text("utf-8")
    assert "else 80), (2" in race and '"bias": (0, 0.005)' in race
    (rate, _), (_, loss) = BALANCE["bias"], BALANCE["loss"]
    assert says("08", f"moves by {rate} a step", f"{80 * 0.005}/{rate} = {80 * 0.005 / rate:.0f} steps")
    assert says("08", f"α = {loss['aux_loss_alpha']}")


def test_08_2_a_relative_deviation_is_one_up_at_most_and_e_over_a_less_one_down():
    load = torch.zeros(16)
    load[:2] = 64.0  # all of 64 tokens choose the same two experts
    relative = (load.mean() - load) / load.mean()
    assert relative.max() == 1 and relative.min() == -moe.reference.max_violation(load)
    assert says("08", "by γ upwards at most", f"(E/A − 1) γ = {-relative.min():.0f}γ downwards at most")


# 09 ---------------------------------------------------------------------------------------------------------------


def loads_of(indices, experts):
    """How many rows each expert has, by the plan."""
    ends = moe.reference.dispatch_plan(indices, experts).ends
    return torch.diff(ends, prepend=ends.new_zeros(1))


def test_09_1_what_room_for_a_fixed_number_of_rows_drops():
    generator = torch.Generator().manual_seed(0)  # the same numbers as after torch.manual_seed(0)
    scores = torch.randn(1024, 64, generator=generator) + 2 * (torch.arange(64) < 8)
    loads, room = loads_of(scores.topk(6).indices, 64), int(1.25 * 1024 * 6 / 64)
    dropped, n = (loads - room).clamp(min=0).sum().item(), 1024 * 6
    assert says(
        "09",
        f"{dropped:,}/{n:,} = {dropped / n:.1%}: each",
        f"{loads[:8].min()} rows or more, and room for {room}; the others",
    )
    assert says("09", f"the others have {loads[8:].max()} at most")


def padding(tokens, block=128, experts=256, top_k=8):
    """(rows, rows of padding) of an expert, on average: the loads of a fair router are binomial."""
    mean = tokens * top_k / experts
    spread = int(8 * mean**0.5)  # farther from the mean there is nothing
    loads = torch.arange(int(mean) - spread, int(mean) + spread, dtype=torch.float64)
    chance = torch.tensor(top_k / experts, dtype=torch.float64)
    chances = torch.distributions.Binomial(tokens, chance).log_prob(loads).exp()
    return mean, block * (chances * (loads / block).ceil()).sum().item() - mean


def test_09_2_a_fair_router_s_padding_goes_up_and_down():
    loads = loads_of(torch.rand(13_312, 256).topk(8).indices, 256)
    simulated = (128 * (loads / 128).ceil() - loads).mean().item()
    assert abs(simulated - padding(13_312)[1]) < 9  # five times what the mean of 256 experts scatters by
    assert says("09", f"M = {32 * (640 - 64):,}", f"√(M / 32) rows ({(640 - 64) ** 0.5:.0f} there)")
    rows, idle = padding(13_312)
    assert says("09", f"an expert has {rows:.0f} rows and {idle:.0f} of padding", f"{idle:.0f}/{rows + idle:.0f} = ")
    rows, idle = padding(15_360)
    assert says("09", f"it has {rows:.0f} and {idle:.0f}, {idle:.0f}/{rows + idle:.0f} = ")
    below = {tokens: 9 * idle < rows for tokens in range(8192, 32768, 256) for rows, idle in [padding(tokens)]}
    first, last = min(tokens for tokens in below if below[tokens]), max(tokens for tokens in below if not below[tokens])
    assert says("09", f"first at about {round(first, -3):,} tokens", f"from about {round(last, -3):,} on")


# 10 ---------------------------------------------------------------------------------------------------------------


def test_10_1_rounding_twice_is_not_rounding_once():
    x = torch.arange(16 * 64, 32 * 64) / 64
    twice, once = (y.to(torch.float8_e5m2).float() for y in (fp8.round_to_e4m3(x), x))
    begins = x[twice != once].floor().unique().int().tolist()
    assert torch.equal(twice != once, torch.isin(x.floor(), torch.tensor(begins).float()) & (x % 1 != 0))
    assert len(begins) == 16 / 4 and says("10", "A quarter: what lies between 18 and 19", "61,440")
    assert all(says("10", f"{n} and {n + 1}") for n in begins)
    assert torch.tensor([61439.0, 61440.0]).to(torch.float8_e5m2).float().tolist() == [57344.0, math.inf]


def test_10_2_bytes_and_what_narrow_tiles_gain():
    digits = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    formats = {
        "int8": (127, torch.round),
        "E4M3": (448, fp8.round_to_e4m3),
        "E2M1": (6, lambda y: y.sign() * digits[torch.bucketize(y.abs(), (digits[1:] + digits[:-1]) / 2)]),
    }
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    def snr(format, n):
        largest, turn = formats[format]
        tiles = x.unflatten(-1, (-1, n))
        scale = fp8.power_of_two_scale(tiles.abs().amax(-1, keepdim=True) / largest)
        return 10 * math.log10(x.square().sum() / (x - (turn(tiles / scale) * scale).flatten(-2)).square().sum())

    gains = {format: snr(format, 16) - snr(format, 256) for format in formats}
    assert abs(gains["E4M3"]) < 0.2 < 1 < min(gains["int8"], gains["E2M1"])
    assert snr("E4M3", 16) - snr("E2M1", 16) > 12
    wide, narrow = (1 + scale.itemsize / 16 for scale in (torch.float32, torch.float8_e8m0fnu))
    assert says("10", f"{wide} and {narrow} for n = 16", "2 · 6 = 12 dB less, or worse")


# 11 ---------------------------------------------------------------------------------------------------------------


def test_11_1_the_bits_of_an_exact_sum():
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    drawn = torch.randint(len(codes), (2, 4000, 32), generator=torch.Generator().manual_seed(0))
    products = fp8.decode_e4m3(codes[drawn]).double().prod(0)
    zero, exact = torch.zeros(4000, dtype=torch.float64), products.sum(-1)
    share = {bits: (fp8.add_limited(zero, products, bits) == exact).double().mean().item() for bits in (30, 34, 35, 36)}
    assert 0.4 < share[30] < 0.6 and 0.95 < share[34] < share[35] < share[36] == 1
    numbers = fp8.decode_e4m3(codes).double()
    ends = [math.frexp(n**2)[1] - 1 for n in (numbers.max().item(), numbers[numbers > 0].min().item())]
    assert says("11", "leads at 2^{}, the smallest one is 2^{}".format(*ends))
    assert says("11", "with 36 all: the largest product, 448²", f"there are {ends[0] - ends[1] + 1} places")


def test_11_2_rounding_to_the_nearest_unit():
    def nearest(acc, products):
        terms = torch.cat([acc.unsqueeze(-1), products], -1)
        unit = 2.0 ** (torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent - 14)
        return ((terms / unit).round() * unit).sum(-1)

    left = {}
    for K in (4096, 16384):
        a, b = fp8.round_to_e4m3(448 * torch.rand(2, 16, K, generator=torch.Generator().manual_seed(K)))
        acc, exact = torch.zeros(16, 16), a.double() @ b.double().T
        for k in range(0, K, fp8.STEP):
            acc = nearest(acc, a[:, None, k : k + fp8.STEP] * b[None, :, k : k + fp8.STEP])
        left[K] = relative_error(acc, exact) / relative_error(fp8.matmul_limited(a, b), exact)
    assert left[4096] < 0.1 < left[16384] and says("11", "at K = 4096 less than a tenth", "At K = 16,384 more is left")
    unit, products = 2.0 ** (math.frexp(exact.mean().item())[1] - 14), a * b
    assert (products < unit).double().mean() > 0.5 > (products < unit / 2).double().mean() > 0.4


# 12 ---------------------------------------------------------------------------------------------------------------


def test_12_2_neither_kind_of_scale_is_nearer_in_all_of_a_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
    model = minids.Transformer(minids.ModelConfig(**sizes, attention="mha", n_routed_experts=0))
    tokens, gradients = torch.randint(512, (2, 8, 65)).unbind(), {}
    for kind in (None, False, True):
        one = copy.deepcopy(model) if kind is None else minids.fp8.convert(copy.deepcopy(model), power_of_2=kind)
        one.loss(*(t[:, :64] for t in tokens))[0].backward()
        gradients[kind] = {name: p.grad for name, p in one.named_parameters() if p.dim() == 2}
    off = {
        name: [((gradients[kind][name] - exact).norm() / exact.norm()).item() for kind in (False, True)]
        for name, exact in gradients[None].items()
    }
    powers_nearer = [by_powers < by_amax for by_amax, by_powers in off.values()]
    assert any(powers_nearer) and not all(powers_nearer)
    assert all(0.8 < by_amax / by_powers < 1.25 and by_amax > 0.01 for by_amax, by_powers in off.values())
    assert "lm_head.weight" in off and type(one.lm_head) is torch.nn.Linear
    assert says("12", "The two are close, and which is nearer changes from matrix to matrix", "The head shows it")


# 13 ---------------------------------------------------------------------------------------------------------------


def test_13_1_the_new_step_has_as_many_active_parameters():
    rungs = ladder.rungs("tiny")
    new = accounting.parameters(minids.ModelConfig.preset("tiny", attention="mha")).active
    old = [accounting.parameters(rungs[name].cfg).active for name in ("MHA", "MLA", "MLA+MoE")]
    assert new < min(old) and max(old) < 1.02 * new
    assert says("13", f"{new:,} active parameters, the others up to {max(old):,}: less than 2 in 100 apart")


def test_13_2_a_part_that_gives_half_is_named_at_its_first_call(capsys):
    def half(of):
        return lambda *args: 0.5 * of(*args)

    own = {number: half(lab.exercises.find(number).reference) for number in ("01.1", "01.3")}
    parts = assemble.Parts(own=own)
    assert parts.all["rms_norm"].owner == "yours" and not capsys.readouterr().out
    assemble.MiniDeepSeek(minids.ModelConfig.preset("tiny", num_hidden_layers=1), parts)(torch.tensor([[1, 2, 3]]))
    said, why = capsys.readouterr().out.strip().splitlines()
    assert says("13", said) and "of the numbers that it gives here are not the reference's" in why
    assert parts.all["rms_norm"].owner == "reference" and parts.all["causal_attention"].owner == "yours"


# 14 ---------------------------------------------------------------------------------------------------------------


def test_14_1_kimi_k2_by_its_configuration():
    cfg = minids.ModelConfig.preset("kimi-k2")
    total, active = accounting.parameters(cfg)
    more = accounting.active_with_embedding(cfg)
    assert says("14", f"{total / 1e9:,.1f} billion parameters, {active / 1e9:.1f} active ({more / 1e9:.1f} with the")
    assert says("14", f"{accounting.kv_bytes_per_token(cfg):,} bytes")
    flops = accounting.train_flops_per_token(cfg, 4096)
    hours = accounting.gpu_hours(15e12 * flops, 0.4, "H800")
    assert says("14", f"{flops / 1e9:.1f} GFLOPs", f"{hours / 1e6:.2f} million GPU-hours")
    assert says("14", f"{2 * hours / 1e6:.2f} million dollars")
