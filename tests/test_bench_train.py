"""Suite train: every side runs, wrong ones are not timed, and a GPU's run is done here by the wall's clock."""

import json

import pytest
import torch

from minids import triton_env
from minids.bench import __main__ as command
from minids.bench import gpu, harness, tables, train, train_step

pytestmark = pytest.mark.skipif(not triton_env.installed(), reason="triton is not installed")
pytest.importorskip("transformers")


@pytest.fixture
def small(monkeypatch):
    """A preset so small that a step takes no time."""
    preset = train_step.ModelConfig.preset
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "n_routed_experts": 8}
    monkeypatch.setattr(train_step.ModelConfig, "preset", lambda name: preset(name, **sizes, num_experts_per_tok=2))


@pytest.fixture
def sides(small):
    return train_step.Sides(gpu.Device(quick=True), "tiny", 2, 16)


def test_quick_runs_every_side(tmp_path, capsys):
    command.main(["train", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())["train"]
    cases = {case["case"]: case for case in outcome["cases"]}
    step, loss = cases["step of tiny, 2×16"], cases["linear + cross-entropy 40×32×257"]
    assert list(cases) == [step["case"], loss["case"], "profile of tiny bf16", "profile of tiny FP8"]
    names = [[(form["side"], form["form"]) for form in case["forms"]] for case in (step, loss)]
    assert names[0] == [("minids", "bf16"), ("minids", "FP8"), ("transformers", "grouped_mm")]
    assert {("minids", ""), ("minids", "torch"), ("torch", "in full")} <= {*names[1]}
    assert not step["skipped"] and {"Liger", "CCE"} <= {*loss["skipped"]} | {side for side, _ in names[1]}
    assert all(form["peak_bytes"] is None for case in (step, loss) for form in case["forms"])
    assert all(len(cases[f"profile of tiny {form}"]["profile"]) == 10 for form in ("bf16", "FP8"))
    assert outcome["complete"] and outcome["skipped"]["CUDA graph"] == "there is no GPU"
    text = capsys.readouterr().out
    assert "aten::" in text and "ran, not timed" in text and "tokens/s" not in text


def test_a_timed_run_has_rates_and_a_profile(small, timed):
    outcome = json.loads(json.dumps(train.run(quick=True)))
    step, loss, *profiles = outcome["cases"]
    assert step["ratio"] > 0 and loss["ratio"] > 0 and "tokens/s" in step["note"]
    for form in step["forms"]:
        assert form["tokens/s"] == pytest.approx(32e6 / form["median"]) and form["of_roofline"] > 0
    for case in profiles:
        shares = [row["share"] for row in case["profile"]]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
        assert case["step"]["min"] <= case["step"]["median"] <= case["step"]["max"]
    text = tables.table(outcome)
    assert text.count("profile of tiny") == 2 and "%" in text and "kernels take" in text
    assert "kernels take" in tables.overview({"train": outcome})


def test_the_case_of_a_graph_and_that_of_torch_compile(sides, monkeypatch):
    """The layers are compiled once for each kind of layer: the peer is not slowed down by compiling again and again."""
    device, compiled = sides.device, torch.compile
    without = train.step(device, lambda preset: sides, "tiny", "torch.compile", 1)
    assert without["skipped"] == {"transformers compiled": "its step has not run before"}
    monkeypatch.setattr(sides, "recorded", lambda: sides.minids())
    graph = train.step(device, lambda preset: sides, "tiny", "CUDA graph", 1)
    assert [form["form"] for form in graph["forms"]] == ["bf16", "grouped_mm", "CUDA graph"]
    assert "minids CUDA graph" not in sides.known
    sides.known.pop("transformers compiled")
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    torch._dynamo.utils.counters.clear()
    case = train.step(device, lambda preset: sides, "tiny", "torch.compile", 1)
    assert [form["form"] for form in case["forms"]] == ["bf16", "compiled"] and not case["skipped"]
    found = torch._dynamo.utils.counters
    assert found["stats"]["unique_graphs"] == 3 and not found["graph_break"]  # a dense layer, one of experts, the loss


def test_without_a_gpu_there_is_no_graph_and_that_is_said(sides):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    case = train.step(sides.device, lambda preset: sides, "tiny", "CUDA graph", 1)
    assert "it does not run here" in case["skipped"]["CUDA graph"] and len(case["forms"]) == 2


def test_another_model_is_not_timed(sides, monkeypatch):
    with torch.no_grad():
        right = train_step.relative_error
        monkeypatch.setattr(train_step, "relative_error", lambda got, want: right(1.01 * got, want))
    case = train.step(sides.device, lambda preset: sides, "tiny", "", 1)
    assert "its logits differ from minids' by 1.0e-02" in case["skipped"]["transformers grouped_mm"]
    assert "transformers" not in case["best"]


def test_a_wrong_loss_is_not_timed(monkeypatch):
    device = gpu.Device(quick=True)
    monkeypatch.setattr(train, "liger", lambda: lambda *of: 1.1 * train.formula(*of))
    case = train.loss(device, 40, 16, 50, 1, {})
    assert "differs from the fp32 reference" in case["skipped"]["Liger"]
    monkeypatch.setattr(train.layers, "linear_cross_entropy", lambda *of, impl: 1.1 * train.formula(*of))
    with pytest.raises(harness.BenchError, match="minids's result 0 differs"):
        train.loss(device, 40, 16, 50, 1, {})


def test_a_step_is_that_of_a_run(sides):
    """Both optimizers and the routers' biases move, and what is kept is counted."""
    step = sides.minids()
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    nats = step(*sides.inputs)
    assert nats.isfinite() and all(p.grad is None for p in step.model.parameters())
    after = step.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"embed_tokens.weight", "layers.1.mlp.gate.e_score_correction_bias"} <= moved
    assert all(torch.equal(before[name], tensor) for name, tensor in sides.model.state_dict().items())
    weights = sum(p.nbytes for p in step.model.parameters())
    adam = sum(p.nbytes for group in step.optimizers[1].param_groups for p in group["params"])
    buffers = sum(b.nbytes for b in step.model.buffers())
    steps = 4 * sum(len(group["params"]) for group in step.optimizers[1].param_groups)  # AdamW counts for each
    assert step.state_bytes() == 2 * weights + adam + buffers + steps  # one moment of all, a second of AdamW's


def test_one_presets_models_at_a_time_and_what_did_not_run_has_no_profile(small, monkeypatch):
    monkeypatch.setattr(train, "TINY", {"tiny": (2, 16), "small": (1, 8)})
    monkeypatch.setattr(train, "TINY_LOSSES", [(9, 8, 20), (9, 8, 30)])
    alive, make = [], train.Sides
    monkeypatch.setattr(train, "Sides", lambda *of: alive.append(of[1]) or make(*of))
    monkeypatch.setattr(train_step.Sides, "minids", lambda self, *of: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    outcome = train.run(quick=True)
    assert alive == ["tiny", "small"] and len(outcome["cases"]) == 8
    assert outcome["cases"][0]["skipped"]["minids bf16"] == "it ran out of the GPU's memory"
    assert outcome["cases"][2] | {"note": "it ran out of the GPU's memory", "profile": []} == outcome["cases"][2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_recorded_step_is_the_step(small):
    """On a GPU: the graph's losses are those of the plain step, round after round."""
    sides = train_step.Sides(gpu.Device(quick=True), "tiny", 2, 16)
    graph, plain = sides.recorded(), sides.minids()
    plain(*sides.inputs)
    for _ in range(3):
        got, want = graph(*sides.inputs), plain(*sides.inputs)
        assert train.relative_error(got, want) < 1e-3
    case = train.step(sides.device, lambda preset: sides, "tiny", "", 1)
    assert all(form["peak_bytes"] > 0 for form in case["forms"])
