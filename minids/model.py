"""The model: embedding, blocks of attention and feed-forward (dense or experts), a final norm and the head.

The module names are the hub's, so a checkpoint of DeepSeek-V2 or V3 needs no table of translations: `hub.py` only puts
`model.` before all but the head, splits the experts that are one tensor here, and counts `mtp` among the layers.

Pre-norm residual blocks (V3 figure 2):  h = x + Attention(RMSNorm(x));  out = h + FeedForward(RMSNorm(h)).

Multi-token prediction (MTP, V3 section 2.2 and figure 3). Behind the model's last norm, h^0_t has seen tokens 1 to t,
and the head makes of it the logits of t+1. Module k = 1, 2, ... adds the embedding of token t+k, which is known in
training, and the same head makes of its h^k_t the logits of token t+k+1:

    h^k = norm_k(Block_k(eh_proj_k [enorm_k(Emb(t+k)); hnorm_k(h^(k-1)_t)]))

Each module is causal, so h^k_t has seen tokens 1 to t+k. Eq. 21 has [norm(h); norm(Emb)], the other way round; this is
the order of the published weights. `model(tokens)` never runs the modules: they are for `loss`, and for `speculate`.
"""

import contextlib

import torch
from torch import nn

from minids.decode import find_step
from minids.gqa import GQA, KVCache
from minids.layers import RMSNorm, SwiGLU, linear_cross_entropy, rope_tables
from minids.mla import MLA, LatentCache
from minids.moe import MoE

MTP_WEIGHT = 0.3  # lambda of V3 eq. 25 for the first 10T tokens; 0.1 for the other 4.8T (V3 section 4.2)


class Block(nn.Module):
    """One layer: attention and a feed-forward, each behind a norm and added to its input; [B,T,D] to [B,T,D].

    `self_attn` is called as MLA is, with cos and sin [T,R/2] of rope_tables; `mlp` with [B,T,D] alone.
    """

    def __init__(self, cfg, index):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg) if cfg.attention == "mla" else GQA(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MoE(cfg) if cfg.is_moe_layer(index) else SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x, cos, sin, cache=None):
        """See the class."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTP(Block):
    """One module of multi-token prediction: Emb(t+k) and h^(k-1) at t, both [B,T,D], to h^k [B,T,D] (V3 eq. 21-22)."""

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(D, eps)})

    def forward(self, embedded, h, cos, sin, cache=None):
        """See the class."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], -1))
        return self.shared_head["norm"](super().forward(x, cos, sin, cache))


class Transformer(nn.Module):
    """A decoder of the DeepSeek-V2/V3 family, or one of its baselines, as `cfg` says.

    `model(tokens [B,T])` gives logits [B,T,V]; `mtp` has num_nextn_predict_layers modules that this leaves alone.
    Raises ValueError for tokens that are not [B,T] integers in the vocabulary or that go past max_position_embeddings.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, index) for index in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        init_weights(self, cfg.initializer_range)
        first, D = cfg.num_hidden_layers, cfg.num_nextn_predict_layers
        self.mtp = nn.ModuleList(MTP(cfg, first + k) for k in range(D))  # last: the rest is drawn as without them
        init_weights(self.mtp, cfg.initializer_range)

    def forward(self, tokens, cache=None, last_only=False):
        """Logits [B,T,V] for `tokens` [B,T] (only the last position's, [B,1,V], if last_only).

        With a `cache` (from `new_cache`) the tokens continue what it holds, and are added to it; one token at a time
        on a CPU takes the flat step of decode.py where it applies.
        """
        step = find_step(self, tokens, cache, kinds=(Transformer, Block, MTP, nn.ModuleDict))
        if step:
            check_tokens(tokens, self.cfg, cache[0].length)
            return step(tokens, cache)
        x = self.hidden(tokens, cache)
        return self.lm_head(x[:, -1:] if last_only else x)

    def hidden(self, tokens, cache=None):
        """The hidden states [B,T,D] behind the final norm; arguments as in forward."""
        start = cache[0].length if cache else 0
        check_tokens(tokens, self.cfg, start)
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        cos, sin = rope_tables(self.cfg, positions)
        x = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[index] if cache else None)
        return self.norm(x)

    def mtp_hidden(self, tokens, h):
        """h^k [B,T-k,D] of each MTP module, k = 1, 2, ..., for `tokens` [B,T] and h = hidden(tokens), as a list.

        lm_head makes of position t the logits of token t+k+1. Raises ValueError where T is not above k.
        """
        T, outputs = tokens.shape[1], []
        for k, module in enumerate(self.mtp, 1):
            if k >= T:
                raise ValueError(f"sequences of {T} are too short for {len(self.mtp)} MTP modules: give longer ones")
            cos, sin = rope_tables(self.cfg, torch.arange(T - k, device=tokens.device))
            h = module(self.embed_tokens(tokens[:, k:]), h[:, :-1], cos, sin)
            outputs.append(h)
        return outputs

    def loss(self, tokens, targets, mtp_weight=MTP_WEIGHT):
        """The loss to differentiate (with the balance loss and MTP's) and the cross-entropy in nats, detached.

        tokens and targets are [B,T]; targets of -100 do not count. The cross-entropy is the main head's mean per token.
        MTP's loss is the mean of its modules' (V3 eq. 24-25, there over T instead of the T-k positions), mtp_weight
        times. Raises what mtp_hidden raises.
        """
        h, head = self.hidden(tokens), self.lm_head.weight
        cross_entropy = linear_cross_entropy(h.flatten(0, 1), head, targets.flatten())
        mtp = [
            linear_cross_entropy(h_k.flatten(0, 1), head, targets[:, k:].flatten())
            for k, h_k in enumerate(self.mtp_hidden(tokens, h), 1)
        ]
        extra = sum(moe.balance_loss for moe in self.moe_layers() if moe.balance_loss is not None)
        if mtp:
            extra += mtp_weight * sum(mtp) / len(mtp)
        return cross_entropy + extra, cross_entropy.detach()

    def moe_layers(self):
        """The MoE modules, first layer first, those of MTP last."""
        return [layer.mlp for layer in [*self.layers, *self.mtp] if isinstance(layer.mlp, MoE)]

    @torch.no_grad()
    def update_expert_bias(self, rate):
        """Move every router's bias by `rate` towards balance (V3 eq. 16); gives MaxVio and the loads it moved by.

        MaxVio is the mean over the MoE layers, 0-dim; the loads are [layers,E], as multiples of a layer's mean load.
        """
        gates = [moe.gate for moe in self.moe_layers()]
        if not gates:
            return torch.zeros(()), torch.zeros(0, 0)
        loads = torch.stack([gate.load for gate in gates])  # a copy: update_bias zeroes what it has used
        violations = torch.stack([gate.update_bias(rate) for gate in gates])
        return violations.mean(), loads / loads.mean(1, keepdim=True).clamp_min(torch.finfo(loads.dtype).tiny)

    def new_cache(self, batch, max_len, dtype=None):
        """Empty caches for `batch` sequences of up to `max_len` tokens, one per layer; dtype as the weights'."""
        cfg, weight = self.cfg, self.embed_tokens.weight
        options = {"dtype": dtype or weight.dtype, "device": weight.device}
        kind, sizes = KVCache, (cfg.kv_heads, cfg.attention_head_dim)
        if cfg.attention == "mla":
            kind, sizes = LatentCache, (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
        return [kind(batch, max_len, *sizes, **options) for _ in self.layers]

    def save_pretrained(self, path, **options):
        """Write config.json and safetensors in the hub's layout into the folder `path` (see hub.save)."""
        from minids import hub

        hub.save(self, path, **options)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, dtype=None, device="cpu"):
        """Open a folder or a hub id of the DeepSeek-V2/V3 architecture (see hub.load)."""
        from minids import hub

        return hub.load(path_or_hub_id, dtype=dtype, device=device)


def init_weights(model, std):
    """Normal weights of standard deviation `std` for matrices; norms stay 1, and biases become 0."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


@contextlib.contextmanager
def evaluating(model):
    """A context with `model` in eval mode, and afterwards in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_tokens(tokens, cfg, start=0):
    """Raise ValueError where `tokens` are not [B,T] integers of the vocabulary, with room for them after `start`."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32) or tokens.numel() == 0:
        raise ValueError(f"tokens are {list(tokens.shape)} {tokens.dtype}; give [B,T] integers (int64), not empty")
    end = start + tokens.shape[1]
    if end > cfg.max_position_embeddings:
        raise ValueError(f"{end} positions are asked for; max_position_embeddings is {cfg.max_position_embeddings}")
    if tokens.device.type == "cpu":  # a GPU would have to wait for the answer; its embedding asserts by itself
        check_vocabulary(tokens, cfg)


def check_vocabulary(tokens, cfg):
    """Raise ValueError where a token id is not of the vocabulary."""
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= cfg.vocab_size:
        raise ValueError(f"token ids run from {low} to {high}; this vocabulary has 0 to {cfg.vocab_size - 1}")
