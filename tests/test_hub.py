"""Checkpoints in the hub's layout: ours opened by transformers and the reverse, FP8, and what is wrong with files."""

import copy
import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minids import files, hub
from minids.config import ConfigError, ModelConfig
from minids.fp8 import Fp8Linear, convert, reference
from minids.hub import CheckpointFormatError
from minids.model import Transformer
from minids.numerics import TOLERANCE, relative_error

FP32 = TOLERANCE[torch.float32]
V2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}


def small(**changes):
    sizes = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    sizes |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "initializer_range": 0.2}
    return ModelConfig(**{**sizes, **changes})


def random_model(**changes):
    model = Transformer(small(**changes)).eval()
    for moe in model.moe_layers():
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.uniform_(-2, -0.5)
    return model


def logits(model):
    with torch.no_grad():
        out = model(torch.arange(60).view(2, 30))
    return getattr(out, "logits", out)


def opened_by_transformers(folder, kind):
    transformers = pytest.importorskip("transformers")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.set_experts_implementation("eager")
    return model.eval()


def typical_error(got, want):
    """The median over tokens of their relative error: a router that rounding tips sends a few elsewhere altogether."""
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).median().item()


def edit(path, change):
    """Rewrite one safetensors file with `change` applied to its dict of tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# To transformers and back -------------------------------------------------------------------------------------------

CASES = [
    ("DeepseekV3ForCausalLM", {"q_lora_rank": 24, "rope_scaling": YARN, "n_group": 3, "topk_group": 2}),
    ("DeepseekV3ForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    ("DeepseekV3ForCausalLM", {"n_routed_experts": 0}),
    ("DeepseekV2ForCausalLM", {**V2, "n_group": 3, "topk_group": 2, "rope_scaling": YARN}),
    ("DeepseekV2ForCausalLM", {**V2, "topk_method": "greedy", "q_lora_rank": 24, "n_shared_experts": 2}),
]


@pytest.mark.parametrize("shard", [5 * 10**9, 40_000])
@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_saved_here_opens_there_and_comes_back(kind, changes, shard, tmp_path):
    model = random_model(**changes)
    model.save_pretrained(tmp_path / "ours", max_shard_bytes=shard)
    assert ((tmp_path / "ours" / hub.INDEX).exists()) == (shard < 10**6)
    oracle = opened_by_transformers(tmp_path / "ours", kind)
    assert relative_error(logits(model), logits(oracle)) < FP32
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="5GB" if shard > 10**6 else "40KB")
    files = len(list((tmp_path / "theirs").glob("*.safetensors")))
    back = Transformer.from_pretrained(tmp_path / "theirs")
    assert (files > 1) == (shard < 10**6) and torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("changes", [{"attention": "mha"}, {"attention": "gqa", "num_key_value_heads": 2}, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_round_trip_keeps_every_bit(changes, dtype, tmp_path):
    model = random_model(**changes).to(dtype)
    model.save_pretrained(tmp_path)
    back = Transformer.from_pretrained(tmp_path)
    assert back.cfg == model.cfg and not back.training
    want = model.state_dict()
    assert back.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) and v.dtype == want[k].dtype for k, v in back.state_dict().items())
    assert Transformer.from_pretrained(tmp_path, dtype=torch.float64).lm_head.weight.dtype == torch.float64


def test_the_router_bias_stays_float32(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    back = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = back.moe_layers()[0].gate.e_score_correction_bias
    assert torch.equal(bias, model.moe_layers()[0].gate.e_score_correction_bias)
    assert back.embed_tokens.weight.dtype == torch.bfloat16


def test_config_keys_survive_load_and_save(tmp_path):
    random_model(rope_scaling=YARN).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoModel": "x.Y"}, "ep_size": 1, "eos_token_id": 7}
    path.write_text(json.dumps(config))
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


def test_a_second_save_replaces_the_first_whatever_its_shards(tmp_path):
    first, second, third = (random_model() for _ in range(3))
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_bytes=40_000)
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path)), logits(second))
    assert relative_error(logits(opened_by_transformers(tmp_path, CASES[0][0])), logits(second)) < FP32
    third.save_pretrained(tmp_path, max_shard_bytes=80_000)
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path)), logits(third))
    shards = set(json.loads((tmp_path / hub.INDEX).read_text())["weight_map"].values())
    assert {path.name for path in tmp_path.iterdir()} == shards | {hub.INDEX, "config.json"}
    first.save_pretrained(tmp_path)
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path)), logits(first))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


# FP8 and MTP --------------------------------------------------------------------------------------------------------


def quantise(weight):
    """E4M3 codes of `weight` and the multiplier of each 128x128 block."""
    return reference.quantize_blocks(weight)


def test_fp8_is_dequantised_by_blocks(tmp_path):
    model = random_model(hidden_size=200, intermediate_size=300, moe_intermediate_size=136).bfloat16()
    for folder in (tmp_path, tmp_path / "twin"):
        model.save_pretrained(folder)
    want = {}

    def to_fp8(tensors):
        for name, tensor in list(tensors.items()):
            if name.endswith("proj.weight") or name.endswith("_with_mqa.weight"):
                codes, scales = quantise(tensor)
                tensors |= {name: codes, name + "_scale_inv": scales}
                rows, columns = (torch.arange(n) // 128 for n in tensor.shape)
                want[name] = (codes.float() * scales[rows][:, columns]).bfloat16()

    edit(tmp_path / "model.safetensors", to_fp8)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = Transformer.from_pretrained(tmp_path)
    got = dict(hub.hub_tensors(back))
    assert len(want) > 20 and all(torch.equal(got[name], want[name]) for name in want)
    edit(tmp_path / "twin" / "model.safetensors", lambda tensors: tensors.update(want))
    wide, twin = (Transformer.from_pretrained(f, dtype=torch.float32) for f in (tmp_path, tmp_path / "twin"))
    assert torch.equal(logits(wide), logits(twin))
    back.save_pretrained(tmp_path / "again")  # in bf16, so nothing may call it FP8
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "again")), logits(back))


def test_fp8_without_or_with_wrong_scales_is_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    random_model().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: t.update({name: quantise(t[name])[0]}))
    with pytest.raises(CheckpointFormatError, match=f"{name} is FP8, but its scales {name}_scale_inv are missing"):
        Transformer.from_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: t.update({name + "_scale_inv": torch.ones(1, 1)}))
    for dtype in (None, torch.float8_e4m3fn):
        with pytest.raises(CheckpointFormatError, match=rf"{name}: scales are \[1, 1\], \[3, 1\] expected"):
            Transformer.from_pretrained(tmp_path, dtype=dtype)


FP8_MODELS = [
    {"hidden_size": 200, "intermediate_size": 300, "moe_intermediate_size": 136},
    {"hidden_size": 130, "moe_intermediate_size": 128, "q_lora_rank": 24, "attention_bias": True},
    {"attention": "gqa", "num_key_value_heads": 2, "n_routed_experts": 0, "tie_word_embeddings": True},
]


def what_deepseek_quantises(name):
    return "_proj" in name and name.endswith(".weight")


@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("changes", FP8_MODELS)
def test_a_model_is_saved_in_fp8_and_reads_back_as_quantised_and_dequantised(changes, power_of_2, tmp_path):
    model = convert(random_model(**changes), power_of_2)
    model.save_pretrained(tmp_path / "fp8", fp8=True, max_shard_bytes=40_000)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    stored = {}
    for path in (tmp_path / "fp8").glob("*.safetensors"):
        stored |= load_file(path)
    want = dict(hub.hub_tensors(model))
    quantised = {name for name in want if what_deepseek_quantises(name)}
    assert stored.keys() == want.keys() | {name + "_scale_inv" for name in quantised} and len(quantised) > 9
    for name, tensor in want.items():
        if name in quantised:
            codes, scale = reference.quantize_blocks(tensor, power_of_2)
            assert torch.equal(stored[name].float(), codes.float())
            assert torch.equal(stored[name + "_scale_inv"], scale)
            want[name] = (
                reference.dequantize_blocks(codes, scale).bfloat16().float()
            )  # like the embedding, which is fp32
        else:
            assert torch.equal(stored[name], tensor)
    opened = Transformer.from_pretrained(tmp_path / "fp8")
    assert logits(opened).isfinite().all()
    back = dict(hub.hub_tensors(opened))
    assert back.keys() == want.keys() and all(torch.equal(back[name], want[name]) for name in want)


@pytest.mark.parametrize("changes", FP8_MODELS)
def test_a_model_is_kept_in_fp8_one_byte_a_weight(changes, tmp_path):
    model = random_model(**changes).bfloat16()
    model.save_pretrained(tmp_path / "bf16")
    model.save_pretrained(tmp_path / "fp8", fp8=True)
    kept = Transformer.from_pretrained(tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    large, small_ones = [], []
    for name, tensor in kept.state_dict().items():
        (large if "_proj" in name and "bias" not in name and "layernorm" not in name else small_ones).append(tensor)
    weights = [tensor for tensor in large if tensor.dtype == torch.float8_e4m3fn]
    assert {t.dtype for t in large} == {torch.float8_e4m3fn, torch.float32} and weights
    assert sum(t.numel() for t in weights) == sum(t.untyped_storage().nbytes() for t in weights)
    quantised = [t for name, t in hub.hub_tensors(model) if what_deepseek_quantises(name)]
    assert sum(t.numel() for t in weights) == sum(t.numel() for t in quantised)
    assert {t.dtype for t in small_ones} <= {torch.bfloat16, torch.float32}  # the router's bias
    assert not any(p.requires_grad for p in kept.parameters() if p.dtype == torch.float8_e4m3fn)
    # the same numbers as a model of the dequantised weights whose activations are quantised alike
    oracle = convert(Transformer.from_pretrained(tmp_path / "fp8"), power_of_2=True)
    for module in oracle.modules():
        if isinstance(module, Fp8Linear):
            again = reference.dequantize_blocks(*reference.quantize_blocks(module.weight.detach(), True))
            assert torch.equal(again, module.weight.float()), "what was quantised is not quantised again"
    assert torch.equal(logits(kept), logits(oracle))
    plain = Transformer.from_pretrained(tmp_path / "fp8")
    assert 0.005 < relative_error(logits(kept), logits(plain)) < 0.5, "activations are quantised too"
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "bf16", dtype=torch.float8_e4m3fn)), logits(kept))
    kept.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("fp8", "again")]
    assert all(torch.equal(t.float(), files[1][name].float()) for name, t in files[0].items())
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "fp8" / "config.json").read_text()


def test_a_model_kept_in_fp8_with_scales_of_any_size_generates(tmp_path):
    """As DeepSeek-V3's own: scales that are no powers of 2; through the cache, in MLA's absorbed form."""
    model = random_model(hidden_size=200, moe_intermediate_size=136)
    convert(model, power_of_2=False).save_pretrained(tmp_path, fp8=True)
    kept, plain = (Transformer.from_pretrained(tmp_path, dtype=d) for d in (torch.float8_e4m3fn, torch.float32))
    assert torch.equal(
        kept.layers[0].self_attn.kv_b_proj.dequantized().bfloat16().float(), plain.layers[0].self_attn.kv_b_proj.weight
    )
    cache, ids = kept.new_cache(1, 30), torch.arange(30).view(1, 30)
    with torch.no_grad():
        whole = kept(ids)
        parts = torch.cat([kept(ids[:, :8], cache)] + [kept(ids[:, t : t + 1], cache) for t in range(8, 30)], 1)
        assert typical_error(parts, whole) < typical_error(plain(ids), whole) < 0.3
        assert torch.equal(copy.deepcopy(kept)(ids), whole)
        other = Transformer.from_pretrained(tmp_path, dtype=torch.float8_e4m3fn)
        other.load_state_dict(kept.state_dict())
        assert torch.equal(other(ids), whole)
    with pytest.raises(ValueError, match="a model kept in FP8 is not cast"):
        kept.bfloat16()(ids)


def test_mtp_layers_that_config_json_does_not_have_are_left_out_with_a_note(tmp_path, caplog):
    model = random_model()
    model.save_pretrained(tmp_path)
    extra = {f"model.layers.2.{name}": torch.zeros(3) for name in ("eh_proj.weight", "enorm.weight", "mlp.x.weight")}
    edit(tmp_path / "model.safetensors", lambda t: t.update(extra))
    with caplog.at_level(logging.WARNING, "minids"):
        back = Transformer.from_pretrained(tmp_path)
    assert "config.json has 0 MTP modules, the weights have 1: opened with 0" in caplog.text
    assert torch.equal(logits(back), logits(model)) and not back.mtp


# Files that are wrong -----------------------------------------------------------------------------------------------


def change(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


WRONG = [
    (lambda t: t.pop("model.norm.weight"), "missing weights: norm.weight; is config.json this model's"),
    (lambda t: t.pop("lm_head.weight"), "missing weights: lm_head.weight"),
    (lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"), "gate_up_proj of 1 expert matrices"),
    (change("model.extra.weight", torch.zeros(2)), "surplus weights: extra.weight"),
    (change("model.layers.2.mlp.up_proj.weight", torch.zeros(2)), "surplus weights: layers.2.mlp.up_proj.weight"),
    (change("model.layers.1.mlp.experts.6.up_proj.weight", torch.zeros(20, 48)), "n_routed_experts 6"),
    (change("model.norm.weight", torch.zeros(47)), r"norm.weight is \[47\]; the configuration makes it \[48\]"),
    (change("model.layers.1.mlp.experts.0.up_proj.weight", torch.zeros(9, 48)), r"is \[9, 48\];.* it \[20, 48\]"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_weights_that_do_not_fit_are_named(wrong, words, tmp_path):
    random_model().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", wrong)
    with pytest.raises(CheckpointFormatError, match=words):
        Transformer.from_pretrained(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    random_model().save_pretrained(tmp_path, max_shard_bytes=40_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for length in (0, 5, 300, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(CheckpointFormatError, match=f"{shard.name} is not a whole safetensors file"):
            Transformer.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}; minids reads safetensors only"):
        Transformer.from_pretrained(tmp_path)
    for text in ('{"weight_map": {"a"', '{"weight_map": {"a": 3}}', '{"weight_map": []}', "[]"):
        (tmp_path / hub.INDEX).write_text(text)
        with pytest.raises(CheckpointFormatError, match="is not a whole index of shards"):
            Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("chunk", [1, 10_000])
def test_files_are_opened_anew_after_each_chunk(chunk, tmp_path, monkeypatch):
    model, opened = random_model(), []
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)
    count = len(list(tmp_path.glob("*.safetensors")))
    original = files.open_safetensors
    monkeypatch.setattr(files, "CHUNK", chunk)
    monkeypatch.setattr(files, "open_safetensors", lambda path: opened.append(path) or original(path))
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path)), logits(model))
    assert len(opened) > 2 * count and (chunk > 1 or len(opened) >= count + len(list(hub.hub_tensors(model))))


QUANTISED = [
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "by 'compressed-tensors' in blocks of None"),
    ({"quant_method": "fp8", "weight_block_size": None}, "by 'fp8' in blocks of None; minids reads fp32"),
    ({"quant_method": "fp8", "weight_block_size": [1, 128]}, r"in blocks of \[1, 128\]"),
]


@pytest.mark.parametrize(("config", "words"), QUANTISED)
def test_other_quantisations_are_refused(config, words, tmp_path):
    random_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "quantization_config": config}))
    with pytest.raises(CheckpointFormatError, match=words):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps({**whole, "quantization_config": None}))
    Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_weights_of_other_dtypes_are_refused(dtype, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    random_model().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointFormatError, match=f"{name} is {dtype}; minids reads fp32, fp16, bf16"):
        Transformer.from_pretrained(tmp_path)
    for wrong in ("bfloat16", torch.int8):
        with pytest.raises(ValueError, match=r"give one of torch, such as torch\.bfloat16"):
            Transformer.from_pretrained(tmp_path, dtype=wrong)


def test_scales_in_one_byte_are_read(tmp_path):
    """float8_e8m0fnu, ue8m0 in other words: powers of 2 alone."""
    random_model().save_pretrained(tmp_path, fp8=True)
    want = logits(Transformer.from_pretrained(tmp_path))
    scales = lambda t: {k: v.to(torch.float8_e8m0fnu) for k, v in t.items() if k.endswith("_scale_inv")}  # noqa: E731
    edit(tmp_path / "model.safetensors", lambda t: t.update(scales(t)))
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path)), want)


def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "any").touch()
    random_model().save_pretrained(tmp_path / "model")
    modes = {path.stat().st_mode for path in [tmp_path / "any", *(tmp_path / "model").iterdir()]}
    assert len(modes) == 1


def test_other_architectures_and_missing_folders(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type is 'llama'; minids opens deepseek_v2, deepseek_v3"):
        Transformer.from_pretrained(tmp_path)
    for name in (tmp_path / "nowhere", "nowhere", tmp_path / "config.json"):
        with pytest.raises(FileNotFoundError, match=r"is neither a folder with a config\.json nor a hub id"):
            Transformer.from_pretrained(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"there is no .*empty.config\.json"):
        Transformer.from_pretrained(tmp_path / "empty")


def test_a_failed_save_leaves_the_old_one_whole(tmp_path, monkeypatch):
    old = random_model()
    old.save_pretrained(tmp_path, max_shard_bytes=40_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata, count=[0]):  # noqa: B006
        count[0] += 1
        path.write_bytes(b"half")
        if count[0] == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random_model().save_pretrained(tmp_path, max_shard_bytes=40_000)
    full_disk.__defaults__[0][0] = 0
    with pytest.raises(OSError, match="No space left"):
        random_model().save_pretrained(tmp_path / "new", max_shard_bytes=40_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_weight_has_its_hub_name_once(tmp_path):
    random_model(q_lora_rank=8).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert metadata == {"format": "pt"}
    attention = {f"{n}_proj" for n in ("q_a", "q_b", "kv_b", "o")} | {"q_a_layernorm", "kv_a_layernorm"}
    want = {f"self_attn.{n}.weight" for n in attention | {"kv_a_proj_with_mqa"}}
    want |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    feed = {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    experts = {n.replace("mlp", f"mlp.experts.{j}") for n in feed for j in range(6)}
    experts |= {n.replace("mlp", "mlp.shared_experts") for n in feed} | {"mlp.gate.weight"}
    experts |= {"mlp.gate.e_score_correction_bias"}
    layers = {f"model.layers.{i}.{n}" for i, more in enumerate((feed, experts)) for n in want | more}
    assert names == layers | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
