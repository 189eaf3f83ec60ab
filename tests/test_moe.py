"""The MoE layer against transformers' modules, the plain loop and plain Python."""

import pytest
import torch

from minids.config import ModelConfig
from minids.moe import Gate, MoE
from minids.numerics import TOLERANCE, relative_error, seed_everything

ROUTERS = [  # E, A, n_group, topk_group
    (16, 4, 1, 1),
    (16, 4, 4, 2),
    (24, 6, 3, 1),
    (15, 3, 5, 3),
]


@pytest.fixture(autouse=True)
def seed():
    seed_everything(7)


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
