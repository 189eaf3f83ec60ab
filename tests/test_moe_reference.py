"""The equations of minids/moe/reference.py by themselves: group limit, whole layer, parameters of a layer."""

import pytest
import torch

from minids import ModelConfig, accounting
from minids.moe import MoE, reference
from minids.numerics import TOLERANCE, relative_error

GROUPS = [  # E, n_group, topk_group, A
    (16, 4, 2, 4),
    (24, 3, 1, 6),
    (15, 5, 3, 3),
    (64, 8, 4, 8),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def biased_scores(E, rows=40):
    """(logits, bias, biased scores), all of the last below 0."""
    logits, bias = normal(rows, E), -1.2 - normal(E, seed=1).abs()
    return logits, bias, logits.sigmoid() + bias


@pytest.mark.parametrize(("E", "n_group", "topk_group", "A"), GROUPS)
def test_group_limit_chooses_as_transformers_where_all_scores_are_negative(E, n_group, topk_group, A):
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    sizes = {"n_routed_experts": E, "n_group": n_group, "topk_group": topk_group, "num_experts_per_tok": A}
    theirs = module.DeepseekV3TopkRouter(module.DeepseekV3Config(hidden_size=E, **sizes))
    logits, bias, biased = biased_scores(E)
    assert (biased < 0).all()
    with torch.no_grad():
        theirs.weight.copy_(torch.eye(E))  # what goes in are the logits
        theirs.e_score_correction_bias.copy_(bias)
        want = theirs(logits)[2].sort(-1).values
    limited = reference.group_limit(biased, n_group, topk_group)
    assert torch.equal(limited.topk(A, -1).indices.sort(-1).values, want)
    zeros = limited.masked_fill(limited.isinf(), 0.0)  # transformers until 5.5.4
    assert not torch.equal(zeros.topk(A, -1).indices.sort(-1).values, want)


@pytest.mark.parametrize(("E", "n_group", "topk_group", "A"), GROUPS)
def test_group_limit_keeps_whole_groups_as_they_are(E, n_group, topk_group, A):
    _, _, biased = biased_scores(E)
    limited = reference.group_limit(biased, n_group, topk_group)
    for row, scores in zip(limited.tolist(), biased.tolist(), strict=True):
        size = E // n_group
        groups = [scores[first : first + size] for first in range(0, E, size)]
        best = sorted(range(n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))[:topk_group]
        assert row == [s if i // size in best else float("-inf") for i, s in enumerate(scores)]


def test_group_limit_leaves_its_argument_alone():
    _, _, biased = biased_scores(16)
    before = biased.clone()
    reference.group_limit(biased, 4, 2)
    assert torch.equal(biased, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "shared"), [((2, 9), 1), ((1, 1), 2), ((3, 20), 3)])
def test_moe_forward_is_what_the_layer_does(dtype, tokens, shared):
    experts = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    cfg = ModelConfig(
        hidden_size=24, moe_intermediate_size=20, n_shared_experts=shared, routed_scaling_factor=2.5, **experts
    )
    moe = MoE(cfg).to(dtype).eval()
    for number, weight in enumerate(moe.parameters()):
        weight.data.copy_(0.3 * normal(*weight.shape, seed=number))
    x = normal(*tokens, 24, seed=99).to(dtype)
    with torch.no_grad():
        rows = x.flatten(0, 1)
        indices, gates, _ = moe.gate(rows)
        own = moe.shared_experts
        projections = own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight
        got = reference.moe_forward(
            rows, indices, gates, moe.experts.gate_up_proj, moe.experts.down_proj, projections
        ).view_as(x)
        # the gates are fp32 in either
        assert relative_error(got, moe(x)) < TOLERANCE[torch.float32]


def test_moe_forward_by_hand():
    """Two experts one unit wide, which give 30 and 100 times silu(1), and a shared one that gives 2 times silu(1)."""
    x, silu = torch.tensor([[1.0], [1.0]]), torch.nn.functional.silu(torch.tensor(1.0))
    gate_up, down = torch.tensor([[[1.0], [3.0]], [[1.0], [1.0]]]), torch.tensor([[[10.0]], [[100.0]]])
    shared = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1)
    indices, gates = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.5, 0.0], [0.25, 1.0]])
    want = torch.stack([silu * (2 + 15), silu * (2 + 25 + 30)]).view(2, 1)
    assert relative_error(reference.moe_forward(x, indices, gates, gate_up, down, shared), want) < 1e-6


@pytest.mark.parametrize("method", ["noaux_tc", "greedy"])
@pytest.mark.parametrize("shared", [0, 1, 3])
def test_parameters_of_a_layer_are_those_that_it_has(method, shared):
    scoring = {"noaux_tc": "sigmoid", "greedy": "softmax"}[method]
    sizes = {"hidden_size": 20, "moe_intermediate_size": 14, "n_routed_experts": 10, "num_experts_per_tok": 3}
    cfg = ModelConfig(n_shared_experts=shared, topk_method=method, scoring_func=scoring, **sizes)
    moe = MoE(cfg)
    bias = moe.gate.e_score_correction_bias
    total = sum(p.numel() for p in moe.parameters()) + (0 if bias is None else bias.numel())
    idle = sum(p.numel() for p in moe.experts.parameters()) * 7 // 10
    assert accounting.moe_parameters(cfg) == (total, total - idle)
