"""How the lessons time: in turns, the median, after a round that is thrown away."""

import gc
import time

import pytest

from minids.lab import machine


def test_a_race_runs_in_turns_and_gives_the_median_of_all_but_the_first_round(monkeypatch):
    now, calls = [0.0], []
    durations = {"a": iter([50, 1, 2, 9]), "b": iter([70, 4, 4, 4])}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def runner(name):
        def run():
            calls.append(name)
            now[0] += next(durations[name])

        return run

    assert machine.race({name: runner(name) for name in "ab"}, rounds=3) == {"a": 2, "b": 4}
    assert "".join(calls) == "abababab" and gc.isenabled()


def test_a_race_that_breaks_leaves_the_collector_on():
    with pytest.raises(ZeroDivisionError):
        machine.race({"broken": lambda: 1 / 0})
    assert gc.isenabled()
