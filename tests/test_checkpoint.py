"""Checkpoints: exact, atomic under kill -9, and refused by name where they are damaged."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from minids import checkpoint, optim
from minids.checkpoint import CheckpointError

WRITER = """
import sys, torch
from minids import checkpoint
for step in range(1, 10**6):
    checkpoint.save(sys.argv[1], step, {"a": torch.full((200, 1000), float(step))}, {"step": step})
    print(step, flush=True)
"""
FULL_DISK = """
import resource, sys, torch
from minids import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
try:
    checkpoint.save(sys.argv[1], 2, {"a": torch.zeros(100000)}, {})
except checkpoint.CheckpointError as error:
    print(error)
"""


def tensors(seed=0):
    random_ = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(40, 30, generator=random_), "b.c": torch.tensor(7.0), "d": torch.arange(5).to(torch.uint8)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_round_trip_is_exact_and_two_are_kept(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, tensors(step), {"rate": 0.1 + 0.2, "name": "é"})
    step, loaded, meta = checkpoint.load_latest(tmp_path)
    assert step == 30 and same(loaded, tensors(30)) and meta == {"rate": 0.1 + 0.2, "name": "é"}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000030"]


def test_tensors_that_share_memory_or_are_strided(tmp_path):
    a = torch.randn(6, 4)
    checkpoint.save(tmp_path, 1, {"a": a, "tied": a, "row": a[1], "turned": a.T}, {})
    assert same(checkpoint.load_latest(tmp_path)[1], {"a": a, "tied": a, "row": a[1], "turned": a.T})


def test_a_step_can_be_saved_again(tmp_path):
    checkpoint.save(tmp_path, 5, tensors(1), {})
    checkpoint.save(tmp_path, 5, tensors(2), {})
    assert same(checkpoint.load_latest(tmp_path)[1], tensors(2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["short", "empty", "missing", "flipped"])
def test_damage_is_refused_by_name_and_the_one_before_is_used(tmp_path, capsys, name, damage):
    checkpoint.save(tmp_path, 1, tensors(1), {"n": 1})
    checkpoint.save(tmp_path, 2, tensors(2), {"n": 2})
    path = tmp_path / "checkpoints" / "step-000002" / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        for place in random.Random(0).sample(range(len(content)), 12):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert checkpoint.load_latest(tmp_path)[0] == 1
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "short" else 0])
    step, loaded, meta = checkpoint.load_latest(tmp_path)
    assert step == 1 and same(loaded, tensors(1)) and meta == {"n": 1}
    assert "step-000002 is damaged" in capsys.readouterr().err


def test_when_every_checkpoint_is_damaged_it_says_so(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(), {})
    (tmp_path / "checkpoints" / "step-000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    waits = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "1\n"
        time.sleep(waits.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        printed = [1, *map(int, process.communicate()[0].split())]
        step, loaded, meta = checkpoint.load_latest(tmp_path)
        assert step >= printed[-1] and meta == {"step": step} and (loaded["a"] == step).all()
        for path in checkpoint.candidates(tmp_path / "checkpoints"):
            checkpoint.read(path)
            checkpoint.discard(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size as a full disk would")
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(), {})
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert "step-000002 cannot be written" in done.stdout and "disk is full" in done.stdout, done
    assert "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.load_latest(tmp_path)[0] == 1


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step-000001 cannot be written in .*file"):
        checkpoint.save(tmp_path / "file", 1, tensors(), {})


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(11, 6)
        self.layer = torch.nn.Linear(6, 10)


def trained(model, optimizers, steps, seed):
    random_ = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        out = model.layer(model.embed_tokens(torch.randint(11, (3, 4), generator=random_)))
        out.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_optimizers_go_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model, other = Small(), Small()
    optimizers, others = (optim.build_optimizers(m, 0.01, 0.01, 0.1) for m in (model, other))
    trained(model, optimizers, 3, 0)
    packed = checkpoint.pack_optimizers(optimizers)
    assert sum(name.endswith(".step") for name in packed) == 2
    checkpoint.save(tmp_path, 3, packed, {})
    trained(other, others, 1, 5)  # a state that must go
    other.load_state_dict(model.state_dict())
    checkpoint.unpack_optimizers(others, checkpoint.load_latest(tmp_path)[1])
    assert same(checkpoint.pack_optimizers(others), packed)
    for m, o in ((model, optimizers), (other, others)):
        trained(m, o, 3, 1)
    assert same(model.state_dict(), other.state_dict())
    assert same(checkpoint.pack_optimizers(optimizers), checkpoint.pack_optimizers(others))


def test_state_of_other_optimizers_is_refused():
    optimizers = optim.build_optimizers(Small(), 0.01, 0.01, 0.1)
    with pytest.raises(CheckpointError, match=r"optimizer\.0\.9\.momentum_buffer, which no optimizer"):
        checkpoint.unpack_optimizers(optimizers, {"optimizer.0.9.momentum_buffer": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"is \[2\] in the checkpoint; its parameter is \[10, 6\]"):
        checkpoint.unpack_optimizers(optimizers, {"optimizer.0.0.momentum_buffer": torch.zeros(2)})
