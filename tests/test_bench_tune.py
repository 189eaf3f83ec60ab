"""--tune: every kernel in other configurations, each checked before it is timed; the shipped ones stay as they are."""

import functools
import importlib
import json
import sys
import types

import pytest
import torch

from minids import bench, triton_env
from minids.bench import __main__ as command
from minids.bench import gpu, harness, tune

pytestmark = pytest.mark.skipif(not triton_env.installed(), reason="triton is not installed")


@pytest.mark.parametrize(("suite", "kernels"), [("mla", 1), ("moe", 5), ("fp8", 3), ("layers", 3)])
def test_quick_tries_every_kernel(suite, kernels, tmp_path, capsys):
    command.main([suite, "--tune", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())[f"tune-{suite}"]
    assert outcome["complete"] and len(outcome["cases"]) == kernels
    assert outcome["provenance"]["command"] == f"python -m minids.bench {suite} --tune --quick"
    for case in outcome["cases"]:
        assert not case["skipped"] and case["forms"][0]["form"] == "as shipped" and len(case["best"]) >= 2


@pytest.fixture
def module(monkeypatch):
    """A module with a number, a table and a function, as the files of kernels have them."""
    made = types.ModuleType("made_up")
    made.FACTOR, made.table, made.parts = 1.0, lambda rows: {"BLOCK_M": rows, "num_warps": 4}, lambda *_: 1
    made.remembered = functools.lru_cache(lambda: made.table(8))
    monkeypatch.setitem(sys.modules, "made_up", made)
    return made


def test_settings_are_changed_within_and_restored(module):
    shipped = dict(vars(module))
    assert module.remembered() == {"BLOCK_M": 8, "num_warps": 4}
    with tune.changed(module, {"FACTOR": 2.0, "table": {"num_warps": 8}, "parts": 5}):
        assert module.FACTOR == 2.0 and module.parts(1, 2) == 5
        assert module.remembered() == module.table(8) == {"BLOCK_M": 8, "num_warps": 8}
    assert vars(module) == shipped and module.remembered() == {"BLOCK_M": 8, "num_warps": 4}
    with pytest.raises(RuntimeError), tune.changed(module, {"FACTOR": 3.0}):
        raise RuntimeError
    assert module.FACTOR == 1.0


def test_a_change_in_words():
    assert tune.label({"blocks": {"BLOCK_N": 32, "num_stages": 4}, "splits": 2}) == "BLOCK_N 32, num_stages 4, splits 2"
    assert tune.tile(m=64, stages=3, SWAP=False) == {"BLOCK_M": 64, "num_stages": 3, "SWAP": False}


def test_what_is_wrong_or_fails_or_writes_nothing_is_skipped_by_name(module):
    def run():
        if module.FACTOR == 3:
            raise RuntimeError("out of resource: shared memory")
        return [torch.empty(3) if module.FACTOR == 4 else torch.ones(3) * (2 if module.FACTOR == 2 else 1)]

    changes = [{"FACTOR": factor} for factor in (2, 3, 4, 5)]
    one = tune.Trial("a kernel", "made_up", lambda where: run, changes, {"bytes": 1, "flops": 1})
    device = gpu.Device(quick=True)
    device.clock = None
    case = tune.case(device, one, 1)
    assert set(case["best"]) == {"minids", "FACTOR 5"}
    assert "differs from the shipped configuration's by 1.0e+00" in case["skipped"]["FACTOR 2"]
    assert "out of resource" in case["skipped"]["FACTOR 3"] and "by nan" in case["skipped"]["FACTOR 4"]
    assert module.FACTOR == 1.0 and not torch.are_deterministic_algorithms_enabled()


def test_the_fastest_is_named(module):
    changes = [{"FACTOR": 2}, {"FACTOR": 3}]
    one = tune.Trial("a kernel", "made_up", lambda where: lambda: [torch.ones(3)], changes, {"bytes": 8, "flops": 8})
    seconds = {1.0: 4.0, 2: 2.0, 3: 8.0}
    device = gpu.Device.__new__(gpu.Device)
    device.cuda, device.where, device.published, device.copy, device.matmul = False, "cpu", None, 1.0, 1.0

    device.clock = lambda run: (run(), seconds[run.args[0].get("FACTOR", 1.0)])[1]
    case = tune.case(device, one, 2)
    assert case["winner"] == "FACTOR 2" and case["ratio"] == 0.5 and case["note"] == "the fastest is FACTOR 2"


def test_what_cannot_be_tuned_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["cpu", "--tune"])
    assert stopped.value.code == 2 and "suite cpu has no kernels to tune" in capsys.readouterr().err


def test_a_tuned_record_is_no_suites(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RECORDS", tmp_path)
    outcome = harness.result("tune-mla", [{}], {}, {}, device="A GPU")
    assert bench.record_path(outcome).name == "tune-mla-a-gpu.json"
    bench.record_path(outcome).write_text(json.dumps(outcome))
    assert bench.record("mla") is None and bench.record("tune-mla")["device"] == "A GPU"


@pytest.mark.parametrize("suite", command.TUNED)
def test_every_trial_names_settings_that_are_there(suite):
    for one in tune.TRIALS[suite](False):
        home = importlib.import_module(one.home)
        for change in one.changes:
            for name, value in change.items():
                assert hasattr(home, name) and callable(getattr(home, name)) >= isinstance(value, dict), (
                    one.name,
                    name,
                )
        assert len({tune.label(change) for change in one.changes}) == len(one.changes) and one.work["bytes"] > 0
