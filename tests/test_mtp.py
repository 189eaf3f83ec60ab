"""Multi-token prediction: the paper's equations in a plain loop, what a module sees, training, checkpoints."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minids import accounting, data, fp8, generate, optim, speculate, train
from minids.config import ModelConfig
from minids.fp8 import Fp8Linear
from minids.hub import CheckpointFormatError
from minids.layers import rope_tables
from minids.model import MTP_WEIGHT, Block, Transformer
from minids.moe import Experts
from minids.numerics import TOLERANCE, relative_error, seed_everything
from minids.run import begin

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
SIZES |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "initializer_range": 0.2}
CLOSE = 1e-7  # of sums in float64: routers round to fp32, one product or many at a time


def model_with(modules=1, **changes):
    seed_everything(5)
    model = Transformer(ModelConfig(**{**SIZES, "num_nextn_predict_layers": modules, **changes})).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)  # a norm left out, or taken twice, is seen
    return model


def text(rows=2, length=12):
    return torch.randint(61, (rows, length)), torch.randint(61, (rows, length))


# The equations ------------------------------------------------------------------------------------------------------


def normed(x, norm):
    return x / (x.pow(2).mean() + norm.eps).sqrt() * norm.weight


def by_the_paper(model, t):
    """-log P^k of the tokens t [T+1] (t_1 is t[1]), k = 0 for the main head, {k: {i: nats}} (V3 eq. 21-24)."""
    cfg, T = model.cfg, len(t) - 2
    nats = {0: {}}
    h = dict(enumerate(model.hidden(t[None, 1:-1])[0], 1))  # h^0_i, i = 1 .. T
    for i in h:
        nats[0][i + 1] = -(model.lm_head.weight @ h[i]).log_softmax(-1)[t[i + 1]]
    for k, module in enumerate(model.mtp, 1):
        M = torch.cat([module.eh_proj.weight[:, cfg.hidden_size :], module.eh_proj.weight[:, : cfg.hidden_size]], 1)
        block = Block(cfg, cfg.num_hidden_layers).to(h[1].dtype).eval()
        own = {name: p for name, p in module.state_dict().items() if name in block.state_dict()}
        block.load_state_dict(own)
        inputs = []
        for i in range(1, T - k + 1):
            emb = model.embed_tokens.weight[t[i + k]]
            inputs.append(M @ torch.cat([normed(h[i], module.hnorm), normed(emb, module.enorm)]))
        nats[k] = {}
        for i in range(1, T - k + 1):  # h^k_i from h'_1 .. h'_i alone
            out = block(torch.stack(inputs[:i])[None], *rope_tables(cfg, torch.arange(i)))
            h[i] = normed(out[0, -1], module.shared_head.norm)
            nats[k][i + k + 1] = -(model.lm_head.weight @ h[i]).log_softmax(-1)[t[i + k + 1]]
    return nats


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_routed_experts": 0}, {"attention": "gqa", "num_key_value_heads": 2}])
@pytest.mark.parametrize("weight", [MTP_WEIGHT, 0.1])
def test_the_loss_is_that_of_the_papers_equations(weight, changes):
    model = model_with(2, **changes).double()
    t = torch.randint(61, (12,))
    nats = by_the_paper(model, t)
    mean = {k: sum(of.values()) / len(of) for k, of in nats.items()}
    assert [sorted(of)[0] for of in nats.values()] == [2, 3, 4] and {max(of) for of in nats.values()} == {11}
    loss, cross_entropy = model.loss(t[None, 1:-1], t[None, 2:], weight)
    assert abs(cross_entropy - mean[0]) < CLOSE
    assert abs(loss - (mean[0] + weight / 2 * (mean[1] + mean[2]))) < CLOSE
    if weight == MTP_WEIGHT:
        assert torch.equal(model.loss(t[None, 1:-1], t[None, 2:])[0], loss)


def test_targets_that_do_not_count_do_not_count_for_mtp():
    model, (tokens, targets) = model_with(1).double(), text()
    masked = targets.masked_fill(torch.rand(targets.shape) < 0.4, -100)
    (h,) = model.mtp_hidden(tokens, model.hidden(tokens))
    want = torch.nn.functional.cross_entropy(model.lm_head(h).flatten(0, 1), masked[:, 1:].flatten())
    loss, cross_entropy = model.loss(tokens, masked, 1.0)
    assert abs(loss - cross_entropy - want) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 3])
def test_module_k_sees_the_tokens_up_to_k_later_and_no_further(k):
    model, (tokens, _) = model_with(3).double(), text()
    for place in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, place] = (tokens[:, place] + 7) % 61
        before, after = (model.mtp_hidden(t, model.hidden(t))[k - 1] for t in (tokens, other))
        assert before.shape[1] == tokens.shape[1] - k
        errors = [relative_error(after[:, t], before[:, t]) for t in range(before.shape[1])]
        assert [error < 1e-12 for error in errors] == [t + k < place for t in range(before.shape[1])]


def test_the_module_of_deepseek_v3_has_the_parameters_that_accounting_counts():
    cfg = ModelConfig.preset("deepseek-v3")
    with torch.device("meta"):
        mtp = Transformer(cfg).mtp
    assert len(mtp) == 1
    assert sum(p.numel() for p in mtp.state_dict().values()) == accounting.mtp_parameters(cfg).total


def test_sequences_too_short_are_refused():
    with pytest.raises(ValueError, match="sequences of 2 are too short for 2 MTP modules"):
        model_with(2).loss(*text(length=2))
    assert model_with(2).loss(*text(length=3))[0] > 0


# The model as it was ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_rest_of_the_model_is_drawn_and_computes_as_without():
    seed_everything(3)
    plain = Transformer(ModelConfig(**SIZES)).eval()
    seed_everything(3)
    model = Transformer(ModelConfig(**SIZES, num_nextn_predict_layers=2)).eval()
    own = {name: p for name, p in model.state_dict().items() if not name.startswith("mtp.")}
    assert own.keys() == plain.state_dict().keys() and len(own) < len(model.state_dict())
    assert all(torch.equal(p, own[name]) for name, p in plain.state_dict().items())
    tokens, targets = text()
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model.loss(tokens, targets)[1], plain.loss(tokens, targets)[1])
    assert torch.equal(generate(model, tokens, 9), generate(plain, tokens, 9))
    cache = model.new_cache(2, 20)
    model(tokens, cache)
    model(tokens[:, :1], cache)
    assert cache[0].step and len(cache) == 2, "the flat step of decode.py serves a model with MTP too"


def test_gradients_reach_all_of_a_module_and_what_it_shares():
    model, (tokens, targets) = model_with(2, aux_loss_alpha=0.0).train(), text()
    model.loss(tokens, targets, 0.0)[0].backward()
    main = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.loss(tokens, targets, 1.0)[0].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
        if name.startswith("mtp."):
            assert not main[name].any(), name
        elif not name.endswith("gate.weight"):
            assert relative_error(p.grad, main[name]) > 1e-3, name
    width = model.cfg.hidden_size
    assert all(half.any() for half in model.mtp[1].eh_proj.weight.grad.split(width, 1)), "embedding and hidden state"


def test_the_chain_of_modules_is_not_cut():
    model, (tokens, _) = model_with(2, first_k_dense_replace=0), text()
    model.lm_head(model.mtp_hidden(tokens, model.hidden(tokens))[1]).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, "module 2 teaches module 1 and the model (V3 figure 3)"


def test_its_experts_are_balanced_counted_and_optimised_like_the_others():
    model, (tokens, targets) = model_with(1, aux_loss_alpha=0.5).train(), text()
    assert model.moe_layers() == [model.layers[1].mlp, model.mtp[0].mlp]
    loss, cross_entropy = model.loss(tokens, targets, 0.0)
    own = [moe.balance_loss for moe in model.moe_layers()]
    assert min(own) > 0 and abs(loss - cross_entropy - sum(own)) < 1e-5
    assert [int(moe.gate.load.sum()) for moe in model.moe_layers()] == [2 * 12 * 2, 2 * 11 * 2], "a position less"
    vio, loads = model.update_expert_bias(0.01)
    assert loads.shape == (2, 6) and torch.allclose(loads.mean(1), torch.ones(2)) and vio > 0
    assert model.mtp[0].mlp.gate.e_score_correction_bias.any() and not model.mtp[0].mlp.gate.load.any()
    muon, adam = optim.build_optimizers(model, 0.1, 0.1, 0.0)
    held = [p for one in (muon, adam) for group in one.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(list(model.parameters()))
    assert any(p is model.mtp[0].eh_proj.weight for group in muon.param_groups for p in group["params"])


def test_fp8_takes_its_block_and_leaves_eh_proj():
    model = fp8.convert(model_with(1))
    for name, module in model.mtp[0].named_modules():
        if isinstance(module, Experts):
            assert module.grouped_product is not None
        elif isinstance(module, torch.nn.Linear):
            assert isinstance(module, Fp8Linear) == (name != "eh_proj"), name
    loss, _ = model.train().loss(*text())
    loss.backward()
    assert all(p.grad.any() for p in model.mtp.parameters())


def test_a_module_learns_the_token_after_the_next():
    seed_everything(1)
    model = model_with(1, aux_loss_alpha=0.0, initializer_range=0.05).train()
    row = torch.arange(13).repeat(4, 1) * torch.tensor([[1], [2], [3], [4]]) % 61  # the next token follows from two
    optimizers = optim.build_optimizers(model, 0.01, 0.01, 0.0)

    def of_mtp():
        loss, cross_entropy = model.loss(row[:, :-1], row[:, 1:], 1.0)
        return loss - cross_entropy

    before = of_mtp().item()
    for _ in range(30):
        model.loss(row[:, :-1], row[:, 1:])[0].backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    assert of_mtp() < 0.5 * before
    model.eval()
    some = {}
    for seed in range(8):
        prompt = torch.randint(61, (1, 4), generator=torch.Generator().manual_seed(seed))
        ids, passes = speculate(model, prompt, 20)
        assert torch.equal(ids, generate(model, prompt, 20)) and passes == passes_of(model, ids, 4)
        some[passes] = seed
    assert min(some) < 16 and max(some) > 12 and len(some) > 2, "some drafts hold, some do not"


def passes_of(model, ids, given):
    """How many passes `speculate` needs for ids[:, given:], from the drafts of one pass over all of `ids`."""
    (h,) = model.mtp_hidden(ids, model.hidden(ids))
    drafts, known, passes = [None, None, *model.lm_head(h).argmax(-1)[0].tolist()], given + 1, 1
    while known < ids.shape[1]:
        known, passes = known + 1 + (drafts[known] == ids[0, known]), passes + 1
    return passes


# Drafting -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention": "gqa", "num_key_value_heads": 2}, {"q_lora_rank": 24}])
@pytest.mark.parametrize("draft", ["its own", "right", "wrong"])
def test_drafted_tokens_are_those_of_generate(draft, changes, monkeypatch):
    model, prompt, n = model_with(1, **changes).double(), torch.randint(61, (1, 7)), 25
    want = generate(model, prompt, n)
    if draft != "its own":
        known, counts = generate(model, prompt, n + 1)[0], []
        one_hot = torch.linalg.pinv(model.lm_head.weight)  # [D,V]: the head makes of column v the logits of token v

        def module(embedded, h, cos, sin, cache):
            counts.append(h.shape[1])
            token = known[min(sum(counts) + 1, n + 7)] + (draft == "wrong")  # so many tokens are known now, and one
            return one_hot[:, token % 61].expand(1, h.shape[1], -1)

        monkeypatch.setattr(model.mtp[0], "forward", module)
    for length in (0, 1, 2, n):
        ids, passes = speculate(model, prompt, length)
        assert torch.equal(ids, want[:, : 7 + length])
        fewest = 1 + length // 2 if length else 0  # there is no draft in the first one
        if draft == "its own":
            assert fewest <= passes <= length
        else:
            assert passes == (fewest if draft == "right" else length)
            counts.clear()


@torch.no_grad()
def test_the_module_drafts_from_its_cache_what_it_would_from_all_tokens():
    model, prompt, outputs = model_with(1).double(), torch.randint(61, (1, 7)), []
    handle = model.mtp[0].register_forward_hook(lambda *given: outputs.append(given[2]))
    ids, _ = speculate(model, prompt, 25)
    handle.remove()
    (want,) = model.mtp_hidden(ids, model.hidden(ids))
    error = relative_error(torch.cat(outputs, 1)[:, : want.shape[1]], want)
    assert error < TOLERANCE[torch.float32], "the routers' logits are fp32"


def test_what_cannot_be_drafted_is_refused():
    for model, rows in ((model_with(0), 1), (model_with(1), 2)):
        with pytest.raises(ValueError, match=f"{rows} rows, {len(model.mtp)} MTP modules; speculate takes one row"):
            speculate(model, torch.zeros(rows, 3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="max_position_embeddings is 128"):
        speculate(model_with(1), torch.zeros(1, 3, dtype=torch.int64), 126)
    model = model_with(1).train()
    assert speculate(model, torch.zeros(1, 3, dtype=torch.int64), 126 - 1)[0].shape == (1, 128) and model.training


@torch.no_grad()
def test_acceptance_is_how_often_both_heads_choose_the_same_token():
    model = model_with(2, vocab_size=300)
    corpus = SimpleNamespace(heldout=[bytes(range(32, 127)) * 4, b"other words, of another file"], train=[b"abc def"])
    corpus.hash, corpus.cache_dir = "x", None
    tokens = data.encode_files(BYTES, corpus.heldout).long()
    want, windows, length = torch.zeros(2), 3, 10
    for start in (0, (len(tokens) - length) // 2, len(tokens) - length):
        row = tokens[None, start : start + length]
        for k, h in enumerate(model.mtp_hidden(row, model.hidden(row)), 1):
            for t in range(length - k):
                main = model(row[:, : t + k + 1])[0, -1].argmax()  # of the tokens that the module sees
                want[k - 1] += (model.lm_head(h[0, t]).argmax() == main) / (length - k) / windows
    got = data.heldout_acceptance(model.train(), BYTES, corpus, length, windows)
    assert got == pytest.approx(want.tolist()) and model.training
    assert data.heldout_acceptance(model_with(0, vocab_size=300), BYTES, corpus, length) == []
    assert data.heldout_acceptance(model, BYTES, SimpleNamespace(heldout=[b"ab"]), length) == [], "too short to guess"
    for module in model.mtp:  # one that predicts what the main head does is always right
        module.forward = lambda emb, h, cos, sin: h_of_main[:, -h.shape[1] :]
    row = tokens[None, :length]
    h_of_main = model.eval().hidden(row)
    assert data.heldout_acceptance(model, BYTES, SimpleNamespace(heldout=[corpus.heldout[0][:10]]), length, 2) == [1, 1]


class Bytes:
    """A tokenizer whose tokens are the bytes."""

    encode_special_tokens = True

    def get_vocab_size(self):
        return 256

    def encode_batch_fast(self, texts):
        return [SimpleNamespace(ids=list(text.encode())) for text in texts]


BYTES = Bytes()


# Checkpoints --------------------------------------------------------------------------------------------------------


def edit(path, change):
    """Rewrite one safetensors file with `change` applied to its dict of tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(p.view(torch.uint8), other[name].view(torch.uint8)) and p.dtype == other[name].dtype
        for name, p in one.items()
    )


@pytest.mark.parametrize("shard", [5 * 10**9, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("modules", "changes"),
    [
        (1, {"q_lora_rank": 24}),
        (2, {"tie_word_embeddings": True}),
        (1, {"n_routed_experts": 0, "attention": "mha"}),
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(modules, changes, dtype, shard, tmp_path, caplog):
    model = model_with(modules, **changes).to(dtype)
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    back = Transformer.from_pretrained(tmp_path)
    assert back.cfg == model.cfg and same_weights(back, model) and not caplog.text
    sample = text()
    assert torch.equal(back.loss(*sample)[0], model.loss(*sample)[0])


def test_the_names_of_a_module_are_the_hubs_once_each(tmp_path):
    model = model_with(1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    block = {name for name in tensors if name.startswith("model.layers.1.")}  # the last layer of the model has experts
    own = {"enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head"}
    want = {name.replace("layers.1.", "layers.2.") for name in block} | {f"model.layers.2.{n}.weight" for n in own}
    assert {name for name in tensors if name.startswith("model.layers.2.")} == want
    assert tensors["model.layers.2.eh_proj.weight"].shape == (48, 96)
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_copies_of_embedding_and_head_may_be_absent_and_are_compared(tmp_path, caplog):
    model = model_with(1)
    model.save_pretrained(tmp_path)
    path, copy = tmp_path / "model.safetensors", "model.layers.2.shared_head.head.weight"
    edit(path, lambda tensors: tensors.update({copy: tensors[copy] + 1}))
    assert same_weights(Transformer.from_pretrained(tmp_path), model)
    assert "layers.2.shared_head.head.weight differs from lm_head.weight, which is used in its place" in caplog.text
    assert "embed_tokens" not in caplog.text
    caplog.clear()
    edit(path, lambda tensors: (tensors.pop(copy), tensors.pop("model.layers.2.embed_tokens.weight")))
    assert same_weights(Transformer.from_pretrained(tmp_path), model) and not caplog.text


def test_a_checkpoint_without_the_weights_opens_without_the_modules(tmp_path, caplog):
    """As transformers writes it: it reads num_nextn_predict_layers, keeps it, and has no MTP weights."""
    transformers = pytest.importorskip("transformers")
    model = model_with(1)
    model.save_pretrained(tmp_path / "ours")
    kind, options = transformers.DeepseekV3ForCausalLM, {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {key.split(".")[2] for key in info["unexpected_keys"]} == {"2"}, "the weights of MTP, and only they"
    tokens = text()[0]
    with torch.no_grad():
        assert relative_error(model(tokens), theirs(tokens).logits) < TOLERANCE[torch.float32]
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with caplog.at_level(logging.WARNING, "minids"):
        back = Transformer.from_pretrained(tmp_path / "theirs")
    assert "config.json has 1 MTP modules, the weights have 0: opened with 0" in caplog.text
    assert not back.mtp and back.cfg.num_nextn_predict_layers == 0 and torch.equal(back(tokens), model(tokens))
    back.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    Transformer(back.cfg).load_state_dict(back.state_dict())  # the configuration says what the model has


def test_a_second_module_that_the_weights_lack_is_left_out_alone(tmp_path, caplog):
    model_with(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 2}))
    assert same_weights(Transformer.from_pretrained(tmp_path), model_with(1))
    assert "has 2 MTP modules, the weights have 1: opened with 1" in caplog.text


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("hnorm.weight", "missing weights: layers.2.hnorm.weight"),
        ("mlp.experts.3.up_proj.weight", "missing weights: mtp.0.mlp.experts.gate_up_proj of 1 expert matrices"),
        ("eh_proj.weight", "surplus weights: layers.2."),
    ],
)
def test_a_module_in_part_is_refused(lost, words, tmp_path):
    model_with(1).save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop(f"model.layers.2.{lost}"))
    with pytest.raises(CheckpointFormatError, match=words):
        Transformer.from_pretrained(tmp_path)


def test_fp8_keeps_eh_proj_as_it_is_and_quantises_the_block(tmp_path):
    model = model_with(1, hidden_size=136, moe_intermediate_size=136).bfloat16()
    model.save_pretrained(tmp_path, fp8=True)
    tensors = load_file(tmp_path / "model.safetensors")
    own = {name.removeprefix("model.layers.2."): t for name, t in tensors.items() if name.startswith("model.layers.2.")}
    quantised = {name for name, t in own.items() if t.dtype == torch.float8_e4m3fn}
    assert quantised == {name for name in own if "_proj" in name and name.endswith("weight")} - {"eh_proj.weight"}
    assert {f"{name}_scale_inv" for name in quantised} == {name for name in own if name.endswith("_scale_inv")}
    plain = Transformer.from_pretrained(tmp_path)
    assert torch.equal(plain.mtp[0].eh_proj.weight, model.mtp[0].eh_proj.weight)
    assert 0 < relative_error(plain.mtp[0].mlp.experts.down_proj, model.mtp[0].mlp.experts.down_proj) < 0.05
    kept = Transformer.from_pretrained(tmp_path, dtype=torch.float8_e4m3fn)
    assert kept.mtp[0].mlp.experts.gate_up_proj.dtype == torch.float8_e4m3fn
    assert kept.mtp[0].eh_proj.weight.dtype == torch.bfloat16
    tokens = text()[0]
    with torch.no_grad():
        mine, theirs = (m.mtp_hidden(tokens, m.hidden(tokens))[0] for m in (kept, plain))
    assert ((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median() < 0.3
    kept.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(t.view(torch.uint8), again[name].view(torch.uint8)) for name, t in tensors.items())


# The command --------------------------------------------------------------------------------------------------------

COMMAND = ["--preset", "tiny", "--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--checkpoint-every", "0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of 12 small files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(12):
        lines = [f"def f{index}_{i}(x):\n    return x + {i * index % 17}\n" for i in range(120)]
        (folder / f"file{index}.py").write_text("\n".join(lines))
    return folder


def test_a_run_with_mtp_trains_says_what_it_guesses_and_resumes_to_the_same_bits(corpus, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*COMMAND, "--data", str(corpus), "--steps", "6", "--mtp", "1", "--out", str(whole)]) == 0
    record = json.loads((whole / "run.json").read_text())
    (share,) = record["result"]["mtp_acceptance"]
    assert record["arguments"]["mtp"] == 1 and 0 <= share <= 1
    out = capsys.readouterr().out
    assert f"MTP guesses the token 2 ahead as the main head then does: {share:.1%} of" in out
    own = accounting.mtp_parameters(ModelConfig.preset("tiny", num_nextn_predict_layers=1)).total
    assert f"M active and {own / 1e6:.1f}M of MTP; " in out
    assert len(json.loads((whole / "log.jsonl").read_text().splitlines()[-1])["loads"]) == 4, "three layers and MTP's"
    run = begin(record["arguments"], cut)
    first = run.model.mtp[0].eh_proj.weight.clone()
    run.train_step(6), run.train_step(6), run.save_checkpoint()
    assert not torch.equal(run.model.mtp[0].eh_proj.weight, first)
    assert train.main(["--resume", str(cut)]) == 0
    files = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert files[0] == files[1]
    model = Transformer.from_pretrained(whole / "model")
    assert len(model.mtp) == 1 and generate(model, torch.tensor([[1, 2, 3]]), 4).shape == (1, 7)


def test_a_run_of_an_older_version_has_no_mtp(corpus, tmp_path, capsys):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert train.main([*COMMAND, "--data", str(corpus), "--steps", "4", "--out", str(whole)]) == 0
    assert "MTP" not in capsys.readouterr().out
    arguments = json.loads((whole / "run.json").read_text())["arguments"]
    assert arguments.pop("mtp") == 0
    run = begin(arguments, folder)
    run.train_step(4), run.save_checkpoint()
    assert train.main(["--resume", str(folder)]) == 0
    assert "mtp" not in json.loads((folder / "run.json").read_text())["arguments"]
    files = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, folder)]
    assert files[0] == files[1]


@pytest.mark.parametrize("number", ["-1", "32"])
def test_a_number_of_modules_that_cannot_be_is_refused(number, corpus, tmp_path, capsys):
    assert train.main([*COMMAND, "--data", str(corpus), "--mtp", number, "--out", str(tmp_path / "run")]) == 2
    assert f"--mtp is {number}; give 0 or more modules, fewer than --seq-len 32" in capsys.readouterr().err
