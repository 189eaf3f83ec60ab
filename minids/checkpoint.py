"""Checkpoints that survive a kill, a full disk and a flipped byte.

DIR/checkpoints/step-000100/ holds tensors.safetensors, and state.json with the step, what else the caller keeps (meta)
and the SHA-256 of both. A checkpoint is written under a temporary name, synced, and then renamed: at every moment the
disk has the whole of it or nothing of it. What does not match its checksum is refused by name.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minids.files import disk_is_full, sync, write_json

TENSORS, STATE, TEMPORARY = "tensors.safetensors", "state.json", "tmp-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names it and says what to do."""


def save(folder, step, tensors, meta, keep=2):
    """Write `tensors` ({name: tensor}) and `meta` (JSON) as the checkpoint of `step`; the last `keep` stay.

    Raises CheckpointError where the disk is full or cannot be written; what was there before stays whole.
    """
    home = Path(folder) / "checkpoints"
    temporary = home / f"{TEMPORARY}{name_of(step)}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        sweep(home)
        temporary.mkdir()
        write(temporary, step, tensors, meta)
        discard(home / name_of(step), successor=temporary)
        sync(home)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(explain(error, home, step, tensors)) from None
    for path in candidates(home)[keep:]:
        discard(path)


def write(path, step, tensors, meta):
    """The two files of a checkpoint into the folder `path`, synced."""
    save_file(separate(tensors), path / TENSORS)
    sync(path / TENSORS)
    state = {"step": step, "meta": meta, "tensors": digest(path / TENSORS)}
    write_json(path / STATE, {**state, "state": digest_of_json(state)})
    sync(path)


def load_latest(folder):
    """(step, tensors, meta) of the newest whole checkpoint of a run; None where there is none at all.

    Damaged ones are named on stderr. Raises CheckpointError where every one is damaged.
    """
    home = Path(folder) / "checkpoints"
    paths = candidates(home)
    for path in paths:
        try:
            return read(path)
        except CheckpointError as error:
            print(f"{error}; the one before it is tried", file=sys.stderr)
    if paths:
        raise CheckpointError(f"no checkpoint in {home} is whole; delete that folder to begin again at step 0")
    return None


def read(path):
    """(step, tensors, meta) of the checkpoint at `path`; raises CheckpointError where it is damaged."""
    try:
        state = json.loads((path / STATE).read_bytes())
        if state.pop("state") != digest_of_json(state):
            raise ValueError(f"{STATE} is not what was written")
        if state["tensors"] != digest(path / TENSORS):
            raise ValueError(f"{TENSORS} is not what was written")
        return state["step"], load_file(path / TENSORS), state["meta"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from None


# Optimizers ------------------------------------------------------------------------------------------------------


def pack_optimizers(optimizers):
    """The state of `optimizers` as {"optimizer.I.J.KEY": tensor}, J counting the parameters of number I."""
    return {
        f"optimizer.{i}.{j}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for j, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def unpack_optimizers(optimizers, tensors):
    """Set the state of `optimizers` to what `pack_optimizers` gave, bit for bit.

    Raises CheckpointError where `tensors` are of other optimizers (a name or a shape that does not fit).
    """
    places = {(i, j): p for i, optimizer in enumerate(optimizers) for j, p in enumerate(parameters(optimizer))}
    states = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        match = re.fullmatch(r"optimizer\.(\d+)\.(\d+)\.(\w+)", name)
        place = (int(match[1]), int(match[2])) if match else None
        if place not in places:
            raise CheckpointError(f"the checkpoint has {name}, which no optimizer of this run knows")
        shape = places[place].shape
        if tensor.dim() and tensor.shape != shape:
            raise CheckpointError(f"{name} is {list(tensor.shape)} in the checkpoint; its parameter is {list(shape)}")
        states[place[0]].setdefault(place[1], {})[match[3]] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def parameters(optimizer):
    """All parameters of `optimizer`, in the order in which its state is packed."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# Files -----------------------------------------------------------------------------------------------------------


def name_of(step):
    """The folder's name of the checkpoint of `step`."""
    return f"step-{step:06d}"


def candidates(home):
    """The checkpoints in `home`, newest first."""
    found = [path for path in home.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def discard(path, successor=None):
    """Delete a checkpoint, under a temporary name first, so that a kill leaves no half of it.

    Where there is a finished `successor` it has taken the name before anything is deleted.
    """
    doomed = path.with_name(f"{TEMPORARY}discarded-{path.name}")
    if path.exists():
        os.replace(path, doomed)
    if successor:
        os.replace(successor, path)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(home):
    """Delete what a killed run left under temporary names."""
    for path in home.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def separate(tensors):
    """The tensors contiguous, and none of them sharing memory: safetensors writes each once."""
    seen, result = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def digest(path):
    """The SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def digest_of_json(value):
    """The SHA-256 of what is to be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def explain(error, home, step, tensors):
    """One sentence on a checkpoint that could not be written."""
    what = f"checkpoint {name_of(step)} cannot be written in {home}"
    if disk_is_full(error):
        need = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
        free = shutil.disk_usage(home).free / 2**20
        return f"{what}: the disk is full ({need:.1f} MiB needed, {free:.1f} free); make room, then resume"
    return f"{what}: {error}"
