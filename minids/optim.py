"""Muon for the hidden matrices, AdamW for the rest, and the schedule of their rates.

Muon takes the momentum M of a matrix [A,B] and steps along the nearest orthogonal matrix, U·Vᵀ of M's singular value
decomposition, so that every direction of the matrix learns at one pace. A few Newton-Schulz iterations, all of them
matrix products, come near enough to it. Here all matrices of one shape, whichever layer or expert they belong to, go
through as one batch: some ten batched products a step instead of hundreds of small ones.

With Moonlight's factor 0.2·sqrt(max(A,B)) an update has the RMS of AdamW's, so one rate serves
both (2502.16982, eq. 4). The embedding, the head and all vectors (norms, biases) stay with AdamW.
"""

import torch

from minids.numerics import has_fast_bf16

MUON_MOMENTUM, ADAM_BETAS, ADAM_EPS = 0.95, (0.9, 0.95), 1e-8
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of Keller Jordan's Muon: steepest at 0, stays within 0.7 to 1.2


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W ← W − lr·(0.2·sqrt(max(A,B))·NS(M) + weight_decay·W), M with Nesterov's look ahead.

    Parameters are matrices [A,B] or stacks of them [E,A,B]. A group with `parts` n takes each matrix as n of A/n rows
    (a fused projection). Raises ValueError for a parameter of another shape.
    """

    def __init__(self, params, lr, momentum=MUON_MOMENTUM, weight_decay=0.0, parts=1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() not in (2, 3) or p.shape[-2] % group["parts"]:
                    raise ValueError(f"a parameter is {list(p.shape)}; Muon takes matrices of {group['parts']} parts")

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; gives the closure's loss, if there is one."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, **{k: v for k, v in group.items() if k in self.defaults})
        return loss

    def _step_group(self, params, lr, momentum, weight_decay, parts):
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        for shape in dict.fromkeys(p.shape for p in params):
            alike = [p for p in params if p.shape == shape]
            grads, buffers = [p.grad for p in alike], [self.state[p]["momentum_buffer"] for p in alike]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            ahead = torch._foreach_lerp(grads, buffers, momentum)
            rows, columns = shape[-2] // parts, shape[-1]
            updates = orthogonalise(torch.cat([m.reshape(-1, rows, columns) for m in ahead]))
            updates = [update.reshape(shape).to(p.dtype) for update in updates.chunk(len(alike))]
            torch._foreach_add_(alike, updates, alpha=-lr * 0.2 * max(rows, columns) ** 0.5)


def orthogonalise(matrices, steps=5):
    """About U·Vᵀ of each matrix in [N,A,B], by Newton-Schulz: X ← aX + (bS + cS²)X with S = X·Xᵀ.

    bfloat16 where the hardware multiplies it, else float32: the singular values end at about 0.7 to 1.2 either way.
    """
    a, b, c = NEWTON_SCHULZ
    X = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)  # an expert without tokens has M = 0, and stays
    X = X.to(torch.bfloat16 if has_fast_bf16(X.device) else torch.float32)
    for _ in range(steps):
        S = X @ X.mT
        P = torch.baddbmm(S, S, S, beta=b, alpha=c)
        X = torch.baddbmm(X, P, X, beta=a)
    return X.mT if matrices.shape[1] > matrices.shape[2] else X


def build_optimizers(model, lr_muon, lr_adam, weight_decay):
    """[Muon, AdamW] for the parameters of `model`; vectors are not decayed."""
    fused, plain, tables, vectors = [], [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif "embed_tokens" in name or "lm_head" in name or p.dim() > 3:
            tables.append(p)
        else:
            (fused if name.endswith("gate_up_proj") else plain).append(p)
    muon = [group for group in ({"params": plain}, {"params": fused, "parts": 2}) if group["params"]]
    adam = [group for group in ({"params": tables}, {"params": vectors, "weight_decay": 0.0}) if group["params"]]
    options = {"betas": ADAM_BETAS, "eps": ADAM_EPS, "weight_decay": weight_decay, "fused": True}
    optimizers = [Muon(muon, lr_muon, weight_decay=weight_decay)] if muon else []
    return optimizers + ([torch.optim.AdamW(adam, lr_adam, **options)] if adam else [])


def schedule(step, steps, warmup):
    """What multiplies the rates in step `step` of `steps`: up to 1 in `warmup` steps, then linear to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))
