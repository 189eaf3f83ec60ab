"""Muon against the singular value decomposition, who gets which optimizer, and the schedule."""

import copy

import pytest
import torch

from minids.config import ModelConfig
from minids.model import Transformer
from minids.numerics import relative_error
from minids.optim import Muon, build_optimizers, orthogonalise, schedule

LIMIT = 3e-2  # of bfloat16, in which Newton-Schulz runs where the hardware multiplies it


def stepped(params, grads, steps=1, lr=0.1, **options):
    """The params after `steps` steps of Muon with the same gradients."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Muon(params, lr, **options)
    for _ in range(steps):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params]


# Orthogonalising -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (1, 9)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_singular_values_end_near_one_and_vectors_stay(shape, size):
    U, _, V = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    values = torch.linspace(1, 0.1, min(shape))  # what 5 iterations reach: a value of 0.1 times the norm's share
    matrices = U * values @ V
    got = orthogonalise(matrices * size).float()
    assert got.shape == matrices.shape
    singular = torch.linalg.svdvals(got)
    assert singular.min() > 0.6 and singular.max() < 1.25
    aligned = U.mT @ got @ V.mT  # diagonal where the singular vectors are those of the input
    off = aligned - torch.diag_embed(aligned.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.05


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalise(torch.zeros(2, 5, 3)).any()
    (after,) = stepped([torch.ones(2, 5, 3)], [torch.zeros(2, 5, 3)], steps=3)
    assert torch.equal(after, torch.ones(2, 5, 3)), "an expert without tokens does not move"


# Muon ------------------------------------------------------------------------------------------------------------


def test_a_step_is_the_formula():
    W, grads = torch.randn(12, 20), torch.randn(2, 12, 20)
    p = torch.nn.Parameter(W.clone())
    optimizer = Muon([p], 0.9, momentum=0.9, weight_decay=0.5)
    M = torch.zeros(12, 20)
    for grad in grads:
        p.grad = grad
        optimizer.step()
        M = 0.9 * M + 0.1 * grad
        update = orthogonalise((0.1 * grad + 0.9 * M)[None])[0].float()  # Nesterov's look ahead
        W = W - 0.9 * (0.2 * 20**0.5 * update + 0.5 * W)
    assert relative_error(p, W) < LIMIT
    assert relative_error(optimizer.state[p]["momentum_buffer"], M) < 1e-6


def test_stacks_and_neighbours_of_one_shape_equal_matrices_alone():
    stack, other = torch.zeros(4, 10, 6), torch.zeros(10, 6)
    grads = [torch.randn(4, 10, 6), torch.randn(10, 6)]
    together = stepped([stack, other], grads, steps=2)
    alone = [stepped([W], [grad], steps=2)[0] for W, grad in zip(stack, grads[0], strict=True)]
    assert relative_error(together[0], torch.stack(alone)) < LIMIT
    assert relative_error(together[1], stepped([other], grads[1:], steps=2)[0]) < LIMIT


def test_parts_are_orthogonalised_each_by_itself():
    W, grad = torch.zeros(3, 16, 6), torch.randn(3, 16, 6) * torch.tensor([1.0, 100.0]).repeat_interleave(8)[:, None]
    halves = [stepped([W[:, rows]], [grad[:, rows]])[0] for rows in (slice(8), slice(8, None))]
    (fused,) = stepped([W], [grad], parts=2)
    assert relative_error(fused, torch.cat(halves, 1)) < LIMIT
    assert relative_error(fused, stepped([W], [grad])[0]) > 10 * LIMIT


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"a parameter is \[7\]; Muon takes matrices of 1 parts"):
        Muon([torch.nn.Parameter(torch.zeros(7))], 0.1)
    with pytest.raises(ValueError, match=r"a parameter is \[7, 2\]; Muon takes matrices of 2 parts"):
        Muon([torch.nn.Parameter(torch.zeros(7, 2))], 0.1, parts=2)


def test_a_closure_gives_its_loss_and_a_parameter_without_gradient_rests():
    p, idle = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert Muon([p, idle], 0.1, weight_decay=0.5).step(closure) == 9.0
    assert torch.equal(idle, torch.ones(3, 3)) and not torch.equal(p, torch.ones(3, 3))


# The model's optimizers ------------------------------------------------------------------------------------------


def test_every_parameter_has_one_optimizer_and_vectors_are_not_decayed():
    model = Transformer(ModelConfig.preset("tiny", num_hidden_layers=2, q_lora_rank=16))
    muon, adam = build_optimizers(model, 0.02, 0.001, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    groups = [(group, [names.pop(p) for p in group["params"]]) for o in (muon, adam) for group in o.param_groups]
    assert not names
    (_, plain), (fused, gate_up), (tables, embeddings), (vectors, norms) = groups
    assert fused["parts"] == 2 and gate_up == ["layers.1.mlp.experts.gate_up_proj"]
    assert embeddings == ["embed_tokens.weight", "lm_head.weight"] and tables["weight_decay"] == 0.1
    assert all("norm" in name for name in norms) and vectors["weight_decay"] == 0.0
    assert "layers.1.mlp.experts.down_proj" in plain and "layers.1.mlp.gate.weight" in plain
    assert (plain and muon.defaults["lr"], adam.defaults["lr"]) == (0.02, 0.001)


def test_a_step_lowers_the_loss_and_a_copy_steps_alike():
    model = Transformer(ModelConfig.preset("tiny", num_hidden_layers=2))
    twin, tokens, losses = copy.deepcopy(model), torch.randint(2048, (2, 33)), []
    for each in (model, twin):
        optimizers = build_optimizers(each, 0.01, 0.01, 0.1)
        for _ in range(3):
            loss, nats = each.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(nats.item())
    assert losses[0] > losses[1] > losses[2] and losses[:3] == losses[3:]


# The schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_then_falls_to_zero():
    rates = [schedule(step, 10, 4) for step in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert schedule(0, 1, 0) == 1.0 and schedule(5, 5, 5) == 0.0
