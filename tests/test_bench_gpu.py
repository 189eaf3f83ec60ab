"""Suites mla and layers: their code by the interpreter, their arithmetic by hand, and what is said without a GPU."""

import json

import pytest
import torch

from minids import bench, triton_env
from minids.bench import __main__ as command
from minids.bench import attention, fp8, gpu, harness, layers, mla, moe, tables
from minids.layers import apply_rope

pytestmark = pytest.mark.skipif(not triton_env.installed(), reason="triton is not installed")
WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_clock_of_a_gpu_measures_work_and_not_launches():
    clock, a = gpu.Clock(), torch.ones(2**26, device="cuda")
    seconds = min(clock(lambda: a.mul_(1.0)) for _ in range(5))
    assert 2 * a.nbytes / 10e12 < seconds < 5e-3
    assert min(clock(lambda: None) for _ in range(5)) < 1e-4


def test_quick_runs_every_side_of_mla(tmp_path, capsys):
    command.main(["mla", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())["mla"]
    assert [case["case"] for case in outcome["cases"]] == ["H 4, batch 1, context 64", "H 2, batch 2, context 128"]
    for case in outcome["cases"]:
        assert {"minids", "torch", "SDPA GQA", "SDPA expanded"} <= set(case["best"]) and not case["skipped"]
        assert len(case["forms"]) >= 6
    assert {"FlashMLA", "FlagGems"} <= set(outcome["skipped"]) | set(case["best"])
    assert outcome["quick"] and outcome["complete"] and outcome["provenance"]["triton"]


def test_quick_runs_every_side_of_layers(tmp_path, capsys):
    command.main(["layers", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())["layers"]
    names = [f"{layer} {way}" for layer in ("RMSNorm 48", "SwiGLU 40", "RoPE 2×8") for way in ("forward", "backward")]
    assert [case["case"] for case in outcome["cases"]] == names
    for case in outcome["cases"]:
        assert {"minids", "torch"} <= set(case["best"]) and len(case["forms"]) >= 2
    assert "another function" in outcome["skipped"]["Liger's RoPE"]


def test_quick_runs_every_side_of_attention(tmp_path, capsys):
    command.main(["attention", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())["attention"]
    shapes = "MLA 2 heads 24/16, batch 2", "MHA 2 heads 16/16, batch 1"
    assert [case["case"] for case in outcome["cases"]] == [
        f"{s} {way}" for s in shapes for way in ("forward", "backward")
    ]
    for case in outcome["cases"]:
        assert {("minids", ""), ("SDPA", "default"), ("SDPA", "flash, padded")} <= {
            (form["side"], form["form"]) for form in case["forms"]
        }
        assert set(case["skipped"]) <= {"SDPA cuDNN", "SDPA efficient"}


def test_the_work_of_attention_over_whole_sequences():
    case = attention.attention("MLA", 4, 16, 192, 128)  # kernels multiply what the causal mask leaves, T²/2 pairs
    assert case.work(4096, False)["flops"] == 4 * 16 * 2 * (4096**2 / 2) * (192 + 128)
    assert case.work(4096, True)["flops"] == 4 * 16 * 2 * (4096**2 / 2) * (192 + 128 + 128 + 192 + 192)
    assert case.work(4096, False)["bytes"] == 2 * 4 * 4096 * 16 * (192 + 192 + 128 + 128)


def test_a_wrong_attention_is_not_timed(monkeypatch):
    monkeypatch.setattr(attention, "minids", lambda _: lambda q, k, v: 0.9 * attention.fused(q, k, v))
    monkeypatch.setitem(attention.SIDES, ("minids", ""), attention.minids)
    with pytest.raises(harness.BenchError, match="minids's result 0 differs"):
        attention.run(quick=True)


def test_quick_runs_every_side_of_moe(tmp_path, capsys):
    command.main(["moe", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())["moe"]
    whole = [f"experts tiny, {routing} {way}" for routing in moe.ROUTINGS for way in ("forward", "backward")]
    parts = [f"{part} tiny, {routing}" for part in ("up", "down", "dW of down") for routing in moe.ROUTINGS]
    assert [case["case"] for case in outcome["cases"]] == whole + parts
    for case in outcome["cases"]:
        wanted = {"minids", "torch"} | ({"transformers"} if case["case"] in whole else set())
        assert wanted <= set(case["best"]) and "MaxVio" in case.get("note", "MaxVio")
    uniform, skewed = (outcome["settings"]["shapes"][0][f"MaxVio {routing}"] for routing in moe.ROUTINGS)
    assert 0 < uniform < skewed


def test_a_wrong_experts_side_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        moe, "liger", lambda _: lambda x, gates, up, down, indices: 0.5 * x + 0 * (gates.sum() + up.sum() + down.sum())
    )
    outcome = moe.run(quick=True)
    assert "differs from the fp32 reference" in outcome["cases"][0]["skipped"]["Liger"]
    monkeypatch.setattr(moe.reference, "grouped_gemm", lambda x, w, ends: torch.ones(len(x), w.shape[1]))
    with pytest.raises(harness.BenchError, match="minids's result 0 differs"):
        moe.run(quick=True)


def test_quick_runs_every_side_of_fp8(tmp_path, capsys):
    command.main(["fp8", "--quick", "--json", str(tmp_path / "out.json")])
    outcome = json.loads((tmp_path / "out.json").read_text())["fp8"]
    sides = {case["case"].split(",")[0]: set(case["best"]) for case in outcome["cases"]}
    assert list(sides) == [
        "Fprop 64×128×256",
        "Wgrad 64×128×256",
        "linear forward + backward 64×128×256",
        "quantise 128×256",
        "train step tiny",
    ]
    assert len(outcome["cases"]) == 7 and all("minids" in found for found in sides.values())
    assert sum("torch bf16" in found for found in sides.values()) == 3 and "minids bf16" in sides["train step tiny"]


def test_a_wrong_fp8_side_is_not_timed(monkeypatch):
    monkeypatch.setattr(fp8, "sglang", lambda: lambda x, xs, w, ws, *_: torch.zeros(len(x), len(w)))
    device, known = gpu.Device(quick=True), {}
    case = fp8.product(device, 64, 128, 256, False, 1, known)
    assert "differs from the fp32 reference" in case["skipped"]["SGLang"] and "SGLang" not in case["best"]
    assert fp8.product(device, 64, 256, 256, False, 1, known)["skipped"]["SGLang"] == case["skipped"]["SGLang"]
    monkeypatch.setattr(fp8, "ours", lambda: lambda x, xs, w, ws, *_: torch.zeros(len(x), len(w)))
    with pytest.raises(harness.BenchError, match="minids's result 0 differs"):
        fp8.product(device, 64, 128, 256, False, 1, {})
    monkeypatch.setattr(fp8, "linear_step", lambda module: lambda x, dy, weight: (torch.zeros_like(x), weight))
    with pytest.raises(harness.BenchError, match="minids's gradient is off"):
        fp8.linear(device, 64, 128, 256, 1, {})


def test_work_of_the_experts_by_hand():
    one = moe.layer(moe.SHAPES[0], "uniform")
    forward = {"flops": 2 * 16384 * 6 * 3 * 2048 * 1408, "bytes": 2 * (3 * 64 * 2048 * 1408 + 2 * 16384 * 2048)}
    assert one.work(16384, False) == forward
    assert one.work(16384, True) == {name: 2 * value for name, value in forward.items()}
    assert moe.max_vio(moe.SHAPES[0], "uniform") < 0.1 < 1 < moe.max_vio(moe.SHAPES[0], "skewed")


@WITHOUT_A_GPU
def test_the_interpreter_gives_no_figures(capsys):
    command.main(["layers", "--quick"])
    text = capsys.readouterr().out
    assert "ran, not timed" in text and "×\n" not in text.replace("2×8", "")


@WITHOUT_A_GPU
@pytest.mark.parametrize("name", bench.GPU_SUITES)
def test_without_a_gpu_a_suite_says_what_it_needs(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([name])
    text = capsys.readouterr()
    assert stopped.value.code == 2 and text.out == "" and text.err.count("\n") == 1
    assert f"suite {name} needs a CUDA GPU" in text.err and "--quick runs tiny sizes" in text.err


@WITHOUT_A_GPU
def test_without_a_name_the_suites_of_a_gpu_are_named_and_left_out(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(command, "run", lambda name, *rest: ran.append(name))
    command.main([])
    text = capsys.readouterr().out
    anywhere = [name for name in bench.SUITES if name not in bench.GPU_SUITES]
    assert ran == anywhere
    assert "not run: suite mla needs a CUDA GPU" in text and "not run: suite layers" in text
    command.main(["--quick"])
    assert ran[len(anywhere) :] == list(bench.SUITES) and "not run" not in capsys.readouterr().out


def test_work_by_hand():
    case = mla.Case(B=128, S=4096, H=16)
    latents, queries, results = 128 * 4096 * 1152, 128 * 16 * 576 * 2, 128 * 16 * 512 * 2
    assert mla.latent_work(case) == {"bytes": latents + queries + results, "flops": 2 * 128 * 16 * 4096 * 1088}
    of_side = {side.form or side.side: side.work(case) for side in mla.SIDES}
    assert of_side["rows"] == {  # 8 groups of 128: 2048 numbers a position
        "bytes": 128 * 4096 * 2048 * 2 + 128 * 16 * 256 * 2,
        "flops": 2 * 128 * 16 * 4096 * 256,
    }
    assert of_side["padded"] == {
        "bytes": 128 * 16 * 4096 * 320 * 2 + 128 * 16 * 320 * 2,
        "flops": 2 * 128 * 16 * 4096 * 320,
    }
    work = [layer.work(32768, backward) for layer in (layers.norm(7168), layers.gate(2048)) for backward in (0, 1)]
    rows, gates = 32768 * 7168 * 2, 32768 * 2048 * 2
    weights = 2 * 7168 * 2  # read; or read, and its gradient written
    assert [w["bytes"] for w in work] == [2 * rows + weights, 3 * rows + weights, 3 * gates, 5 * gates]
    assert layers.turn(16, 64).work(32768, False)["bytes"] == 2 * 32768 * 1024 * 2 + 2 * 32768 * 32 * 4


def test_figures_are_shares_of_the_peaks():
    device = gpu.Device.__new__(gpu.Device)
    device.copy, device.matmul, device.published = 4e12, 800e12, "H200"
    reached = device.figures(1e-3, 2_400_000_000, 400_000_000_000)
    assert reached["GB/s"] == 2400 and reached["TFLOP/s"] == 400
    assert reached["of_copy"] == 0.6 and reached["of_matmul"] == 0.5 and reached["of_roofline"] == pytest.approx(0.5)
    device.published = None
    assert device.figures(1e-3, 10)["of_roofline"] is None


def test_only_the_gpu_of_the_table_has_its_published_peaks():
    assert gpu.published("NVIDIA H200", 150.1e9) == "H200"
    assert gpu.published("NVIDIA H100 80GB HBM3", 85.0e9) == "H100"
    assert gpu.published("NVIDIA H100 PCIe", 85.0e9) is None
    assert gpu.published("NVIDIA H100 NVL", 100e9) is None
    assert gpu.published("NVIDIA A100-SXM4-40GB", 42.5e9) is None
    assert gpu.published("NVIDIA GeForce RTX 4090 Laptop GPU", 17e9) is None


def test_a_wrong_result_is_not_timed():
    case, device = mla.Case(1, 64, 2, **mla.TINY), gpu.Device(quick=True)
    wrong = mla.Side("wrong", "", lambda data: lambda: torch.zeros(1, 2, 32, device=device.where))
    with pytest.raises(harness.BenchError, match="wrong's result 0 differs from the fp32 reference"):
        mla.checked(device, [case], {}, [wrong])
    skipped = {}
    assert mla.checked(device, [case], skipped, [wrong._replace(optional=True)]) == []
    assert "differs from the fp32 reference" in skipped["wrong"]


def test_a_side_without_room_is_skipped_by_name():
    case, device = mla.Case(1, 64, 2, **mla.TINY), gpu.Device(quick=True)
    big = mla.SIDES[1]._replace(room=lambda case: float("inf"))
    device.free = lambda: 1e9
    with torch.inference_mode():
        timed = mla.decode(device, case, [mla.SIDES[0], big], 1)
    assert set(timed["best"]) == {"minids"} and timed["skipped"] == {
        "torch two products": "it needs inf GB, 1 GB are left"
    }


def test_the_formula_of_rope_is_that_of_minids():
    x, angles = torch.randn(5, 2, 8), torch.randn(5, 4)
    ours = apply_rope(x, angles.cos(), angles.sin(), impl="torch")
    assert torch.allclose(layers.rope(x, angles.cos(), angles.sin()), ours, atol=1e-6)


def test_a_backward_pass_gets_fresh_inputs_each_round():
    def spoils(x):
        return x.clone() * 2

    inputs, rest = layers.gate_inputs(8, 4, "cpu")
    one = layers.Pass(spoils, (inputs[:1], rest), backward=True)
    out = one.prepare()
    assert torch.equal(one.run(out)[0], 2 * one.drawn) and one.drawn.abs().sum() > 0
    one.inputs[0].data.zero_()
    one.grad.zero_()
    assert torch.equal(one.run(one.prepare())[0], 2 * one.drawn)
    assert torch.equal(one.inputs[0], inputs[0])


def test_a_timed_run_has_figures_of_every_side(timed):
    for suite in (mla, layers):
        saved = []
        outcome = suite.run(quick=True, save=lambda outcome, saved=saved: saved.append(len(outcome["cases"])))
        assert saved == list(range(1, len(outcome["cases"]) + 1)) and outcome["device"] == "NVIDIA H200"
        for case in outcome["cases"]:
            assert case["unit"] == "µs" and case["ratio"] > 0
            assert all(form["GB/s"] > 0 and form["of_roofline"] > 0 for form in case["forms"])
        text = tables.table(json.loads(json.dumps(outcome)))
        assert "of roofline" in text and text.count("%") >= 2 * len(outcome["cases"])


def test_a_peer_that_fails_is_skipped_by_name_and_minids_is_not():
    def fails():
        raise RuntimeError("no kernel\nat all")

    skipped = {}
    assert gpu.tried("SDPA GQA", fails, skipped) is None
    assert skipped == {"SDPA GQA": "it does not run here (RuntimeError: no kernel)"}
    with pytest.raises(RuntimeError):
        gpu.tried("minids", fails, {})
