"""Lesson 01: right answers in other styles pass."""

import ast
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from right_answers import Answers, passes

import minids
from minids import layers
from minids.lab import exercises, solution

right = Answers()


@right("01.1")
def built_in(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


@right("01.1")
def in_float64(x, weight, eps):
    y = x.double()
    return (y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) ** 2 / y.shape[-1] + eps) ** 0.5 * weight).to(
        x.dtype
    )


@right("01.1")
def row_by_row(x, weight, eps):
    rows = [row / torch.sqrt(row @ row / len(row) + eps) * weight for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape)


@right("01.1")
def numbers_first(x, weight, eps):
    y = x.movedim(-1, 0)
    return (y * torch.rsqrt((y**2).mean(0) + eps)).movedim(0, -1) * weight


@right("01.2")
def as_complex_numbers(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2)


@right("01.2")
def pair_by_pair(x, cos, sin):
    y = torch.empty_like(x)
    for i in range(x.shape[-1] // 2):
        even, odd, c, s = x[..., 2 * i], x[..., 2 * i + 1], cos[:, i, None], sin[:, i, None]
        y[..., 2 * i], y[..., 2 * i + 1] = even * c - odd * s, even * s + odd * c
    return y


@right("01.2")
def by_matrices(x, cos, sin):
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return torch.einsum("tpij,bthpj->bthpi", turns, x.unflatten(-1, (-1, 2))).flatten(-2)


@right("01.2")
def by_a_swapped_copy(x, cos, sin):
    columns = torch.arange(x.shape[-1])
    signs = torch.tensor([-1.0, 1.0]).repeat(len(columns) // 2)
    cos, sin = cos.repeat_interleave(2, -1)[:, None], sin.repeat_interleave(2, -1)[:, None]
    return x * cos + x[..., columns ^ 1] * signs * sin


@right("01.2")
def heads_first(x, cos, sin):
    pairs = rearrange(x, "b t h (i two) -> two b h t i", two=2)
    turned = pairs[0] * cos - pairs[1] * sin, pairs[0] * sin + pairs[1] * cos
    return rearrange(list(turned), "two b h t i -> b t h (i two)")


@right("01.3")
def built_in_attention(q, k, v, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


@right("01.3")
def query_by_query(q, k, v, scale):
    rows = []
    for t in range(q.shape[1]):
        scores = (q[:, t : t + 1] * k[:, : t + 1]).sum(-1, keepdim=True) * scale
        rows.append((scores.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(rows, 1)


@right("01.3")
def key_by_key(q, k, v, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    positions = torch.arange(q.shape[2])[:, None]
    highest, total, o = torch.full_like(q[..., :1], -math.inf), torch.zeros_like(q[..., :1]), torch.zeros_like(v)
    for s in range(len(positions)):
        score = ((q * k[:, :, s : s + 1]).sum(-1, keepdim=True) * scale).masked_fill(positions < s, -math.inf)
        higher = torch.maximum(highest, score)
        old, new = torch.exp(highest - higher), torch.exp(score - higher)
        highest, total, o = higher, total * old + new, o * old + new * v[:, :, s : s + 1]
    return (o / total).transpose(1, 2)


@right("01.3")
def with_a_low_number(q, k, v, scale):
    T = q.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * scale
    scores = torch.where(torch.arange(T)[:, None] >= torch.arange(T), scores, -1e9)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.double()).to(q.dtype)


@right("01.3")
def masked_late_and_divided_again(q, k, v, scale):
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * scale).softmax(-1).tril()
    return torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True), v)


@right("01.3")
def masked_in_place(q, k, v, scale):
    rows, columns = torch.triu_indices(q.shape[1], q.shape[1], 1)
    scores = torch.einsum("bthd,bshd->bhts", q * scale**0.5, k * scale**0.5)
    scores[:, :, rows, columns] = -math.inf
    return torch.einsum("bhts,bshd->bthd", F.softmax(scores, dim=3), v)


@right("01.4")
def by_matmul(x, w_gate, w_up, w_down):
    gate = x @ w_gate.T
    return gate.sigmoid().mul(gate).mul(x @ w_up.T) @ w_down.T


@right("01.4")
def by_einsum_in_float64(x, w_gate, w_up, w_down):
    gate, up = (torch.einsum("...d,wd->...w", x.double(), w.double()) for w in (w_gate, w_up))
    return torch.einsum("...w,dw->...d", gate / (1 + torch.exp(-gate)) * up, w_down.double()).to(x.dtype)


@right("01.4")
def both_in_one_product(x, w_gate, w_up, w_down):
    gate, up = F.linear(x, torch.cat((w_gate, w_up))).chunk(2, -1)
    return F.linear(torch.nn.SiLU()(gate) * up, w_down)


@right("01.4")
def in_place_on_its_own(x, w_gate, w_up, w_down):
    h = F.silu(x @ w_gate.T)
    h *= x @ w_up.T
    return h @ w_down.T


@right("01.5")
def by_the_probability(nats_per_token, tokens, nbytes):
    return -math.log2(math.exp(-nats_per_token)) * tokens / nbytes


@right("01.5")
def by_torch(nats_per_token, tokens, nbytes):
    return nats_per_token / torch.log(torch.tensor(2.0)) / (nbytes / tokens)


def test_the_lesson_trains_with_any_of_them_where_the_rest_is_in_bfloat16():
    """Training is under autocast where a CPU has bfloat16; complex numbers, among others, do not exist in it."""
    text = (solution.SOLUTIONS / "01_transformer.py").read_text(encoding="utf-8")
    cells = [node for node in ast.parse(text).body if getattr(node, "name", "") in ("my_hidden", "my_loss")]
    cfg = minids.ModelConfig.preset("tiny", attention="mha", n_routed_experts=0, num_hidden_layers=1)
    model, tokens = minids.Transformer(cfg), torch.arange(24).view(2, 12)
    for rope in (as_complex_numbers, by_a_swapped_copy, exercises.reference("01.2")):
        scope = {"torch": torch, "F": F, "layers": layers, "cfg": cfg, "my_rope": rope}
        for name, number in {"my_rms_norm": "01.1", "my_attention": "01.3", "my_swiglu": "01.4"}.items():
            scope[name] = exercises.reference(number)
        exec(compile(ast.Module(cells, []), "lesson 01", "exec"), scope)
        with torch.autocast("cpu", torch.bfloat16):
            loss, shown = scope["my_loss"](model, tokens, tokens + 1)
        loss.backward()
        assert loss.dtype == torch.float32 and math.isfinite(loss.item()) and torch.equal(loss.detach(), shown)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
