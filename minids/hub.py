"""The hub's checkpoints, in and out: config.json and safetensors, one file or sharded with an index.

Inside minids a layer's experts are two tensors, on the hub three per expert:

    mlp.experts.gate_up_proj [E,2F,D]   <->   mlp.experts.j.gate_proj.weight [F,D], mlp.experts.j.up_proj.weight [F,D]
    mlp.experts.down_proj    [E,D,F]    <->   mlp.experts.j.down_proj.weight [D,F]

FP8 weights carry `weight_scale_inv` [ceil(out/128), ceil(in/128)], the MULTIPLIER of each 128x128 block. They are
dequantised as they are read, or stay as they are (dtype=torch.float8_e4m3fn) and are multiplied in FP8 by minids.fp8:

    mlp.experts.gate_up_proj_scale_inv [E,2ceil(F/128),ceil(D/128)]   <->   those of the gate_proj and of the up_proj

mtp.k is layer num_hidden_layers + k on the hub, with copies of embed_tokens and lm_head (as shared_head.head). They are
written, and left out as they are read, one that differs with a warning. A model has as many MTP modules as config.json
and the weights both have; what only one of them has (transformers saves no such weights) is left out, with a warning.
transformers opens what is saved here, and lists these weights as unexpected (those of a layer 61 it expects).
Tensors are read one at a time and files in chunks, so the peak is the model and a few hundred MB.
"""

import logging
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minids.config import ModelConfig
from minids.files import INDEX, CheckpointFormatError, Shards, json_writer, replace_files, weight_files
from minids.fp8 import Fp8Linear, convert
from minids.fp8.emulate import dequantize_blocks, quantize_blocks
from minids.fp8.reference import E4M3, TILE
from minids.model import Transformer
from minids.moe import Experts

log = logging.getLogger("minids")
SCALE, EMBEDDING = "_scale_inv", "model.embed_tokens.weight"
READ = (torch.float32, torch.float16, torch.bfloat16, torch.float64, E4M3)
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
PROJECTION = re.compile(r".*(?<!\beh)_proj(_with_mqa)?\.weight")  # what DeepSeek keeps in FP8


def load(path_or_hub_id, dtype=None, device="cpu"):
    """A Transformer with the weights of a folder or hub id, in `dtype` (None: as stored, FP8 like the embedding).

    torch.float8_e4m3fn keeps FP8 as it is stored, quantises what else can be FP8, and leaves the rest as stored: a byte
    for each weight of attention and feed-forward, to run and not to train. Raises FileNotFoundError where there is no
    such folder, ConfigError for another architecture and CheckpointFormatError for weights that are missing, surplus,
    damaged, of another shape or of a format that minids does not read.
    """
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"dtype is {dtype!r}; give one of torch, such as torch.bfloat16, or None for the stored one")
    folder = locate(path_or_hub_id)
    cfg = ModelConfig.from_hf(folder)
    check_quantization(cfg.hub.get("quantization_config") or FP8_CONFIG)
    shards = Shards(weight_files(folder))
    cfg.num_nextn_predict_layers = count_mtp(cfg, shards)
    with torch.device("meta"):
        model = Transformer(cfg)
        if dtype == E4M3:
            freeze(model)
            dtype = None
    parts = {key: (name, index) for key, name, index in hub_parts(model)}
    shapes, tensors, surplus = model.state_dict(), {}, []
    for key, tensor in read_tensors(shards, parts, mtp_copies(cfg)):
        if key not in parts:
            surplus += unknown(key, tensor, cfg, shapes, tensors)
            continue
        name, index = parts.pop(key)
        if name not in tensors:
            own = name.endswith(("e_score_correction_bias", SCALE)) or shapes[name].dtype == E4M3
            stored = EMBEDDING if f"model.{key}{SCALE}" in shards and EMBEDDING in shards else None
            kind = shapes[name].dtype if own else dtype or (shards.tensor(stored) if stored else tensor).dtype
            tensors[name] = torch.empty(shapes[name].shape, dtype=kind, device=device)
        view = tensors[name][index]
        if view.shape != tensor.shape:
            raise CheckpointFormatError(f"{key} is {list(tensor.shape)}; the configuration makes it {list(view.shape)}")
        view.copy_(tensor)
    check_complete(parts, tensors, surplus)
    assign(model, tensors, cfg)
    return model.eval()


def locate(path_or_hub_id):
    """The local folder of a checkpoint, fetched with huggingface_hub when it is a hub id."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise FileNotFoundError(f"{path_or_hub_id} is neither a folder with a config.json nor a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # a network, an authorisation, a name: the library's own sentence says which
        said = " ".join(str(error).split())
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}, and the hub did not give it: {said}") from error


def check_quantization(given):
    """Raise CheckpointFormatError where a quantization_config is not DeepSeek's, FP8 in 128x128 blocks."""
    method, block = given.get("quant_method"), given.get("weight_block_size")
    if method != "fp8" or block != FP8_CONFIG["weight_block_size"]:
        known = "minids reads fp32, fp16, bf16, and fp8 in blocks of [128, 128]"
        raise CheckpointFormatError(f"weights are quantised by {method!r} in blocks of {block}; {known}")


def count_mtp(cfg, shards):
    """How many MTP modules both `cfg` and the weights have; takes others' weights out of `shards`, and says so."""
    first, promised = cfg.num_hidden_layers, cfg.num_nextn_predict_layers
    there = {layer_index(key) for key in shards if key.endswith(".eh_proj.weight")}  # only MTP modules have one
    found = sum(first + k in there for k in range(promised))
    surplus = [key for key in shards if layer_index(key) >= first + found and layer_index(key) in there]
    for key in surplus:
        del shards[key]
    if surplus or found < promised:
        log.warning("config.json has %d MTP modules, the weights have %d: opened with %d", promised, len(there), found)
    return found


def mtp_copies(cfg):
    """{hub name without `model.`: name here} of the embedding and the head that the hub repeats in MTP modules."""
    head = "embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"
    stems = [f"layers.{cfg.num_hidden_layers + k}" for k in range(cfg.num_nextn_predict_layers)]
    embeddings = {f"{stem}.embed_tokens.weight": "embed_tokens.weight" for stem in stems}
    return embeddings | {f"{stem}.shared_head.head.weight": head for stem in stems}


def read_tensors(shards, parts, copies):
    """Pairs (name without `model.`, tensor) of all that is in `shards`, the `copies` last.

    A weight whose scales are among `parts` comes in FP8, then its scales; all else comes dequantised.
    """
    for key in sorted(shards, key=lambda key: key.removeprefix("model.") in copies):
        if key.endswith(SCALE):
            continue
        tensor, name = shards.tensor(key), key.removeprefix("model.")
        if name in parts and tensor.dtype not in READ:
            raise CheckpointFormatError(f"{key} is {tensor.dtype}; minids reads fp32, fp16, bf16, and fp8 by blocks")
        scale = read_scale(shards, key, tensor) if tensor.dtype == E4M3 else None
        if name + SCALE in parts:
            tensor, scale = quantize_blocks(tensor, True) if scale is None else (tensor, scale)
            yield name + SCALE, scale
        elif scale is not None:
            tensor = dequantize_blocks(tensor, scale)
        yield name, tensor


def layer_index(key):
    """The layer that a hub name is of; -1 for none."""
    found = re.match(r"model\.layers\.(\d+)\.", key)
    return int(found[1]) if found else -1


def read_scale(shards, key, weight):
    """The scales of an FP8 `weight` [out,in], fp32 [ceil(out/128), ceil(in/128)] (V3 3.3)."""
    if key + SCALE not in shards:
        raise CheckpointFormatError(f"{key} is FP8, but its scales {key + SCALE} are missing")
    scale, expected = shards.tensor(key + SCALE).float(), [-(-size // TILE) for size in weight.shape]
    if list(scale.shape) != expected:
        raise CheckpointFormatError(f"{key}: scales are {list(scale.shape)}, {expected} expected")
    return scale


def freeze(model):
    """Convert `model`, on the meta device, to weights of E4M3 beside their scales."""
    for module in convert(model).modules():
        experts = ["gate_up_proj", "down_proj"] * isinstance(module, Experts)
        for name in experts or ["weight"] * isinstance(module, Fp8Linear):
            (*E, N, K), parts = getattr(module, name).shape, 2 if name == "gate_up_proj" else 1
            scales = torch.empty(*E, parts * -(-N // parts // TILE), -(-K // TILE), dtype=torch.float32)
            setattr(module, name, nn.Parameter(torch.empty(*E, N, K, dtype=E4M3), requires_grad=False))
            setattr(module, name + SCALE, nn.Parameter(scales, requires_grad=False))


def unknown(key, tensor, cfg, shapes, tensors):
    """[key], or [] where a weight that this model does not have can be ignored; raises for an expert too many."""
    if key in mtp_copies(cfg):
        used = tensors.get(mtp_copies(cfg)[key])
        if used is not None and not torch.equal(tensor.to(used), used):
            log.warning("%s differs from %s, which is used in its place", key, mtp_copies(cfg)[key])
        return []
    if key == "lm_head.weight" or key.endswith("rotary_emb.inv_freq"):
        return []  # a tied head that was written all the same, and old checkpoints' tables
    expert = EXPERT.fullmatch(key)
    if expert and f"{expert[1]}.down_proj" in shapes:
        raise CheckpointFormatError(f"{key}: the configuration has n_routed_experts {cfg.n_routed_experts}")
    return [key]


def check_complete(parts, tensors, surplus):
    """Raise CheckpointFormatError where `parts` have not come (some of a tensor's, or all), or `surplus` has."""
    lost = Counter(name if ".experts." in name else key for key, (name, _) in parts.items())
    missing = [f"{name} of {n} expert matrices" if name in tensors else name for name, n in lost.items()]
    for what, names in (("missing", missing), ("surplus", surplus)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointFormatError(f"{what} weights: {', '.join(names[:4])}{more}; is config.json this model's?")


def assign(model, tensors, cfg):
    """Give a model on the meta device its `tensors`; makes what no checkpoint holds."""
    model.load_state_dict(tensors, strict=False, assign=True)
    if cfg.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # what no checkpoint holds
            module, _, name = name.rpartition(".")
            zeros = torch.zeros_like(buffer, device=model.embed_tokens.weight.device)
            model.get_submodule(module).register_buffer(name, zeros, persistent=False)


def hub_parts(model):
    """(hub name without `model.`, name here, index of the part) of all weights, the experts one by one."""
    for name, tensor in model.state_dict().items():
        key = re.sub(r"^mtp\.(\d+)", lambda k: f"layers.{model.cfg.num_hidden_layers + int(k[1])}", name)
        if ".mlp.experts." in name:
            stem, _, last = key.rpartition(".")
            half, end = tensor.shape[1] // 2, SCALE if last.endswith(SCALE) else ""
            rows = {"gate": slice(half), "up": slice(half, None)} if "gate_up" in last else {"down": slice(None)}
            places = ((j, k) for j in range(len(tensor)) for k in rows)
            yield from ((f"{stem}.{j}.{k}_proj.weight{end}", name, (j, rows[k])) for j, k in places)
        elif name != "lm_head.weight" or not model.cfg.tie_word_embeddings:
            yield key, name, ...


def hub_tensors(model):
    """Pairs (hub name, tensor) of all weights, the experts one by one, the copies that MTP modules have last."""
    tensors = model.state_dict()
    for key, name, index in [*hub_parts(model), *((*pair, ...) for pair in mtp_copies(model.cfg).items())]:
        yield key if key == "lm_head.weight" else f"model.{key}", tensors[name][index]


def quantized(tensors, power_of_2):
    """Pairs (hub name, tensor) with the weights of attention and feed-forward in FP8, their scales beside them."""
    for key, tensor in tensors:
        if PROJECTION.fullmatch(key) and tensor.dtype != E4M3:
            tensor, scale = quantize_blocks(tensor, power_of_2)
            yield key + SCALE, scale
        yield key, tensor


def save(model, path, max_shard_bytes=5 * 10**9, fp8=False):
    """Write `model` into the folder `path` as the hub has it; what was there stays whole until all is written.

    With `fp8` weights of attention and feed-forward are written in FP8, as those of a model kept in FP8 are anyway.
    """
    folder, shards, size, tensors = Path(path), [{}], 0, hub_tensors(model)
    power_of_2 = all(module.power_of_2 for module in model.modules() if isinstance(module, Fp8Linear))
    for name, tensor in quantized(tensors, power_of_2) if fp8 else tensors:
        amount = tensor.numel() * tensor.element_size()
        if shards[-1] and size + amount > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor.detach()
        size += amount
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    files = {name: lambda path, shard=shard: save_shard(shard, path) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        files[INDEX] = json_writer({"metadata": {"total_size": total}, "weight_map": weight_map})
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {**model.cfg.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    if any(t.dtype == E4M3 for shard in shards for t in shard.values()):
        config.setdefault("quantization_config", FP8_CONFIG)
    else:
        config.pop("quantization_config", None)  # FP8 was dequantised as it was read
    files["config.json"] = json_writer(config)
    replace_files(folder, files)
    for old in [folder / INDEX, *folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in files:
            old.unlink(missing_ok=True)  # of an earlier save


def save_shard(shard, path):
    """Write the tensors of one safetensors file."""
    tensors, seen = {}, set()
    for name, tensor in shard.items():
        tensor = tensor.cpu().contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # a copy that MTP has
        seen.add(tensor.data_ptr())
    save_file(tensors, path, {"format": "pt"})
