"""minids.bench: contenders alternate, medians and ratios are right, records are whole, and suite cpu runs."""

import json
import sys
import types

import pytest
import torch

from minids import bench
from minids.bench import __main__ as command
from minids.bench import cpu, harness, tables


def contender(side, form, seen, seconds, clock):
    """A contender that spends the next of `seconds` on a clock of the test's own."""
    seconds = iter(seconds)

    def run(state):
        seen.append(state)
        clock[0] += next(seconds)

    return harness.Contender(side, form, run, prepare=lambda: form)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def test_contenders_alternate_after_a_round_of_warm_up(clock):
    seen = []
    pair = [contender("minids", "a", seen, [9, 1, 2], clock), contender("peer", "b", seen, [9, 3, 4], clock)]
    assert harness.alternate(pair, rounds=2) == [[1, 2], [3, 4]]
    assert seen == ["a", "b"] * 3


def test_measure_takes_medians_and_the_best_form_of_each_side(clock):
    three = [
        contender("minids", "a", [], [9, 1, 2, 50], clock),
        contender("peer", "b", [], [9, 5, 5, 5], clock),
        contender("peer", "c", [], [9, 4, 4, 2], clock),
    ]
    case = harness.measure("work", three, amount=100, rounds=3)
    assert case["best"]["minids"]["median"] == 50 and case["best"]["minids"]["max"] == 100
    assert case["best"]["minids"]["min"] == 2 and case["best"]["peer"]["form"] == "c"
    assert case["ratio"] == 2.0


def test_a_side_alone_has_no_ratio(clock):
    assert harness.measure("work", [contender("minids", "a", [], [1, 1], clock)], 1, rounds=1)["ratio"] is None


def test_provenance_names_the_machine_and_the_versions():
    facts = harness.provenance()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] and facts["cores"] > 0 and "commit" in facts and facts["date"].startswith("20")


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    text = capsys.readouterr()
    assert stopped.value.code == 2 and text.out == "" and text.err.count("\n") == 1
    return text.err


def test_what_cannot_run_is_told_in_one_sentence(capsys, tmp_path):
    assert f"no suite 'gpuu'; the suites are {', '.join(bench.SUITES)}" in refused(["gpuu"], capsys)
    assert "cannot be written" in refused(["cpu", "--json", str(tmp_path / "absent" / "x.json")], capsys)
    assert "cannot be written" in refused(["cpu", "--json", str(tmp_path)], capsys)
    assert "no figures to record" in refused(["cpu", "--quick", "--record"], capsys)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A suite of one made-up case in place of the real ones, and a folder for its record."""
    form = {"side": "minids", "form": "fp32", "median": 2.0, "min": 1.0, "max": 3.0, "rounds": 1}
    case = {"case": "work", "unit": "tokens/s", "forms": [form], "best": {"minids": form}, "ratio": None}
    suite = types.ModuleType("pretend", "pretend: a suite.")
    suite.device, suite.cases = "A GPU", {"work": lambda: case}

    def run(quick, save, until):
        outcome = harness.result("pretend", [], {"peer": "it is absent"}, {}, quick, suite.device)
        return harness.gather(suite.cases, outcome, save, until)

    suite.run = run
    monkeypatch.setitem(sys.modules, "pretend", suite)
    for module in (bench, command):
        monkeypatch.setattr(module, "SUITES", {"pretend": "pretend"})
    monkeypatch.setattr(bench, "RECORDS", tmp_path / "records")
    suite.folder = tmp_path
    return suite


def test_without_a_name_all_suites_are_listed_and_run(pretend, capsys):
    command.main([])
    text = capsys.readouterr().out
    assert "suites:\n  pretend: a suite." in text and "skipped peer: it is absent" in text


def test_json_and_record_are_written_whole(pretend, capsys):
    assert bench.record("pretend") is None
    command.main(["pretend", "--json", str(pretend.folder / "out.json"), "--record"])
    outcome = json.loads((pretend.folder / "out.json").read_text())["pretend"]
    assert outcome == bench.record("pretend") and outcome["complete"]
    assert outcome["provenance"]["command"] == "python -m minids.bench pretend --record"
    assert sorted(path.name for path in pretend.folder.rglob("*.*")) == ["out.json", "pretend-a-gpu.json"]


def test_no_machine_takes_the_place_of_another(pretend, capsys, monkeypatch):
    facts = harness.provenance()
    for sign, date in (("aaaa1111", "2026-01-01"), ("bbbb2222", "2026-01-02"), ("aaaa1111", "2026-01-03")):
        monkeypatch.setattr(harness, "provenance", lambda new={"machine": sign, "date": date}: {**facts, **new})
        command.main(["pretend", "--record"])
    names = ["pretend-a-gpu-aaaa1111.json", "pretend-a-gpu-bbbb2222.json", "pretend-a-gpu.json"]
    assert sorted(path.name for path in bench.RECORDS.iterdir()) == names[1:]
    assert bench.record("pretend")["provenance"]["date"] == "2026-01-03"


def test_several_suites_end_in_one_table(pretend, capsys):
    bench.SUITES["second"] = command.SUITES["second"] = "pretend"
    command.main([])
    text = capsys.readouterr().out.partition("\nsuite  ")[2]
    assert text.count("work, tokens/s  2 (1-3) fp32") == 2 and "second: skipped peer: it is absent" in text


def test_each_device_has_its_own_record(pretend, capsys, monkeypatch):
    dates, facts = iter(["2026-01-02", "2026-01-01"]), harness.provenance()
    monkeypatch.setattr(harness, "provenance", lambda: {**facts, "date": next(dates)})
    for pretend.device in ("NVIDIA H200", "AMD EPYC 9654"):
        command.main(["pretend", "--record"])
    assert bench.record("pretend")["device"] == "NVIDIA H200"
    assert bench.record("pretend", "AMD EPYC 9654")["device"] == "AMD EPYC 9654"
    assert bench.record("pretend", "amd-epyc-9654")["provenance"]["date"] == "2026-01-01"
    assert bench.record("pretend", "NVIDIA H100") is None


def test_an_interrupted_run_leaves_what_was_measured_and_the_record(pretend, capsys):
    def interrupt():
        raise KeyboardInterrupt

    pretend.cases["more"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        command.main(["pretend", "--record"])
    left = bench.record("pretend")
    assert [case["case"] for case in left["cases"]] == ["work"] and not left["complete"]
    assert "did not get to all of its cases" in tables.table(left)
    del pretend.cases["more"]
    command.main(["pretend", "--record"])
    assert bench.record("pretend")["complete"] and len(list(bench.RECORDS.iterdir())) == 1


def test_a_case_that_fails_leaves_the_others(pretend, capsys):
    """It is told with its error, the record says so and stays incomplete, and so it is with suites."""

    def fails():
        raise RuntimeError("no memory\nthere")

    work = pretend.cases.pop("work")
    pretend.cases |= {"broken": fails, "work": work}
    bench.SUITES["second"] = command.SUITES["second"] = "pretend"
    with pytest.raises(SystemExit) as stopped:
        command.main(["pretend", "second", "--record"])
    text = capsys.readouterr()
    assert stopped.value.code == 1 and "in fails" in text.err and "failed: pretend, second" in text.err
    left = bench.record("pretend")
    assert [case["case"] for case in left["cases"]] == ["work"] and not left["complete"]
    assert left["skipped"]["broken"] == "it failed (RuntimeError: no memory)"
    assert text.out.count("skipped broken: it failed") == 4  # in the table of each, and in the overview


def test_a_record_names_the_versions_that_its_cases_imported(pretend, capsys, monkeypatch):
    work = pretend.cases["work"]
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    fake = types.SimpleNamespace(__version__="9.9")
    pretend.cases["work"] = lambda: (monkeypatch.setitem(sys.modules, "transformers", fake), work())[1]
    command.main(["pretend", "--record"])
    assert bench.record("pretend")["provenance"]["transformers"] == "9.9"


def test_no_case_is_begun_after_the_minutes_given(pretend, capsys):
    command.main(["pretend", "--minutes", "0", "--json", str(pretend.folder / "out.json")])
    outcome = json.loads((pretend.folder / "out.json").read_text())["pretend"]
    assert outcome["cases"] == [] and "--minutes" in outcome["skipped"]["work"] and not outcome["complete"]


def test_times_are_better_when_small_and_a_baseline_is_not_in_the_ratio(clock):
    sides = [("minids", "a", [9, 2, 4, 4]), ("peer", "b", [9, 6, 6, 6]), ("baseline", "c", [9, 1, 1, 1])]
    three = [contender(side, form, [], seconds, clock) for side, form, seconds in sides]
    three[2].same = False
    case = harness.measure("work", three, None, rounds=3)
    assert case["unit"] == "µs" and case["best"]["minids"]["median"] == 4e6 and case["best"]["minids"]["min"] == 2e6
    assert case["ratio"] == 1.5 and "1.50×" in "".join(sum(tables.gpu_rows({"cases": [case]}), ()))


def test_cpu_suite_runs_beside_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    command.main(["cpu", "--quick", "--json", str(tmp_path / "cpu.json")])
    outcome = json.loads((tmp_path / "cpu.json").read_text())["cpu"]
    names = [case["case"] for case in outcome["cases"]]
    assert names == ["training 2×16", "prefill 16", "decode at 16", "decode at 32"]
    for case in outcome["cases"]:
        assert set(case["best"]) == {"minids", "transformers"} and case["ratio"] > 0
    assert outcome["quick"] and not outcome["skipped"]
    assert "decode at 16" in capsys.readouterr().out


def test_a_share_of_the_roofline_is_flops_over_the_measured_product():
    forms = [{"side": "minids", "form": form, "median": 100.0} for form in ("fp32", "bf16 sdpa eager")]
    sizes = cpu.Sizes(peaks={"fp32": 1000.0, "bf16": 4000.0})
    case = cpu.with_shares({"forms": forms}, 5.0, sizes)
    assert [form["of_roofline"] for form in case["forms"]] == [0.5, 0.125]


def test_an_absent_peer_is_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    command.main(["cpu", "--quick"])
    text = capsys.readouterr().out
    assert "skipped transformers: it cannot be imported" in text and "training 2×16" in text


def test_sides_that_disagree_are_not_timed():
    class Fixed:
        def __init__(self, value):
            self.side, self.value = f"peer{value}", value

        def forms(self, case):
            return ["fp32"]

        def use(self, form):
            return None

        def forward(self, model, tokens):
            return torch.full((1, 4), self.value)

    cfg = types.SimpleNamespace(vocab_size=8)
    cpu.check_agreement([Fixed(1.0), Fixed(1.0)], cfg)
    with pytest.raises(harness.BenchError, match=r"peer2\.0's logits differ"):
        cpu.check_agreement([Fixed(1.0), Fixed(2.0)], cfg)
