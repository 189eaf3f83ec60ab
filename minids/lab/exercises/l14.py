"""Lesson 14: economics: parameters, FLOPs, hours and dollars of training, bytes of a decoding step, price of tokens."""

import math

from minids import accounting
from minids.config import ModelConfig
from minids.lab.exercise import Exercise


def model(L=3, D=64, W=80, V=96, H=4, E=8, S=1, A=2, F=16, first=1, tied=False, attention="mla"):
    """A small config in the letters of the package; W is the dense feed-forward's width, `first` the dense layers."""
    names = {"num_hidden_layers": L, "hidden_size": D, "intermediate_size": W, "vocab_size": V}
    names |= {"num_attention_heads": H, "num_key_value_heads": 1, "attention": attention, "tie_word_embeddings": tied}
    names |= {"n_routed_experts": E, "n_shared_experts": S, "num_experts_per_tok": A, "moe_intermediate_size": F}
    return ModelConfig(**names, first_k_dense_replace=first)


def is_moe(cfg):
    """For each layer whether it has experts."""
    return [cfg.is_moe_layer(index) for index in range(cfg.num_hidden_layers)]


def one_expert(cfg):
    return 3 * cfg.hidden_size * cfg.moe_intermediate_size


# 14.1 ------------------------------------------------------------------------------------------------------------

PARAMETERS = Exercise(
    "14.1",
    accounting.parameters,
    minutes=8,
    sizes=[
        {"L": 8, "D": 64, "W": 96, "V": 128, "E": 16, "first": 8},
        {"L": 5, "D": 36, "W": 50, "V": 70, "E": 12, "first": 1},
        {"L": 7, "D": 48, "W": 33, "V": 101, "E": 9, "first": 3},
        {"L": 4, "D": 20, "W": 30, "V": 50, "E": 0, "first": 1},
        {"L": 6, "D": 24, "W": 40, "V": 64, "E": 8, "first": 2, "tied": True},
    ],
    hints=[
        "Which parts does every layer have, whatever stands behind its attention? What stands before the first layer "
        "and behind the last? With which matrix is a token looked up, and not multiplied?",
        "Each layer: accounting.attention_parameters(cfg), two norms of D, and moe_parameters or 3·D·W, W the width of the dense feed-forward. Once: a norm "
        "of D, and the head V·D. The embedding, V·D more, only in the total, and only where it is not the head itself.",
    ],
)


@PARAMETERS.inputs
def _(r, L, D, W, V, E, first, tied=False):
    return model(L=L, D=D, W=W, V=V, E=E, first=first, tied=tied)


def counted(cfg, norms=2, last=1, tables=None, active_tables=1, matrices=3, attention=1, moe=None, experts=None):
    """(total, active) with a part of the count replaced; experts: (total, active) of an MoE layer."""
    D = cfg.hidden_size
    tables = (1 if cfg.tie_word_embeddings else 2) if tables is None else tables
    total = active = last * D
    for has_experts in is_moe(cfg) if moe is None else moe:
        dense = matrices * D * cfg.intermediate_size
        both = (experts or accounting.moe_parameters)(cfg) if has_experts else (dense, dense)
        shared = attention * accounting.attention_parameters(cfg) + norms * D
        total, active = total + shared + both[0], active + shared + both[1]
    return total + tables * cfg.vocab_size * D, active + active_tables * cfg.vocab_size * D


@PARAMETERS.wrong(
    "The input embedding is active in your count: a token looks up one row of it and multiplies with none. "
    "(Model cards often count it; here it is left out.)"
)
def embedding_active(cfg):
    return counted(cfg, active_tables=1 if cfg.tie_word_embeddings else 2)


@PARAMETERS.wrong("The head is missing among the active ones: its V·D numbers multiply every token.")
def head_not_active(cfg):
    return counted(cfg, active_tables=0)


@PARAMETERS.wrong(
    "The head is missing among the active ones where it is the embedding: one matrix in the total, and as the head it "
    "still multiplies every token."
)
def tied_head_not_active(cfg):
    return counted(cfg, active_tables=0 if cfg.tie_word_embeddings else 1)


@PARAMETERS.wrong("Embedding and head are both left out: V·D numbers each in the total, and the head is active.")
def no_tables(cfg):
    return counted(cfg, tables=0, active_tables=0)


@PARAMETERS.wrong("The total has one matrix of V·D; embedding and head are two, unless cfg.tie_word_embeddings.")
def one_table(cfg):
    return counted(cfg, tables=1)


@PARAMETERS.wrong(
    "You count embedding and head also where they are one: with cfg.tie_word_embeddings there is a single matrix."
)
def tied_twice(cfg):
    return counted(cfg, tables=2)


@PARAMETERS.wrong("The last norm, D numbers behind all layers, is forgotten.")
def last_norm_forgotten(cfg):
    return counted(cfg, last=0)


@PARAMETERS.wrong(
    "Each layer has two norms of D numbers, before attention and before the feed-forward; you count none."
)
def norms_forgotten(cfg):
    return counted(cfg, norms=0)


@PARAMETERS.wrong("Each layer has two norms of D numbers, before attention and before the feed-forward; you count one.")
def one_norm(cfg):
    return counted(cfg, norms=1)


@PARAMETERS.wrong(
    "The dense layers are forgotten: before cfg.is_moe_layer(i) is True there is a SwiGLU of width intermediate_size."
)
def dense_forgotten(cfg):
    return counted(cfg, matrices=0)


@PARAMETERS.wrong("You count two matrices for a dense feed-forward: a SwiGLU has three, gate, up and down.")
def two_matrices(cfg):
    return counted(cfg, matrices=2)


@PARAMETERS.wrong("Attention is forgotten: add accounting.attention_parameters(cfg) in every layer.")
def attention_forgotten(cfg):
    return counted(cfg, attention=0)


@PARAMETERS.wrong(
    "Every layer has experts in your count: the first ones are dense. Ask cfg.is_moe_layer(i), which knows."
)
def all_moe(cfg):
    return counted(cfg, moe=[cfg.n_routed_experts > 0] * cfg.num_hidden_layers)


@PARAMETERS.wrong(
    "You take moe_parameters in every layer, without asking: cfg.is_moe_layer(i) says which layers have experts, the "
    "others have 3·D·W."
)
def never_asked(cfg):
    return counted(cfg, moe=[True] * cfg.num_hidden_layers)


@PARAMETERS.wrong(
    "No layer has experts in your count: ask cfg.is_moe_layer(i), and take accounting.moe_parameters(cfg)."
)
def all_dense(cfg):
    return counted(cfg, moe=[False] * cfg.num_hidden_layers)


@PARAMETERS.wrong("All experts are active in your count: moe_parameters gives (total, active), take the second for it.")
def experts_all_active(cfg):
    return counted(cfg, experts=lambda cfg: (accounting.moe_parameters(cfg).total,) * 2)


@PARAMETERS.wrong("The order is swapped: first the total, then the active ones.")
def active_first(cfg):
    return counted(cfg)[::-1]


@PARAMETERS.wrong("That is one number: give both, (total, active).")
def total_alone(cfg):
    return counted(cfg)[0]


@PARAMETERS.wrong("That is one layer: all cfg.num_hidden_layers of them count, in a loop, for they are not alike.")
def first_layer_alone(cfg):
    return counted(cfg, moe=is_moe(cfg)[:1])


def by_layer(cfg, dense=None, has_experts=None, extra=0, swap=False):
    """(total, active) with another dense feed-forward, another question for experts, or more in each MoE layer."""
    D, (total, active) = cfg.hidden_size, counted(cfg, moe=[])
    for index in range(cfg.num_hidden_layers):
        asked = cfg.is_moe_layer(index) if has_experts is None else has_experts(index)
        layer = accounting.moe_parameters(cfg) if asked else (3 * D * (dense or cfg.intermediate_size),) * 2
        both = accounting.attention_parameters(cfg) + 2 * D + (extra if asked else 0)
        total, active = total + both + layer[swap], active + both + layer[not swap]
    return total, active


@PARAMETERS.wrong("A dense layer's width is cfg.intermediate_size: moe_intermediate_size is that of one expert.")
def expert_width_in_dense(cfg):
    return by_layer(cfg, dense=cfg.moe_intermediate_size)


@PARAMETERS.wrong(
    "You ask for first_k_dense_replace alone: a config may have no experts at all (n_routed_experts 0). cfg.is_moe_layer(i) "
    "knows."
)
def by_first_k(cfg):
    return by_layer(cfg, has_experts=lambda index: index >= cfg.first_k_dense_replace)


@PARAMETERS.wrong(
    "One layer too few has experts: layer first_k_dense_replace is the first that has them, counted from 0."
)
def one_moe_layer_less(cfg):
    return by_layer(cfg, has_experts=lambda index: cfg.n_routed_experts > 0 and index > cfg.first_k_dense_replace)


@PARAMETERS.wrong("The wrong way round: layers for which cfg.is_moe_layer(i) is True have experts, the others 3·D·W.")
def kinds_exchanged(cfg):
    return by_layer(cfg, has_experts=lambda index: not cfg.is_moe_layer(index))


@PARAMETERS.wrong("The dense SwiGLU is counted in layers with experts too: a layer has one OR the other.")
def dense_everywhere(cfg):
    return by_layer(cfg, extra=3 * cfg.hidden_size * cfg.intermediate_size)


@PARAMETERS.wrong("moe_parameters gives (total, active), in this order: you take the second for the total.")
def experts_exchanged(cfg):
    return by_layer(cfg, swap=True)


@PARAMETERS.wrong(
    "With cfg.tie_word_embeddings the total has ONE matrix of V·D, and two without it: yours is the other way round."
)
def tied_the_other_way(cfg):
    return counted(cfg, tables=2 if cfg.tie_word_embeddings else 1)


@PARAMETERS.wrong("Two norms in each LAYER, D numbers each: you count them once for the whole model.")
def norms_once(cfg):
    return counted(cfg, norms=0, last=3)


@PARAMETERS.wrong("That is the number of active parameters alone: give both, (total, active).")
def active_alone(cfg):
    return counted(cfg)[1]


# 14.2 ------------------------------------------------------------------------------------------------------------

TRAIN_FLOPS = Exercise(
    "14.2",
    accounting.train_flops_per_token,
    minutes=8,
    sizes=[
        {"L": 8, "D": 64, "H": 8, "S": 128, "attention": "mla"},
        {"L": 5, "D": 36, "H": 3, "S": 50, "attention": "mla"},
        {"L": 3, "D": 60, "H": 5, "S": 301, "attention": "gqa"},
        {"L": 4, "D": 48, "H": 2, "S": 1, "attention": "mla"},
        {"L": 2, "D": 40, "H": 4, "S": 77, "attention": "mha"},
    ],
    hints=[
        "Forward, a parameter costs two FLOPs, and backward twice as many. How many keys does a query see on average, "
        "and what does it do with each: a product as wide as a key, and one as wide as a value?",
        "6 · active parameters, plus 3 (forward and twice backward) · layers · heads · (width of a key + width of a "
        "value) · 2 FLOPs · seq_len / 2 keys on average.",
    ],
)


@TRAIN_FLOPS.inputs
def _(r, L, D, H, S, attention):
    return model(L=L, D=D, H=H, attention=attention), S


def widths(cfg):
    """Of a key and of a value."""
    if cfg.attention == "mla":
        return cfg.qk_head_dim, cfg.v_head_dim
    return cfg.attention_head_dim, cfg.attention_head_dim


def flops(cfg, seq_len, each=6, size=None, passes=3, keys=None, width=None, layers=None, heads=None):
    """The FLOPs with a part of the formula replaced."""
    size = accounting.parameters(cfg).active if size is None else size
    pairs = (layers or cfg.num_hidden_layers) * (heads or cfg.num_attention_heads)
    pairs *= seq_len / 2 if keys is None else keys
    return each * size + 2 * passes * pairs * (sum(widths(cfg)) if width is None else width)


@TRAIN_FLOPS.wrong(
    "That is the forward pass alone, 2 FLOPs per parameter: backward costs twice as many again, 6 in all, and attention "
    "too counts three times."
)
def forward_alone(cfg, seq_len):
    return flops(cfg, seq_len, each=2, passes=1)


@TRAIN_FLOPS.wrong("That is the backward pass alone, 4 FLOPs per parameter: the forward pass comes to it, 6 in all.")
def backward_alone(cfg, seq_len):
    return flops(cfg, seq_len, each=4, passes=2)


@TRAIN_FLOPS.wrong(
    "You take all parameters: a token is multiplied only with the ACTIVE ones, accounting.parameters(cfg).active."
)
def all_parameters(cfg, seq_len):
    return flops(cfg, seq_len, size=accounting.parameters(cfg).total)


@TRAIN_FLOPS.wrong("You count the input embedding too: it is looked up, so it costs no FLOPs.")
def embedding_too(cfg, seq_len):
    return flops(cfg, seq_len, size=accounting.active_with_embedding(cfg))


@TRAIN_FLOPS.wrong("Attention is missing: scores and weighted values have no parameters, but they are arithmetic too.")
def no_attention(cfg, seq_len):
    return flops(cfg, seq_len, passes=0)


@TRAIN_FLOPS.wrong("Attention alone is there: 6 FLOPs for each active parameter come to it.")
def attention_alone(cfg, seq_len):
    return flops(cfg, seq_len, each=0)


@TRAIN_FLOPS.wrong("You count attention forward only: backward costs twice as much again, a factor of 3.")
def attention_forward(cfg, seq_len):
    return flops(cfg, seq_len, passes=1)


@TRAIN_FLOPS.wrong(
    "Each query sees all seq_len keys in your count: attention is causal, so it is half of them on average."
)
def not_causal(cfg, seq_len):
    return flops(cfg, seq_len, keys=seq_len)


@TRAIN_FLOPS.wrong(
    "That is attention for a whole sequence, seq_len squared: what ONE token costs is asked, seq_len once."
)
def whole_sequence(cfg, seq_len):
    return flops(cfg, seq_len, keys=seq_len * seq_len / 2)


@TRAIN_FLOPS.wrong("Attention of one layer is counted: all cfg.num_hidden_layers of them have it.")
def one_layer(cfg, seq_len):
    return flops(cfg, seq_len, layers=1)


@TRAIN_FLOPS.wrong("Attention of one head is counted: there are cfg.num_attention_heads.")
def one_head(cfg, seq_len):
    return flops(cfg, seq_len, heads=1)


@TRAIN_FLOPS.wrong(
    "You count heads of keys and values, cfg.num_key_value_heads: each of the cfg.num_attention_heads QUERY heads does "
    "the products, also where heads share keys."
)
def key_heads(cfg, seq_len):
    return flops(cfg, seq_len, heads=cfg.kv_heads if cfg.attention != "mla" else None)


@TRAIN_FLOPS.wrong("You count a query's products with keys and not those with values: add the width of a value.")
def keys_alone(cfg, seq_len):
    return flops(cfg, seq_len, width=widths(cfg)[0])


@TRAIN_FLOPS.wrong("You count the products with values and not those with keys: add the width of a key.")
def values_alone(cfg, seq_len):
    return flops(cfg, seq_len, width=widths(cfg)[1])


@TRAIN_FLOPS.wrong(
    "The rope columns are forgotten: a key of MLA is qk_head_dim wide, qk_nope_head_dim + qk_rope_head_dim."
)
def rope_forgotten(cfg, seq_len):
    width = cfg.qk_nope_head_dim + cfg.v_head_dim if cfg.attention == "mla" else None
    return flops(cfg, seq_len, width=width)


@TRAIN_FLOPS.wrong(
    "You take the widths of the latent: that is the absorbed form, for decoding. Training pays for the expanded one."
)
def latent_widths(cfg, seq_len):
    width = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim if cfg.attention == "mla" else None
    return flops(cfg, seq_len, width=width)


@TRAIN_FLOPS.wrong(
    "A multiplication and an addition are TWO FLOPs: everything in your count is a half of what it should be."
)
def one_flop(cfg, seq_len):
    return flops(cfg, seq_len) / 2


@TRAIN_FLOPS.wrong("In attention a multiplication and an addition are two FLOPs as well: yours has half as many.")
def one_flop_in_attention(cfg, seq_len):
    return flops(cfg, seq_len, passes=1.5)


@TRAIN_FLOPS.wrong(
    "You cut seq_len / 2 down to a whole number: a sequence may have an odd length, so divide with /, or by 2 at the end."
)
def half_cut_down(cfg, seq_len):
    return flops(cfg, seq_len, keys=seq_len // 2)


@TRAIN_FLOPS.wrong(
    "You count (S + 1) / 2 keys. That is the exact mean, the position itself among them; the formula here takes S / 2."
)
def exact_mean(cfg, seq_len):
    return flops(cfg, seq_len, keys=(seq_len + 1) / 2)


@TRAIN_FLOPS.wrong("You count (S - 1) / 2 keys, those before the position: the formula here takes S / 2.")
def only_those_before(cfg, seq_len):
    return flops(cfg, seq_len, keys=(seq_len - 1) / 2)


@TRAIN_FLOPS.wrong(
    "The parameters are counted forward only, 2 FLOPs each: backward costs twice as many again, 6 in all."
)
def parameters_forward(cfg, seq_len):
    return flops(cfg, seq_len, each=2)


@TRAIN_FLOPS.wrong("The parameters are counted backward only, 4 FLOPs each: the forward pass comes to it, 6 in all.")
def parameters_backward(cfg, seq_len):
    return flops(cfg, seq_len, each=4)


@TRAIN_FLOPS.wrong("3 FLOPs for each parameter: a multiplication AND an addition, forward and twice backward, make 6.")
def parameters_one_flop(cfg, seq_len):
    return flops(cfg, seq_len, each=3)


@TRAIN_FLOPS.wrong(
    "8 FLOPs for each parameter: that counts recomputing the forward pass, which the formula here does not."
)
def recomputed(cfg, seq_len):
    return flops(cfg, seq_len, each=8)


@TRAIN_FLOPS.wrong("You take MLA's widths whatever cfg.attention is: without MLA both are cfg.attention_head_dim.")
def always_mla(cfg, seq_len):
    return flops(cfg, seq_len, width=cfg.qk_head_dim + cfg.v_head_dim)


@TRAIN_FLOPS.wrong(
    "You take attention_head_dim, or hidden_size // heads, also for MLA: its keys are qk_head_dim wide, its values v_head_dim."
)
def never_mla(cfg, seq_len):
    return flops(cfg, seq_len, width=2 * cfg.attention_head_dim)


@TRAIN_FLOPS.wrong(
    'You take MLA\'s widths for everything but "gqa": a config\'s attention may be "mha" too. Ask whether it is "mla".'
)
def mla_unless_gqa(cfg, seq_len):
    return flops(cfg, seq_len, width=None if cfg.attention == "gqa" else cfg.qk_head_dim + cfg.v_head_dim)


@TRAIN_FLOPS.wrong("cfg.head_dim is 0 in a config that leaves it to be computed: take cfg.attention_head_dim.")
def raw_head_dim(cfg, seq_len):
    return flops(cfg, seq_len, width=None if cfg.attention == "mla" else 2 * cfg.head_dim)


@TRAIN_FLOPS.wrong("A value of MLA is v_head_dim wide: you take a key's width, qk_head_dim, for both.")
def values_as_wide_as_keys(cfg, seq_len):
    return flops(cfg, seq_len, width=2 * cfg.qk_head_dim if cfg.attention == "mla" else None)


@TRAIN_FLOPS.wrong("A key of MLA has its nope columns too: you take qk_rope_head_dim alone; its width is qk_head_dim.")
def nope_forgotten(cfg, seq_len):
    return flops(cfg, seq_len, width=cfg.qk_rope_head_dim + cfg.v_head_dim if cfg.attention == "mla" else None)


@TRAIN_FLOPS.wrong("The head is left out: its V·D parameters multiply every token, and `active` holds them rightly.")
def head_left_out(cfg, seq_len):
    return flops(cfg, seq_len, size=accounting.parameters(cfg).active - cfg.vocab_size * cfg.hidden_size)


@TRAIN_FLOPS.wrong("That is the whole sequence, everything times seq_len: what ONE token costs is asked.")
def all_tokens(cfg, seq_len):
    return seq_len * flops(cfg, seq_len)


@TRAIN_FLOPS.wrong("Attention is counted in layers with experts alone: all cfg.num_hidden_layers have it.")
def attention_beside_experts(cfg, seq_len):
    return flops(cfg, seq_len, layers=sum(is_moe(cfg)))


@TRAIN_FLOPS.wrong("The two widths are multiplied: the products with keys and those with values are ADDED, w_k + w_v.")
def widths_multiplied(cfg, seq_len):
    one, two = widths(cfg)
    return flops(cfg, seq_len, width=one * two)


# 14.3 ------------------------------------------------------------------------------------------------------------


def training_cost(flops_per_token, tokens, peak, mfu, price):
    """(GPU-hours, dollars) of a training run; the same as minids.accounting.gpu_hours, for a GPU without a name."""
    hours = flops_per_token * tokens / (peak * mfu) / 3600
    return hours, hours * price


TRAINING_COST = Exercise(
    "14.3",
    training_cost,
    minutes=5,
    sizes=[
        {"giga": 256, "billions": 16, "tera": 984, "percent": 40, "cents": 200},
        {"giga": 155, "billions": 81, "tera": 312, "percent": 33, "cents": 110},
        {"giga": 2473, "billions": 15, "tera": 989, "percent": 41, "cents": 250},
        {"giga": 3, "billions": 20, "tera": 165, "percent": 7, "cents": 35},
        {"giga": 1, "billions": 1, "tera": 312, "percent": 50, "cents": 123},  # two hours: rounding shows
    ],
    hints=[
        "How many FLOPs is the whole run? How many does one GPU really do in a second? In an hour?",
        "FLOPs = flops_per_token · tokens; a GPU does peak · mfu of them in a second, 3600 times as many in an hour; "
        "dollars = hours · price.",
    ],
)


@TRAINING_COST.inputs
def _(r, giga, billions, tera, percent, cents):
    return giga * 1e9, billions * 1e9, tera * 1e12, percent / 100, cents / 100


def cost(flops_per_token, tokens, peak, mfu, price, each=3600.0):
    hours = flops_per_token * tokens / (peak * mfu) / each
    return hours, hours * price


@TRAINING_COST.wrong(
    "You multiply by the MFU: at a smaller share of the peak the run takes LONGER, so peak · mfu stands below the line."
)
def mfu_above(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, 1 / mfu, price)


@TRAINING_COST.wrong("You let the GPU run at its peak: it does mfu · peak FLOPs in a second, not peak.")
def at_the_peak(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, 1.0, price)


@TRAINING_COST.wrong("Those are seconds: 3600 of them make an hour, and the price is for an hour.")
def seconds(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price, each=1)


@TRAINING_COST.wrong("Those are minutes: an hour has 3600 seconds.")
def minutes(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price, each=60)


@TRAINING_COST.wrong("Those are days: hours are asked for, and the price is for an hour.")
def days(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price, each=86400)


@TRAINING_COST.wrong("The hours are right; the dollars are seconds times price: the price is for an hour.")
def dollars_by_seconds(flops_per_token, tokens, peak, mfu, price):
    hours, _ = cost(flops_per_token, tokens, peak, mfu, price)
    return hours, 3600 * hours * price


@TRAINING_COST.wrong("That is one token's part: multiply by the number of tokens.")
def one_token(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, 1, peak, mfu, price)


@TRAINING_COST.wrong("You multiply by 6 again: flops_per_token holds forward and backward already.")
def six_again(flops_per_token, tokens, peak, mfu, price):
    return cost(6 * flops_per_token, tokens, peak, mfu, price)


@TRAINING_COST.wrong("You divide the MFU by 100: it is given as a share, such as 0.4, and not in percent.")
def mfu_in_percent(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu / 100, price)


@TRAINING_COST.wrong(
    "The hours are right; the dollars are hours DIVIDED by the price: each hour costs it, so multiply."
)
def price_below(flops_per_token, tokens, peak, mfu, price):
    hours, _ = cost(flops_per_token, tokens, peak, mfu, price)
    return hours, hours / price


@TRAINING_COST.wrong("The order is swapped: hours first, then dollars.")
def dollars_first(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price)[::-1]


@TRAINING_COST.wrong("That is one number: give both, hours and dollars.")
def dollars_alone(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price)[1]


@TRAINING_COST.wrong(
    "You multiply by 3600 where you should divide (a / (b / 3600) multiplies): seconds are divided by 3600 to make hours."
)
def times_3600(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price, each=1 / 3600)


@TRAINING_COST.wrong("Upside down: the hours are all FLOPs divided by those that a GPU does in an hour.")
def hours_upside_down(flops_per_token, tokens, peak, mfu, price):
    hours = 1 / cost(flops_per_token, tokens, peak, mfu, price)[0]
    return hours, hours * price


@TRAINING_COST.wrong("The hours are cut to a whole number, and the dollars come from those: leave their fraction.")
def whole_hours(flops_per_token, tokens, peak, mfu, price):
    hours = int(cost(flops_per_token, tokens, peak, mfu, price)[0])
    return hours, hours * price


@TRAINING_COST.wrong("The hours are rounded up, and the dollars come from those: leave their fraction.")
def hours_rounded_up(flops_per_token, tokens, peak, mfu, price):
    hours = math.ceil(cost(flops_per_token, tokens, peak, mfu, price)[0])
    return hours, hours * price


@TRAINING_COST.wrong("That is the hours alone: give both, hours and dollars.")
def hours_only(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price)[0]


@TRAINING_COST.wrong("The MFU divides twice: a GPU does peak · mfu FLOPs in a second, once.")
def mfu_twice(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu * mfu, price)


@TRAINING_COST.wrong("You multiply the MFU by 100: it is given as a share, such as 0.4, and is used as it is.")
def mfu_times_100(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, 100 * mfu, price)


@TRAINING_COST.wrong("You divide by 2048 cards: GPU-hours are the hours of all cards together, however many there are.")
def divided_by_cards(flops_per_token, tokens, peak, mfu, price):
    return cost(flops_per_token, tokens, peak, mfu, price, each=3600 * 2048)


# 14.4 ------------------------------------------------------------------------------------------------------------

DECODE_BYTES = Exercise(
    "14.4",
    accounting.decode_bytes,
    minutes=10,
    sizes=[
        {
            "batch": 8,
            "context": 128,
            "L": 8,
            "E": 16,
            "A": 8,
            "F": 16,
            "shared": 8,
            "first": 8,
            "weight": 8,
            "cache": 8,
        },
        {"batch": 5, "context": 50, "L": 5, "E": 12, "A": 3, "F": 10, "shared": 2, "first": 2, "weight": 1, "cache": 2},
        {"batch": 1, "context": 77, "L": 4, "E": 9, "A": 2, "F": 7, "shared": 1, "first": 1, "weight": 2, "cache": 1},
        {"batch": 64, "context": 9, "L": 6, "E": 20, "A": 1, "F": 12, "shared": 0, "first": 3, "weight": 1, "cache": 4},
    ],
    hints=[
        "Which weights are read in every step, whoever asks? Of the experts only some: start from the active parameters "
        "of one token, and ask how many MORE experts of a layer the batch reads.",
        "d = E (1 - (1 - A/E)^B) different experts in each MoE layer; active holds A of them, so add layers with experts "
        "· (d - A) · 3·D·cfg.moe_intermediate_size. A cache belongs to one sequence: batch · context · kv_elements_per_token(cfg) numbers.",
    ],
)


@DECODE_BYTES.inputs
def _(r, batch, context, L, E, A, F, shared, first, weight, cache):
    return model(L=L, E=E, A=A, F=F, S=shared, first=min(first, L - 2)), batch, context, weight, cache


def step(cfg, batch, context, weight_bytes, cache_bytes, visited=None, layers=None, caches=None, extra=0, expert=None):
    """(weights, caches) with a part replaced; visited: different experts, layers: those that have experts."""
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    visited = E * (1 - (1 - A / E) ** batch) if visited is None else visited
    layers = sum(is_moe(cfg)) if layers is None else layers
    weights = accounting.parameters(cfg).active + layers * (visited - A) * (expert or one_expert(cfg)) + extra
    numbers = batch * context * accounting.kv_elements_per_token(cfg) if caches is None else caches
    return weight_bytes * weights, cache_bytes * numbers


@DECODE_BYTES.wrong("You read A experts of each layer, those of ONE token: the others of the batch choose others.")
def one_tokens_experts(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=cfg.num_experts_per_tok)


@DECODE_BYTES.wrong(
    "You read all E experts of a layer: a small batch leaves many unvisited; E (1 - (1 - A/E)^B) of them are read."
)
def all_experts(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=cfg.n_routed_experts)


@DECODE_BYTES.wrong(
    "You add up the choices of all tokens, A · B: tokens share experts, and a shared one is read once; A · B may even "
    "be more than there are."
)
def sum_of_choices(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=cfg.num_experts_per_tok * batch)


@DECODE_BYTES.wrong(
    "You take A · B experts, and E at most: as if no two tokens chose the same expert before all are taken. They do."
)
def capped(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    visited = min(cfg.n_routed_experts, cfg.num_experts_per_tok * batch)
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=visited)


@DECODE_BYTES.wrong("You round d to a whole number of experts: it is an average over many steps, so keep its fraction.")
def rounded(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=round(accounting.experts_touched(cfg, batch)))


@DECODE_BYTES.wrong(
    "You cut d down to a whole number of experts: it is an average over many steps, so keep its fraction."
)
def rounded_down(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=int(accounting.experts_touched(cfg, batch)))


@DECODE_BYTES.wrong(
    "You round d UP to a whole number of experts: it is an average over many steps, so keep its fraction."
)
def rounded_up(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(
        cfg, batch, context, weight_bytes, cache_bytes, visited=math.ceil(accounting.experts_touched(cfg, batch))
    )


@DECODE_BYTES.wrong(
    "You draw A · B experts one by one: a token's A experts are all different, so the share that it misses is 1 - A/E, "
    "not (1 - 1/E)^A."
)
def one_by_one(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=E * (1 - (1 - 1 / E) ** (A * batch)))


@DECODE_BYTES.wrong(
    "You count the experts that NOBODY visits, E (1 - A/E)^B: what is read are the others, E minus those."
)
def unvisited(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=E * (1 - A / E) ** batch)


@DECODE_BYTES.wrong(
    "You have 1 - (A/E)^B: A/E is the share that a token VISITS. An expert is missed with 1 - A/E, by all B."
)
def inverted(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=E * (1 - (A / E) ** batch))


@DECODE_BYTES.wrong("A token's own A experts count twice: `active` holds them, so only d - A experts come to it.")
def counted_twice(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    extra = sum(is_moe(cfg)) * cfg.num_experts_per_tok * one_expert(cfg)
    return step(cfg, batch, context, weight_bytes, cache_bytes, extra=extra)


@DECODE_BYTES.wrong("All layers have experts in your count: the first ones are dense, sum over cfg.is_moe_layer(i).")
def all_layers(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, layers=cfg.num_hidden_layers)


@DECODE_BYTES.wrong(
    "The experts of one layer are counted: every layer for which cfg.is_moe_layer(i) is True has its own."
)
def one_layer_of_experts(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, layers=1)


@DECODE_BYTES.wrong("An expert has three matrices of D times moe_intermediate_size; you count one.")
def one_matrix(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, expert=one_expert(cfg) / 3)


@DECODE_BYTES.wrong("An expert's width is moe_intermediate_size; you take the dense layers' intermediate_size.")
def dense_width(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, expert=3 * cfg.hidden_size * cfg.intermediate_size)


@DECODE_BYTES.wrong(
    "The input embedding is read whole in your count: each token looks up one row, that is next to nothing."
)
def whole_embedding(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, extra=cfg.vocab_size * cfg.hidden_size)


@DECODE_BYTES.wrong(
    "Each sequence reads all weights for itself in your count: a batch reads a weight ONCE, for all of it."
)
def weights_for_each(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    weights, caches = step(cfg, batch, context, weight_bytes, cache_bytes)
    return batch * weights, caches


@DECODE_BYTES.wrong("One cache is read in your count: every sequence of the batch has its own.")
def one_cache(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    caches = context * accounting.kv_elements_per_token(cfg)
    return step(cfg, batch, context, weight_bytes, cache_bytes, caches=caches)


@DECODE_BYTES.wrong("The cache of one token is read: a step reads all `context` positions that came before.")
def one_position(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    caches = batch * accounting.kv_elements_per_token(cfg)
    return step(cfg, batch, context, weight_bytes, cache_bytes, caches=caches)


@DECODE_BYTES.wrong(
    "You take 2 bytes for each number of the cache: kv_bytes_per_token means bfloat16; take cache_bytes."
)
def two_bytes(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, 2)


@DECODE_BYTES.wrong("weight_bytes and cache_bytes are swapped.")
def swapped(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, cache_bytes, weight_bytes)


@DECODE_BYTES.wrong("The order is swapped: weights first, then caches.")
def caches_first(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes)[::-1]


@DECODE_BYTES.wrong("That is the sum: give both, weights and caches, for they grow in different ways.")
def added(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return sum(step(cfg, batch, context, weight_bytes, cache_bytes))


@DECODE_BYTES.wrong("Those are NUMBERS: a weight takes weight_bytes, a number of a cache cache_bytes.")
def numbers_alone(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, 1, 1)


@DECODE_BYTES.wrong("You take 2 bytes for everything: the defaults are 2, the arguments may be others.")
def two_bytes_each(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, 2, 2)


@DECODE_BYTES.wrong("You take 2 bytes for each weight: that is the default, take weight_bytes.")
def two_bytes_a_weight(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, 2, cache_bytes)


@DECODE_BYTES.wrong("The caches are multiplied by weight_bytes: theirs is cache_bytes.")
def weight_bytes_for_both(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, weight_bytes)


@DECODE_BYTES.wrong(
    "The caches are doubled: kv_elements_per_token(cfg) has keys AND values in it, kv_bytes_per_token 2 bytes for each "
    "number. Take the first as it is, times cache_bytes."
)
def bytes_twice(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, 2 * cache_bytes)


@DECODE_BYTES.wrong("kv_elements_per_token counts all layers already: nothing is multiplied by their number.")
def layers_twice(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    weights, caches = step(cfg, batch, context, weight_bytes, cache_bytes)
    return weights, cfg.num_hidden_layers * caches


@DECODE_BYTES.wrong(
    "All weights of the model are read in your count: of the experts only d, and of the embedding one row."
)
def whole_model(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    weights = weight_bytes * accounting.parameters(cfg).total
    return weights, step(cfg, batch, context, weight_bytes, cache_bytes)[1]


@DECODE_BYTES.wrong(
    "`active` is what ONE token needs: the batch shares all of it but the experts, so it is not multiplied by B."
)
def active_for_each(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    weights = weight_bytes * batch * accounting.parameters(cfg).active
    return weights, step(cfg, batch, context, weight_bytes, cache_bytes)[1]


@DECODE_BYTES.wrong("Only routed experts are there: attention, dense layers and head are read in every step too.")
def experts_alone(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    rest = sum(is_moe(cfg)) * cfg.num_experts_per_tok * one_expert(cfg) - accounting.parameters(cfg).active
    return step(cfg, batch, context, weight_bytes, cache_bytes, extra=rest)


@DECODE_BYTES.wrong("You take the share d/E of ALL weights: it is that of the routed experts, the rest is read whole.")
def share_of_all(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    share = accounting.experts_touched(cfg, batch) / cfg.n_routed_experts
    weights = weight_bytes * accounting.parameters(cfg).total * share
    return weights, step(cfg, batch, context, weight_bytes, cache_bytes)[1]


@DECODE_BYTES.wrong("You take d/A times ALL active parameters: only the routed experts among them grow with the batch.")
def active_by_share(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    share = accounting.experts_touched(cfg, batch) / cfg.num_experts_per_tok
    weights = weight_bytes * accounting.parameters(cfg).active * share
    return weights, step(cfg, batch, context, weight_bytes, cache_bytes)[1]


@DECODE_BYTES.wrong("1 - (1 - A/E)^B is the SHARE of the experts that is read: times E it is their number.")
def share_for_number(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    E = cfg.n_routed_experts
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=accounting.experts_touched(cfg, batch) / E)


@DECODE_BYTES.wrong("The share that is missed is multiplied by B: B tokens miss an expert with (1 - A/E)^B, a power.")
def times_for_power(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    return step(cfg, batch, context, weight_bytes, cache_bytes, visited=E * (1 - (1 - A / E) * batch))


@DECODE_BYTES.wrong("An expert has three matrices, gate, up and down; you count two.")
def expert_of_two_matrices(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, expert=one_expert(cfg) * 2 / 3)


@DECODE_BYTES.wrong(
    "You divide moe_parameters by E for one expert: it holds the router and the shared experts too. One is 3·D·"
    "moe_intermediate_size."
)
def expert_by_division(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    expert = accounting.moe_parameters(cfg).total / cfg.n_routed_experts
    return step(cfg, batch, context, weight_bytes, cache_bytes, expert=expert)


@DECODE_BYTES.wrong("You count the DENSE layers, first_k_dense_replace: the others have the experts.")
def dense_layers_counted(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context, weight_bytes, cache_bytes, layers=cfg.first_k_dense_replace)


@DECODE_BYTES.wrong("The new token counts too in your caches: a step reads the `context` tokens that are in them.")
def context_and_one(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    return step(cfg, batch, context + 1, weight_bytes, cache_bytes)


@DECODE_BYTES.wrong("That is per token: what the whole step reads is asked, for all sequences together.")
def for_each_token(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    weights, caches = step(cfg, batch, context, weight_bytes, cache_bytes)
    return weights / batch, caches / batch


# 14.5 ------------------------------------------------------------------------------------------------------------

PRICE = Exercise(
    "14.5",
    accounting.dollars_per_million,
    minutes=4,
    sizes=[
        {"speed": 1040, "cents": 200, "gpus": 8},
        {"speed": 21, "cents": 35, "gpus": 1},
        {"speed": 14800, "cents": 215, "gpus": 7},
        {"speed": 333, "cents": 100, "gpus": 320},
    ],
    hints=[
        "What do all GPUs together cost in an hour, and how many tokens do they make in it?",
        "gpus · price_per_hour dollars buy 3600 · tokens_per_second tokens; a million of them cost a million times one.",
    ],
)


@PRICE.inputs
def _(r, speed, cents, gpus):
    return float(speed), cents / 100, gpus


def price(tokens_per_second, price_per_hour, gpus, seconds=3600):
    return 1e6 * gpus * price_per_hour / (seconds * tokens_per_second)


@PRICE.wrong("One GPU is paid in your count: all `gpus` of them are, the speed is that of all together.")
def one_gpu(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, 1)


@PRICE.wrong(
    "You divide by the number of GPUs: tokens_per_second is what all of them make together, and all cost money."
)
def divided_by_gpus(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, 1 / gpus)


@PRICE.wrong("The price is for an hour and the speed for a second: an hour has 3600 of them.")
def as_if_per_second(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus, seconds=1)


@PRICE.wrong("You take an hour for a minute: it has 3600 seconds, not 60.")
def sixty_seconds(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus, seconds=60)


@PRICE.wrong("You take an hour for a day, 86400 seconds: the price is for an hour.")
def a_day(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus, seconds=86400)


@PRICE.wrong("That is the price of ONE token: a million of them cost a million times as much.")
def one_token_s_price(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus) / 1e6


@PRICE.wrong("That is the price of a thousand tokens: what a million cost is asked.")
def a_thousand(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus) / 1e3


@PRICE.wrong("That is how many million tokens a dollar buys: what a million cost is one over it.")
def upside_down(tokens_per_second, price_per_hour, gpus=1):
    return 1 / price(tokens_per_second, price_per_hour, gpus)


@PRICE.wrong("You multiply by the speed: a faster machine makes the tokens CHEAPER, so it stands below the line.")
def dearer_when_faster(tokens_per_second, price_per_hour, gpus=1):
    return price(1 / tokens_per_second, price_per_hour, gpus)


@PRICE.wrong(
    "Without brackets / and * go from left to right: a / b * 3600 multiplies by 3600. Divide by (tokens_per_second * 3600)."
)
def brackets_missing(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus, seconds=1 / 3600)


@PRICE.wrong("Those are hours: each costs price_per_hour for each of the `gpus`.")
def hours_alone(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, 1, 1)


@PRICE.wrong("The price and the number of GPUs are added: each GPU costs the price, so multiply.")
def gpus_added(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour + gpus, 1)


@PRICE.wrong("That is the price of a billion tokens: what a million cost is asked.")
def a_billion(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus) * 1e3


@PRICE.wrong("That is in cents: give dollars.")
def cents(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus) * 100


@PRICE.wrong("That is what the million tokens would cost in a day's hours: there is no 24 in it.")
def a_day_s_hours(tokens_per_second, price_per_hour, gpus=1):
    return price(tokens_per_second, price_per_hour, gpus) * 24
