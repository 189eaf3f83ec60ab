"""Training: kill and resume give the same bits, the budget is kept, bad input gets one sentence."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from minids import report, train
from minids.config import ModelConfig
from minids.fp8 import Fp8Linear
from minids.generate import main as generate_main
from minids.model import Transformer
from minids.numerics import has_fast_bf16
from minids.run import BALANCE_ALPHA, begin

SIZES = ["--preset", "tiny", "--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--checkpoint-every", "0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of 40 small Python-like files."""
    folder, words = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for index in range(40):
        names = [words.choice(["alpha", "beta", "gamma", "delta"]) + str(words.randrange(30)) for _ in range(120)]
        lines = [f"def {name}(x):\n    return x + {words.randrange(100)}\n" for name in names]
        (folder / f"file{index}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*SIZES, "--data", str(corpus), "--steps", "12", "--out", str(folder)]) == 0
    return folder


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def start(corpus, folder, *options):
    command = [sys.executable, "-m", "minids.train", *SIZES, "--data", str(corpus), "--out", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


def last_step(folder):
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.parent.name[5:]) for path in folder.glob("checkpoints/step-*/state.json")), default=0)


def one_sentence(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("minids.train: "), lines
    return lines[0]


def test_a_run_leaves_a_model_a_log_a_curve_and_a_result(finished, capsys):
    assert {"run.json", "checkpoints", "model", "log.jsonl"} <= set(os.listdir(finished))
    record = json.loads((finished / "run.json").read_text())
    assert record["steps"] == 12 and 0 < record["result"]["bits_per_byte"] < 20
    rows = report.read_log(finished / "log.jsonl")
    assert rows[-1]["step"] == 12 and {"bits_per_byte", "tokens_per_second", "max_vio"} <= rows[0].keys()
    assert rows[-1]["bits_per_byte"] < rows[0]["bits_per_byte"]
    assert record["arguments"]["balance"] == "bias" and record["result"]["max_vio"] > 0
    for row in rows:
        loads = torch.tensor(row["loads"])
        assert loads.shape == (3, 16) and torch.allclose(loads.mean(1), torch.ones(3), atol=1e-3)
        assert (loads.amax(1) - 1).mean() <= row["max_vio"] + 1e-3, "a mean over steps hides some of the violation"
    assert generate_main([str(finished), "--prompt", "def ", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.parametrize("moment", ["before the first checkpoint", "at a random step"])
def test_a_killed_run_resumes_to_the_same_bits(moment, corpus, finished, tmp_path):
    folder = tmp_path / "run"
    process = start(corpus, folder, "--steps", "12")
    if moment == "at a random step":
        step = random.randint(1, 6)
        wait_for(lambda: last_step(folder) >= step, process)
    else:
        wait_for((folder / "run.json").exists, process)
    process.kill()
    process.communicate()
    assert train.main(["--resume", str(folder)]) == 0
    assert weights(folder) == weights(finished)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to handle")
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(corpus, finished, tmp_path):
    folder = tmp_path / "run"
    process = start(corpus, folder, "--steps", "12", "--checkpoint-every", "1000")
    wait_for(lambda: (folder / "log.jsonl").exists(), process)
    process.send_signal(random.choice([signal.SIGINT, signal.SIGTERM]))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and f"--resume {folder}" in out and "Traceback" not in out
    assert 0 < last_step(folder) < 12
    assert train.main(["--resume", str(folder)]) == 0
    assert weights(folder) == weights(finished)


def test_the_budget_settles_the_steps_once(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def interrupted(run, stop):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        assert train.main([*SIZES, "--data", str(corpus), "--minutes", "0.05", "--out", str(folder)]) == 130
    steps = json.loads((folder / "run.json").read_text())["steps"]
    assert steps >= 1
    assert train.main(["--resume", str(folder)]) == 0
    assert json.loads((folder / "run.json").read_text())["steps"] == steps
    assert report.read_log(folder / "log.jsonl")[-1]["step"] == steps
    other = tmp_path / "steps"
    assert train.main([*SIZES, "--data", str(corpus), "--steps", str(steps), "--out", str(other)]) == 0
    assert weights(folder) == weights(other), "the calibration leaves no trace"
    assert "held-out bits per byte: " in capsys.readouterr().out


def bias_and_alpha(folder):
    """The largest bias of any router of a trained model, and the alpha of its balance loss."""
    model = Transformer.from_pretrained(folder / "model")
    return max(
        moe.gate.e_score_correction_bias.abs().max().item() for moe in model.moe_layers()
    ), model.cfg.aux_loss_alpha


@pytest.mark.parametrize("balance", ["loss", "both", "none"])
def test_balance_is_chosen_and_kept_by_resume(balance, corpus, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*SIZES, "--data", str(corpus), "--steps", "4", "--balance", balance, "--out"]
    assert train.main([*command, str(whole)]) == 0
    assert f"(--balance {balance}" in capsys.readouterr().out
    assert json.loads((whole / "run.json").read_text())["arguments"]["balance"] == balance
    bias, alpha = bias_and_alpha(whole)
    assert (bias > 0) == (balance == "both") and alpha == {"none": 0.0}.get(balance, BALANCE_ALPHA)
    run = begin(json.loads((whole / "run.json").read_text())["arguments"], cut)
    run.train_step(4), run.train_step(4), run.save_checkpoint()
    assert train.main(["--resume", str(cut)]) == 0
    assert weights(cut) == weights(whole)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp8"])
def test_precision_is_chosen_and_kept_by_resume(precision, corpus, tmp_path, capsys):
    whole, cut, dtypes = tmp_path / "whole", tmp_path / "cut", set()
    command = [*SIZES, "--data", str(corpus), "--steps", "4", "--precision", precision, "--out"]
    assert train.main([*command, str(whole)]) == 0
    assert f"{precision} on cpu" in capsys.readouterr().out
    record = json.loads((whole / "run.json").read_text())
    assert record["arguments"]["precision"] == precision
    run = begin(record["arguments"], cut)
    run.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: dtypes.add(_[2].dtype))
    run.train_step(4), run.train_step(4), run.save_checkpoint()
    fast = torch.bfloat16 if has_fast_bf16("cpu") else torch.float32
    assert dtypes == {{"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision, fast)}
    assert any(isinstance(module, Fp8Linear) for module in run.model.modules()) == (precision == "fp8")
    assert train.main(["--resume", str(cut)]) == 0
    assert weights(cut) == weights(whole)


def test_a_run_of_an_older_version_is_balanced_by_bias_and_its_log_still_plots(corpus, finished, tmp_path):
    folder = tmp_path / "run"
    arguments = json.loads((finished / "run.json").read_text())["arguments"]
    del arguments["balance"]
    run = begin(arguments, folder)
    assert "balance" not in json.loads((folder / "run.json").read_text())["arguments"]
    row = {"step": 1, "bits_per_byte": 8.0, "tokens_per_second": 9.0, "max_vio": 1.0}
    run.train_step(12), run.save_checkpoint()
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    assert train.main(["--resume", str(folder)]) == 0
    assert weights(folder) == weights(finished)
    rows = report.read_log(folder / "log.jsonl")
    assert rows[0] == row and "loads" in rows[-1] and (folder / "loss.png").stat().st_size > 10_000


def drawn(folder, monkeypatch, rows):
    """The axes of the picture that is drawn of `rows`."""
    from matplotlib.figure import Figure

    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    report.plot(folder, {"bits_per_byte": 1.4, "gzip": 2.0, "xz": 1.6})
    return figures[0].axes


def test_the_picture_has_a_heat_map_of_loads_where_there_are_any(tmp_path, monkeypatch):
    dense = [{"step": step, "bits_per_byte": 2.0, "max_vio": 0.0} for step in (10, 20, 30)]
    assert len(drawn(tmp_path, monkeypatch, dense)) == 1
    assert len(drawn(tmp_path, monkeypatch, [{**row, "max_vio": 0.4} for row in dense])) == 2
    loads = [[[0.5, 1.5, 1.0], [1.0, 2.0, 0.0]], [[0.1, 1.9, 1.0], [1.0, 1.0, 1.0]]]
    rows = [dense[0], *({**row, "max_vio": 0.7, "loads": one} for row, one in zip(dense[1:], loads, strict=True))]
    _, vio, heat, bar = drawn(tmp_path, monkeypatch, rows)
    assert heat.get_xlabel() == "step" and "load" in bar.get_ylabel() and vio.lines[0].get_ydata()[1] == 0.7
    image = heat.images[0].get_array()
    assert image.shape[0] == 6 and image.mask[:, 0].all(), "the first line has no loads"
    assert image[:, -1].tolist() == pytest.approx(loads[1][0] + loads[1][1]) and image[1, 15] == pytest.approx(1.5)


def test_a_dense_model_has_no_loads(tmp_path):
    path = tmp_path / "log.jsonl"
    with report.Progress(path, 30, 0, 64, 3.0) as progress:
        progress.add(1, torch.tensor(2.0), *Transformer(ModelConfig(n_routed_experts=0)).update_expert_bias(0.1))
    assert report.read_log(path)[0]["max_vio"] == 0 and "loads" not in report.read_log(path)[0]


def test_what_disturbs_a_step_of_the_calibration_changes_nothing(corpus, tmp_path, monkeypatch):
    run = begin(
        train.complete_arguments({"data": str(corpus), "batch_size": 2, "seq_len": 32, "device": "cpu"}),
        tmp_path / "run",
    )
    for disturbed in (0.25, 20.0):
        seconds = iter([5.0, 1.0, 1.0] + [0.25] * 6 + [disturbed] + [0.25] * 3 + [0.0] * 3)
        monkeypatch.setattr(train, "timed", lambda compute, times=seconds: next(times))
        assert train.settle_steps(run, 1000.0) == pytest.approx((1000 - 10 - 4) / 0.25, rel=0.03)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "huge"], "there is no preset 'huge'"),
        (["--preset", "deepseek-v3"], "too large to train here"),
        (["--steps", "3", "--minutes", "1"], "one measure"),
        (["--steps", "0"], "--steps is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--seq-len", "100000"], "positions"),
        (["--seq-len", "4096"], "sequences of 4096"),
        (["--precision", "int8"], "--precision is 'int8'; it must be one of bf16, fp32, fp8"),
        (["--balance", "sometimes"], "--balance is 'sometimes'; it must be one of bias, loss, both, none"),
        (["--seed", str(2**64)], "--seed is 18446744073709551616"),
        (["--device", "nowhere"], "--device is nowhere, which torch cannot use here"),
        (["--data", "/does/not/exist"], "/does/not/exist"),
        (["--out", "/dev/null/run"], "/dev/null/run"),
    ],
)
def test_bad_arguments_get_one_sentence(options, words, corpus, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    for name in "abcdefghij":
        (tmp_path / "small" / f"{name}.txt").write_text(f"{name} few words, over and over. " * 20)
    data = [] if "--data" in options else ["--data", str(tmp_path / "small")]
    out = [] if "--out" in options else ["--out", str(tmp_path / "run")]
    assert train.main(["--device", "cpu", *options, *data, *out]) == 2
    assert words in one_sentence(capsys)


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train.main(["--data", str(tmp_path / "empty"), "--out", str(tmp_path / "run")]) == 2
    assert "empty" in one_sentence(capsys)


def test_a_folder_that_holds_a_run_is_not_written_over(finished, corpus, tmp_path, capsys):
    before = weights(finished)
    assert train.main([*SIZES, "--data", str(corpus), "--steps", "1", "--out", str(finished)]) == 2
    assert "--resume" in one_sentence(capsys) and weights(finished) == before
    (tmp_path / "thesis.txt").write_text("all of it")
    assert train.main([*SIZES, "--data", str(corpus), "--steps", "1", "--out", str(tmp_path)]) == 2
    assert "not empty" in one_sentence(capsys)


def test_resume_needs_a_run_and_its_corpus(finished, corpus, tmp_path, capsys):
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert "holds no run" in one_sentence(capsys)
    assert train.main(["--resume", str(finished), "--lr", "1"]) == 2
    assert "leave out --lr" in one_sentence(capsys)
    record = json.loads((finished / "run.json").read_text())
    elsewhere = {**record, "arguments": {**record["arguments"], "device": "nowhere"}}
    for text, words in (("[]", "is damaged"), ("{}", "is damaged"), (json.dumps(elsewhere), "device is nowhere")):
        (tmp_path / "run.json").write_text(text)
        assert train.main(["--resume", str(tmp_path)]) == 2
        assert words in one_sentence(capsys)
    (corpus / "file0.py").rename(tmp_path / "file0.py")
    try:
        assert train.main(["--resume", str(finished)]) == 2
        assert "has changed" in one_sentence(capsys)
    finally:
        (tmp_path / "file0.py").rename(corpus / "file0.py")


def test_a_full_disk_gets_one_sentence_and_the_run_goes_on_later(corpus, finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.report.Progress, "flush", full)
        assert train.main([*SIZES, "--data", str(corpus), "--steps", "12", "--out", str(folder)]) == 2
    assert "is full; make room" in capsys.readouterr().err
    assert train.main(["--resume", str(folder)]) == 0
    assert weights(folder) == weights(finished)


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    with pytest.raises(report.Diverged), report.Progress(tmp_path / "log.jsonl", 20, 0, 64, 3.0) as progress:
        for step in range(1, 12):
            progress.add(step, torch.tensor(float("nan")), torch.tensor(0.0), torch.ones(1, 2))


def test_the_log_drops_steps_that_are_trained_again_and_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 3')
    with report.Progress(path, 30, 10, 64, 3.0) as progress:
        progress.add(11, torch.tensor(2.0), torch.tensor(0.0), torch.ones(1, 2))
    assert [row["step"] for row in report.read_log(path)] == [10, 11]


def test_a_disk_that_is_full_when_a_run_goes_on_costs_no_line_of_the_log(tmp_path, monkeypatch):
    def full(path, *_, **__):
        open(path, "w").close()
        raise OSError(28, "No space left on device")

    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 10}\n')
    monkeypatch.setattr(report.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.keep_lines(path, 10)
    assert report.read_log(path) == [{"step": 10}]


def test_without_matplotlib_the_curve_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.plot(tmp_path, {"bits_per_byte": 1.4, "gzip": 2.0, "xz": 1.6})
    assert "matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())
