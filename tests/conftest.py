"""For all tests: Triton's interpreter where there is no GPU, one thread, their own random numbers and progress."""

import pytest
import torch

from minids import triton_env  # noqa: F401 (before any test imports triton, as transformers does)
from minids.numerics import seed_everything

torch.set_num_threads(1)  # the tensors of tests are small, and tests run beside one another


@pytest.fixture(autouse=True)
def seed():
    """A test's random numbers do not depend on the tests before it."""
    seed_everything(5)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of a test's own progress: none touches the learner's."""
    monkeypatch.setenv("MINIDS_HOME", str(tmp_path / ".minids"))
    return tmp_path / ".minids"


@pytest.fixture
def said(capsys):
    """A function that gives the lines printed since it was called last."""
    return lambda: capsys.readouterr().out.splitlines()


@pytest.fixture
def poison(monkeypatch):
    """What a kernel must write itself is NaN before, and an index there is far from every tensor."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            index = 10**9 if tensor.itemsize >= 4 else 1
            return tensor.fill_(float("nan") if tensor.is_floating_point() else index)

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def timed(monkeypatch):
    """A device whose clock is the wall's, and whose peaks are made up: what a GPU's run does besides its kernels."""
    from minids.bench import gpu, harness

    def make(self, quick):
        self.cuda, self.where, self.name = False, torch.device("cpu"), "NVIDIA H200"
        self.clock, self.copy, self.matmul, self.published = harness.wall_clock, 1e12, 1e15, "H200"

    monkeypatch.setattr(gpu.Device, "__init__", make)
    monkeypatch.setattr(gpu.Device, "settings", lambda self: {})
