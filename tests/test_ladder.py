"""Suite ladder: the rungs are alike in all but what they are named for, the plan adds up, verdicts say what is so."""

import json

import pytest
import torch

from minids import accounting, bench
from minids.bench import __main__ as command
from minids.bench import ladder, ladder_rungs
from minids.lab import front


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A quick run, by its command, as it comes back from its file."""
    path = tmp_path_factory.mktemp("ladder") / "out.json"
    command.main(["ladder", "--quick", "--json", str(path)])
    return json.loads(path.read_text())["ladder"]


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_rungs_have_the_same_active_parameters_and_their_own_cache(preset):
    models = ladder.rungs(preset)
    active = [accounting.parameters(rung.cfg).active for rung in models.values()]
    assert max(active) < 1.02 * min(active)
    mha, gqa, mla, moe, fp8 = (accounting.kv_elements_per_token(rung.cfg) for rung in models.values())
    assert mha > gqa >= mla == moe == fp8
    fewer = models["GQA"].cfg.num_key_value_heads - 1
    assert fewer == 0 or fewer * gqa / (fewer + 1) < mla or models["GQA"].cfg.num_attention_heads % fewer
    shapes = {(r.cfg.hidden_size, r.cfg.num_hidden_layers, r.cfg.vocab_size) for r in models.values()}
    assert len(shapes) == 1 and [rung.fp8 for rung in models.values()] == [False] * 4 + [True]
    assert models["MLA+MoE"].cfg.n_routed_experts and not models["MLA"].cfg.n_routed_experts


def test_the_plan_spends_the_time_and_counts_flops():
    sizes = ladder.sizes_for("cpu", quick=False)
    speeds = {"a": (1000.0, 6e6), "b": (500.0, 6e6), "c": (1000.0, 3e6), "emulated": (100.0, 6e6)}
    cases = [
        {
            "case": name,
            "train_tokens_per_s": {"median": speed},
            "flops_per_token": flops,
            "emulated": name == "emulated",
        }
        for name, (speed, flops) in speeds.items()
    ]
    by_time, by_flops, each = ladder.plan(cases, sizes, 100_000, dict.fromkeys(speeds, 10.0))
    tokens = sizes.batch_size * sizes.seq_len
    seconds = 10.0 * 7 * sizes.seeds
    for name, (speed, flops) in speeds.items():
        assert by_flops[name] * flops == pytest.approx(by_flops["a"] * 6e6, rel=0.01)
        if name == "emulated":
            seconds += sizes.seeds * by_flops[name] * tokens / speed
            continue
        assert by_time[name] * tokens / speed == pytest.approx(each, rel=0.01)
        seconds += sizes.seeds * (by_time[name] + ladder.DECAY * by_flops[name]) * tokens / speed
    assert by_time["b"] == by_flops["b"] and by_time["c"] == by_flops["c"] == 2 * by_flops["a"]
    assert "emulated" not in by_time and seconds == pytest.approx(100_000, rel=0.01)


def test_every_rung_is_measured_with_every_seed(outcome):
    assert [case["case"] for case in outcome["cases"]] == list(ladder.rungs("tiny")) and outcome["complete"]
    for case in outcome["cases"]:
        emulated = case["case"] == "MLA+MoE+FP8" and not torch.cuda.is_available()
        assert case["emulated"] == emulated
        for end in ("equal_flops",) if emulated else ("equal_time", "equal_flops"):
            bits = case[end]["bits_per_byte"]
            assert len(bits) == len(case[end]["seconds"]) == 2 and all(1 < one < 8 for one in bits)
        assert case["equal_flops"]["steps"] <= (case["equal_time"]["steps"] or 10**9)
        assert case["peak_bytes"] > 12 * case["parameters"]  # weights, gradients, a moment at least
        assert set(case["decode_tokens_per_s"]) == {"16", "32"} and case["train_tokens_per_s"]["median"] > 0
    assert outcome["settings"]["corpus_hash"] and outcome["provenance"]["machine"]


def test_the_table_and_the_figure_have_every_rung(outcome, tmp_path):
    text = ladder.table(outcome)
    for case in outcome["cases"]:
        assert text.count(case["case"]) >= 1
    assert "MLA+MoE after MLA:" in text and "FP8 is emulated" in text and outcome["provenance"]["date"] in text
    ladder.draw(outcome).savefig(tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    begun = {
        **outcome,
        "complete": False,
        "cases": [{k: v for k, v in c.items() if k != "equal_flops"} for c in outcome["cases"]],
    }
    assert "did not get to its end" in ladder.table(begun) and not ladder.verdicts(begun)
    ladder.draw(begun)


def made_up(name, bits, speed, cache):
    """A case with the same figure wherever the kind is the same."""
    end = {"bits_per_byte": bits, "steps": 1, "seconds": [1] * len(bits)}
    speeds = dict(zip(("min", "median", "max"), speed, strict=True))
    case = {"case": name, "equal_time": end, "equal_flops": end, "train_tokens_per_s": speeds}
    case["emulated"] = False
    return case | {"decode_tokens_per_s": {"16": speeds}, "peak_bytes": 100, "cache_bytes_per_token": cache}


def test_verdicts_need_every_seed_and_ranges_apart():
    low, same = made_up("A", [2.0, 2.1], (90, 100, 110), 100), made_up("B", [1.9, 2.2], (100, 120, 130), 50)
    good, bad = made_up("C", [1.8, 2.1], (140, 150, 160), 50), made_up("D", [1.9, 2.2], (90, 100, 110), 200)
    outcome = {"cases": [low, same, good, bad], "settings": {"contexts": [16], "device": "cpu"}}
    first, second, third = ladder.verdicts(outcome)
    assert first.startswith("B after A: pays in cache 0.50×; changes little in loss at equal time +0.000")
    assert second.startswith("C after B: pays in loss at equal time -0.100") and "training speed 1.25×" in second
    assert ladder.verdicts(outcome, brief=True)[0] == "B after A: pays in cache 0.50×"
    assert third.startswith("D after C: costs loss at equal time +0.100") and "cache 4.00×" in third


def test_a_branch_leaves_the_trunk_alone():
    sizes = ladder.sizes_for("cpu", quick=True)
    text = ladder_rungs.Text(sizes, "cpu")
    rung = ladder.rungs("tiny")["MLA+MoE"]

    def weights(steps, branch):
        learner = ladder_rungs.Learner(rung, text, 0)
        learner.train_to(2)
        if branch:
            learner.branch().train_to(4, decay=2)
        learner.train_to(steps)
        return torch.cat([p.detach().flatten() for p in learner.model.parameters()])

    assert torch.equal(weights(3, branch=True), weights(3, branch=False))
    assert not torch.equal(weights(2, branch=False), weights(3, branch=False))


def test_the_readme_shows_the_record_and_its_figure_carries_the_digest(outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RECORDS", tmp_path)
    readme = f"before\n{front.OPEN}\nold\n{front.CLOSE}\nafter"
    assert "not recorded yet" in front.fill(readme, front.shown()) and "old" not in front.fill(readme, None)
    for name, one in {
        "cpu": outcome,
        "late": {**outcome, "complete": False},
        "gpu": {**outcome, "provenance": {**outcome["provenance"], "gpu": "a GPU", "cuda": "13", "date": "2000"}},
    }.items():
        (tmp_path / f"ladder-{name}.json").write_text(json.dumps(one))
    assert front.shown()["provenance"]["gpu"] == "a GPU"  # before a newer one of a processor
    filled = front.fill(readme, outcome)
    assert filled.startswith("before\n") and filled.endswith("\nafter") and "MLA+MoE after MLA" in filled
    assert front.fill("no block", outcome) == "no block"
    figure = tmp_path / "ladder.svg"
    figure.write_text(front.picture(outcome))
    assert front.is_of(figure, outcome) and not front.is_of(figure, {**outcome, "quick": False})


def test_a_rung_without_room_gets_a_line_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ladder, "synchronize", lambda: None)

    def build(name):
        if name == "large":
            raise torch.OutOfMemoryError
        return (lambda _: None,)

    skipped = {}
    figures = ladder.in_turns("training", 10, ladder.sizes_for("cpu", True), build, ["small", "large", "last"], skipped)
    assert list(figures) == ["small", "last"] and skipped == {"large, training": "it ran out of the GPU's memory"}
