"""The MoE layer against transformers' modules, the plain loop and plain Python."""

import copy

import pytest
import torch

from minids.config import ModelConfig
from minids.moe import Experts, Gate, MoE, reference
from minids.moe.layer import experts_gathered, experts_grouped
from minids.numerics import TOLERANCE, relative_error

ROUTERS = [  # E, A, n_group, topk_group
    (16, 4, 1, 1),
    (16, 4, 4, 2),
    (24, 6, 3, 1),
    (15, 3, 5, 3),
]


def v3(E=16, A=4, n_group=1, topk_group=1, **changes):
    sizes = {"n_routed_experts": E, "num_experts_per_tok": A, "n_group": n_group, "topk_group": topk_group}
    return ModelConfig(**{"hidden_size": 32, "moe_intermediate_size": 24, **sizes, **changes})


def v2(*sizes, method="greedy", **changes):
    changes = {"norm_topk_prob": False, "routed_scaling_factor": 16.0, **changes}
    return v3(*sizes, scoring_func="softmax", topk_method=method, **changes)


def randomise(moe):
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.uniform_(-3, -1)  # all biased scores negative: 0 would be the best of them
    return moe.eval()


def from_transformers(cfg, name):
    """transformers' MoE module of the same configuration, still with weights of its own."""
    module = pytest.importorskip(f"transformers.models.deepseek_{name}.modeling_deepseek_{name}")
    config = getattr(module, f"DeepseekV{name[1]}Config")(**cfg.to_hf())
    config._experts_implementation = "eager"
    return getattr(module, "DeepseekV3MoE" if name == "v3" else "DeepseekV2Moe")(config).eval()


CASES = [("v3", v3(*sizes, routed_scaling_factor=2.5)) for sizes in ROUTERS]
CASES += [("v3", v3(*ROUTERS[1], norm_topk_prob=False)), ("v2", v2(16, 4)), ("v2", v2(16, 4, 4, 2, n_shared_experts=2))]
CASES += [("v2", v2(*sizes, method="group_limited_greedy")) for sizes in ROUTERS[1:]]


@pytest.mark.parametrize(("name", "cfg"), CASES)
def test_router_and_layer_equal_transformers(name, cfg):
    theirs, ours = from_transformers(cfg, name), randomise(MoE(cfg))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 37, cfg.hidden_size)
    with torch.no_grad():
        _, want_gates, want_indices = theirs.gate(x)
        indices, gates, scores = ours.gate(x.flatten(0, 1))
        got, want = indices.sort(), want_indices.sort()
        assert torch.equal(got.values, want.values)
        assert relative_error(gates.gather(1, got.indices), want_gates.gather(1, want.indices)) < 1e-6
        assert (indices.dtype, gates.dtype, scores.shape) == (torch.int64, torch.float32, (111, cfg.n_routed_experts))
        assert relative_error(ours(x), theirs(x)) < TOLERANCE[torch.float32]


def test_bias_chooses_but_does_not_weigh():
    gate = Gate(v3(norm_topk_prob=False))
    gate.e_score_correction_bias[5] = 100.0
    indices, gates, scores = gate(torch.randn(9, 32))
    assert (indices == 5).any(1).all()
    assert torch.equal(gates, scores.gather(1, indices))


def test_logits_stay_float32_under_autocast_and_in_a_bf16_model():
    gate, x = Gate(v3()).eval(), torch.randn(50, 32)
    want = gate(x)[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x)[2], want)
    gate.e_score_correction_bias.fill_(0.001234)
    gate.bfloat16()
    assert gate.weight.dtype == torch.bfloat16 and gate.load.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, torch.full((16,), 0.001234))
    assert gate(x.bfloat16())[1].dtype == torch.float32


# Experts -----------------------------------------------------------------------------------------------------------

SIZES = [  # M, D, E, F, A
    (1, 8, 2, 8, 1),
    (5, 13, 3, 7, 2),
    (33, 24, 7, 20, 3),
    (40, 32, 16, 24, 4),
    (64, 30, 5, 9, 5),
]


def forward_and_gradients(function, dtype, sizes, indices):
    """Output and gradients of one `function(x, indices, gates, gate_up, down)`, the same inputs for every function."""
    (M, D, E, width, A), draw = sizes, torch.Generator().manual_seed(3)
    shapes = [(M, D), (M, A), (E, 2 * width, D), (E, D, width)]
    x, gates, *weights = [torch.randn(*shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    out = function(x, indices, gates, *weights)
    (out.float().square().sum() + out.sum()).backward()
    return [out] + [leaf.grad for leaf in (x, gates, *weights)]


def choices(M, E, A):
    return torch.rand(M, E).topk(A).indices


@pytest.mark.parametrize("fast", [experts_grouped, experts_gathered])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_fast_paths_equal_the_loop(fast, dtype, sizes):
    indices = choices(sizes[0], sizes[2], sizes[4])
    want = forward_and_gradients(reference.experts_loop, dtype, sizes, indices)
    for a, b in zip(forward_and_gradients(fast, dtype, sizes, indices), want, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("expert", [0, 2, 5])
def test_all_tokens_on_one_expert_leaves_the_others_without_gradient(expert):
    sizes, indices = (19, 16, 6, 8, 1), torch.full((19, 1), expert)
    want = forward_and_gradients(reference.experts_loop, torch.float32, sizes, indices)
    got = forward_and_gradients(experts_grouped, torch.float32, sizes, indices)
    assert all(relative_error(a, b) < TOLERANCE[torch.float32] for a, b in zip(got, want, strict=True))
    others = [e for e in range(6) if e != expert]
    assert not got[3][others].any() and not got[4][others].any()


def test_no_token_gives_no_row():
    empty = torch.zeros(0, 3, dtype=torch.int64)
    for run in (experts_grouped, experts_gathered, reference.experts_loop):
        assert run(torch.zeros(0, 16), empty, torch.zeros(0, 3), *Experts(4, 16, 8).parameters()).shape == (0, 16)


@pytest.mark.parametrize("M", [1, 50])
def test_impl(M):
    experts, x, indices, gates = Experts(8, 48, 40), torch.randn(M, 48), choices(M, 8, 2), torch.rand(M, 2)
    want = experts(x, indices, gates, impl="loop")
    for impl in ("auto", "torch"):
        assert relative_error(experts(x, indices, gates, impl=impl), want) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="one of auto, torch, loop, triton"):
        experts(x, indices, gates, impl="cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(x, indices, gates).dtype == torch.bfloat16
    double = experts.double()(x.double(), indices, gates)
    assert relative_error(double, want) < TOLERANCE[torch.float32] and double.dtype == torch.float64


def test_wrong_shapes_are_both_shown():
    experts = Experts(4, 16, 8)
    with pytest.raises(ValueError, match=r"x is \[3, 15\].*\[M,16\]"):
        experts(torch.zeros(3, 15), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"indices are \[3, 2\] and gates \[3, 1\]"):
        experts(torch.zeros(3, 16), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1))


def test_an_index_that_is_no_experts_is_said():
    experts, x, gates = Experts(4, 16, 8), torch.zeros(2, 16), torch.zeros(2, 2)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=rf"indices go from {min(wrong, 0)} to {max(wrong, 1)}; .* are 0 to 3"):
            experts(x, torch.tensor([[0, 1], [wrong, 1]]), gates)


EVERY = [v3(), v3(16, 4, 4, 2), v3(norm_topk_prob=False), v2(), v2(16, 4, 4, 2, method="group_limited_greedy")]


@pytest.mark.parametrize("cfg", EVERY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_reach_no_other_token_and_no_other_memory(cfg, value):
    moe, logits = randomise(MoE(cfg)), torch.randn(6, 16)
    want, _, _ = moe.gate.route(logits.clone())
    logits[2, 5], logits[4] = value, value
    indices, gates, _ = moe.gate.route(logits)
    assert indices.min() >= 0 and indices.max() < 16
    assert all(len(set(row)) == 4 for row in indices.tolist())
    others = [0, 1, 3, 5]
    assert torch.equal(indices[others], want[others]) and gates[others].isfinite().all()
    out = moe.experts(torch.randn(6, 32), indices, gates)
    assert out[others].isfinite().all()
    if value != value:  # never routed in silence
        assert gates[2].isnan().any() and gates[4].isnan().all() and out[[2, 4]].isnan().all()
    elif value < 0 and cfg.scoring_func == "sigmoid":  # all scores 0: this token gets nothing of the routed experts
        assert not gates[4].any() and not out[4].any()


# Balance -----------------------------------------------------------------------------------------------------------


def plain_balance_loss(scores, top_k, alpha):
    """V3 eq. 17-20 with lists, for scores [B][T][E]."""
    losses = []
    for sequence in scores:
        T, E = len(sequence), len(sequence[0])
        f, P = [0.0] * E, [0.0] * E
        for s in sequence:
            for i in sorted(range(E), key=lambda i: -s[i])[:top_k]:
                f[i] += E / (top_k * T)
            for i in range(E):
                P[i] += s[i] / sum(s) / T
        losses.append(alpha * sum(a * b for a, b in zip(f, P, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "cfg", [v3(aux_loss_alpha=0.1), v3(12, 5, 3, 2, aux_loss_alpha=0.1), v2(7, 2, aux_loss_alpha=1)]
)
def test_balance_loss_equals_plain_python(cfg):
    moe, x = randomise(MoE(cfg)).train(), torch.randn(3, 11, 32)
    moe(x)
    scores = moe.gate(x.flatten(0, 1))[2].view(3, 11, -1)
    want = plain_balance_loss(scores.double().tolist(), cfg.num_experts_per_tok, cfg.aux_loss_alpha)
    assert moe.balance_loss.shape == () and moe.balance_loss.item() == pytest.approx(want, rel=1e-5)
    moe.balance_loss.backward()
    assert moe.gate.weight.grad.abs().max() > 0
    copy.deepcopy(moe)
    moe.eval()(x)
    assert moe.balance_loss is None


def test_balance_loss_is_alpha_in_perfect_balance():
    indices = torch.arange(8).view(1, 4, 2)
    assert torch.equal(reference.load_fractions(indices, 8), torch.ones(1, 8))
    assert reference.balance_loss(torch.full((1, 4, 8), 0.3), indices, 0.5).item() == pytest.approx(0.5)


def test_bias_update_raises_idle_experts_and_lowers_busy_ones():
    gate = Gate(v3(4, 1))
    gate.load.copy_(torch.tensor([3.0, 3.0, 6.0, 0.0]))
    violation = gate.update_bias(0.001)
    assert torch.equal(gate.e_score_correction_bias, torch.tensor([0.0, 0.0, -0.001, 0.001]))
    assert violation.shape == () and violation.item() == 1.0
    assert not gate.load.any() and gate.update_bias(0.001) == 0.0


def test_bias_updates_balance_a_gate():
    gate, x = Gate(v3(8, 2)), torch.randn(256, 32) + 1.0
    torch.nn.init.normal_(gate.weight, std=0.3)
    history = []
    for _ in range(200):
        gate(x)
        history.append(gate.update_bias(0.01).item())
    assert history[-1] < 0.3 < 1.0 < history[0]


def test_load_counts_choices_in_training_only():
    gate, x = Gate(v3()), torch.randn(21, 32)
    indices = gate(x)[0]
    gate(x)
    gate.eval()(x)
    assert torch.equal(gate.load, 2.0 * indices.flatten().bincount(minlength=16))
    assert set(gate.state_dict()) == {"weight", "e_score_correction_bias"}
    assert set(Gate(v2()).state_dict()) == {"weight"} and Gate(v2()).train().update_bias(0.1) == 0.0


def test_layer_without_shared_experts_and_in_every_impl():
    moe, x = randomise(MoE(v3(n_shared_experts=0))), torch.randn(2, 17, 32)
    assert moe.shared_experts is None
    assert relative_error(moe(x), moe(x, impl="loop")) < TOLERANCE[torch.float32]
    moe = MoE(v3(aux_loss_alpha=0.0)).train()
    moe(x)
    assert moe.balance_loss == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_equals_the_loop_and_never_waits():
    moe, x = randomise(MoE(v3())).cuda().bfloat16().train(), torch.randn(2, 100, 32, device="cuda").bfloat16()
    moe(x).sum().backward()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = moe(x)
        (out.sum() + moe.balance_loss).backward()
        moe.gate.update_bias(0.001)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moe.gate.e_score_correction_bias.uniform_(-3, -1)
    assert relative_error(moe(x), moe(x, impl="loop")) < TOLERANCE[torch.bfloat16]
