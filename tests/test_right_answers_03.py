"""Right answers to lesson 03 in other styles."""

import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids import accounting
from minids.layers import apply_rope

right = Answers()


@right("03.1")
def pairs_of_a_loop(x, w_kv_a, norm_weight, cos, sin, eps):
    C, keys = norm_weight.shape[0], []
    y = x @ w_kv_a.T
    for i in range((y.shape[-1] - C) // 2):
        a, b = y[..., C + 2 * i], y[..., C + 2 * i + 1]
        keys += [a * cos[:, i] - b * sin[:, i], a * sin[:, i] + b * cos[:, i]]
    c = y[..., :C]
    return [c / torch.sqrt((c * c).mean(-1, keepdim=True) + eps) * norm_weight, torch.stack(keys, -1)]


@right("03.1")
def complex_numbers_and_float64(x, w_kv_a, norm_weight, cos, sin, eps):
    y = torch.einsum("btd,od->bto", x.double(), w_kv_a.double())
    c, k = y.tensor_split([len(norm_weight)], -1)
    k = torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos.double(), sin.double())
    c = F.rms_norm(c, norm_weight.shape, norm_weight.double(), eps)
    return c.to(x.dtype), torch.view_as_real(k).flatten(-2).to(x.dtype)


@right("03.1")
def two_products_laid_out_by_columns(x, w_kv_a, norm_weight, cos, sin, eps):
    norm = torch.nn.RMSNorm(len(norm_weight), eps)
    y = (w_kv_a @ x.transpose(1, 2)).transpose(1, 2)
    c = torch.func.functional_call(norm, {"weight": norm_weight}, (y[..., : len(norm_weight)],))
    return c, apply_rope(y[:, :, None, len(norm_weight) :], cos, sin)[:, :, 0]


@right("03.2")
def heads_in_front(kv, heads, nope):
    from einops import rearrange

    kv = rearrange(kv, "b s (h w) -> h b w s", h=heads)
    return rearrange(kv[:, :, :nope], "h b p s -> b s h p"), rearrange(kv[:, :, nope:], "h b v s -> b s h v")


@right("03.2")
def columns_by_number(kv, heads, nope):
    columns = torch.arange(kv.shape[-1]).view(heads, -1)
    return [kv[..., columns[:, :nope]], kv[..., columns[:, nope:]]]


@right("03.3")
def written_into_a_copy(q, heads, nope, cos, sin):
    q = q.clone(memory_format=torch.contiguous_format).view(q.shape[0], q.shape[1], heads, -1)
    q[..., nope:] = apply_rope(q[..., nope:].clone(), cos, sin)
    return q[..., :nope], q[..., nope:]


@right("03.3")
def matrices_of_rotation(q, heads, nope, cos, sin):
    q = q.unflatten(-1, (heads, -1))
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return q[..., :nope], torch.einsum("trij,bthrj->bthri", turn, q[..., nope:].unflatten(-1, (-1, 2))).flatten(-2)


@right("03.4")
def scaled_dot_product_attention(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    (T, H, P), S = q_nope.shape[1:], c_kv.shape[1]
    kv = torch.einsum("bsc,hwc->bhsw", c_kv, kv_b)
    k = torch.cat([kv[..., :P], k_rope[:, None].expand(-1, H, -1, -1)], -1)
    q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return F.scaled_dot_product_attention(q, k, kv[..., P:], mask, scale=scale).transpose(1, 2)


@right("03.4")
def query_by_query(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    (B, T, H, P), S, rows = q_nope.shape, c_kv.shape[1], []
    for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, T, H))).tolist():
        n = t + S - T + 1
        kv = c_kv[b, :n] @ kv_b[h].T
        scores = (kv[:, :P] @ q_nope[b, t, h] + k_rope[b, :n] @ q_rope[b, t, h]) * scale
        rows.append(torch.softmax(scores, 0) @ kv[:, P:])
    return torch.stack(rows).view(B, T, H, -1)


@right("03.4")
def absorbed_already(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    P, T, S = q_nope.shape[-1], q_nope.shape[1], c_kv.shape[1]
    query = torch.cat([torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, :P]), q_rope], -1) * scale
    scores = torch.einsum("bthw,bsw->bths", query, torch.cat([c_kv, k_rope], -1))
    later = torch.arange(S) > torch.arange(S - T, S)[:, None]
    weights = torch.where(later[:, None], torch.finfo(scores.dtype).min, scores).softmax(-1)
    return torch.einsum("bths,bsc,hvc->bthv", weights, c_kv, kv_b[:, P:])


@right("03.5")
def from_bytes(cfg):
    return accounting.kv_bytes_per_token(cfg, torch.float32) / 4 / cfg.num_hidden_layers


@right("03.5")
def a_tensor(cfg):
    return torch.tensor([cfg.kv_lora_rank, cfg.qk_rope_head_dim]).sum()


@right.each
def test_it_passes(name, answer):
    passes(name, answer)
