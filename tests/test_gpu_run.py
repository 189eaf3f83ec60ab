"""tests/gpu_run.py: parts that fail or hang leave the others alone, what they print is kept, and nothing overruns."""

import os
import sys
import time

import gpu_run
import pytest
import torch

from minids.bench import GPU_SUITES


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """run(options, **parts): gpu_run with parts that are Python code, in place of the real ones; gives its status."""
    asked = {}

    def commands(part, minutes, options):
        asked[part] = minutes
        return [[sys.executable, "-c", asked["code"][part]]]

    def run(*options, **codes):
        asked["code"] = codes
        monkeypatch.setattr(gpu_run, "PARTS", dict.fromkeys(codes, 1.0))
        return gpu_run.main([*codes, "--quick", "--out", str(tmp_path / "out"), *options])

    monkeypatch.setattr(gpu_run, "commands", commands)
    monkeypatch.setattr(gpu_run, "RECORDS", tmp_path / "records")
    run.out, run.records, run.minutes = tmp_path / "out", tmp_path / "records", asked
    run.records.mkdir()
    return run


def test_a_part_that_fails_and_one_that_hangs_leave_the_others_alone(parts, capsys):
    wait = "import time; print('begun', flush=True); time.sleep(600)"
    began = time.monotonic()
    status = parts("--minutes", "0.3", fails="print('before'); raise SystemExit(3)", hangs=wait, works="print('well')")
    text = capsys.readouterr().out
    assert status == 1 and time.monotonic() - began < 60
    assert "fails: failed, exit status 3\nhangs: ended after 0." in text and "works: done" in text
    logs = [(parts.out / f"{part}.log").read_text() for part in ("fails", "hangs", "works")]
    assert logs[0] == "before\n" and logs[1].startswith("begun\n") and logs[2] == "well\n"


def test_time_that_a_part_leaves_is_shared_by_the_others(parts):
    assert parts("--minutes", "6", first="", second="", third="") == 0
    shares = [parts.minutes[part] for part in ("first", "second", "third")]
    assert 1.9 < shares[0] <= 2 and 2.4 < shares[1] <= 3 and 4.5 < shares[2] <= 6


def test_new_records_are_copied_and_old_ones_are_not(parts):
    (parts.records / "old.json").write_text("{}")
    past = time.time() - 1000
    os.utime(parts.records / "old.json", (past, past))
    new = str(parts.records / "new.json")
    assert parts(works=f"open({new!r}, 'w').write('[]')") == 0
    assert [path.name for path in (parts.out / "records").iterdir()] == ["new.json"]


def test_what_is_run(tmp_path):
    options = gpu_run.argparse.Namespace(quick=False, out=tmp_path)
    (suite,) = gpu_run.commands("mla", 4.0, options)
    expected = ["minids.bench", "mla", "--record", "--minutes", "3.00", "--json", str(tmp_path / "mla.json")]
    assert suite[2:] == expected
    (tune,) = gpu_run.commands("tune", 4.0, options)
    assert tune[2:] == ["minids.bench", "--tune", *expected[2:5], "--json", str(tmp_path / "tune.json")]
    assert set(gpu_run.PARTS) == {"tests", *GPU_SUITES, "ladder", "tune"}
    alone, beside = gpu_run.commands("tests", 4.0, options)
    assert alone[2:6] == ["pytest", "-q", "-m", "gpu"] and "tests/test_bench_gpu.py" in alone
    assert {"tests/test_kernels.py", "tests/test_moe_kernels.py", "tests/test_loss_kernels.py"} <= {*beside}
    assert "tests/test_house.py" not in beside and not {*alone[6:]} & {one for one in beside if "/" in one}


def test_without_a_gpu_it_stops_with_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        gpu_run.main([])
    text = capsys.readouterr()
    assert stopped.value.code == 2 and text.out == "" and text.err == "make gpu: torch finds no CUDA GPU here\n"


def test_a_part_is_run_to_its_end(tmp_path, capsys):
    pytest.importorskip("triton")
    assert gpu_run.main(["layers", "--quick", "--out", str(tmp_path)]) == 0
    assert "ran, not timed" in (tmp_path / "layers.log").read_text() and (tmp_path / "layers.json").exists()
