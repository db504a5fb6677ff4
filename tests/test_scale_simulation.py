"""The simulation of replicas agrees with what queueing theory knows."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scale_simulation as simulation


def settings(replicas: int, requests: int) -> argparse.Namespace:
    return argparse.Namespace(replicas=replicas, requests=requests, seed=1)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_engine_that_is_shared_evenly_slows_chats_as_theory_says(load: float) -> None:
    """In M/G/1 with processor sharing the mean slowdown is 1 / (1 - load), whatever the work's distribution."""
    found = simulation.simulate(simulation.Measured(chats=10**6), simulation.Assumed(), load, settings(1, 40_000))
    assert found["mean"] == pytest.approx(1 / (1 - load), rel=0.1)


def test_an_idle_pool_answers_in_the_time_of_the_work_itself() -> None:
    found = simulation.simulate(simulation.Measured(), simulation.Assumed(), 0.01, settings(50, 2000))
    assert found["slowest"] == pytest.approx(1, abs=0.05)


def test_more_load_is_never_faster_and_replicas_grow_with_the_conversations() -> None:
    points = [
        simulation.simulate(simulation.Measured(), simulation.Assumed(), load, settings(50, 8000))
        for load in (0.5, 0.7, 0.9)
    ]
    assert sorted(point["slowest"] for point in points) == [point["slowest"] for point in points]
    plans = [simulation.derive(simulation.Measured(), simulation.Assumed(), points[0], 10**n) for n in (6, 8)]
    assert plans[1]["replicas"] == pytest.approx(100 * plans[0]["replicas"], rel=0.01)
    assert plans[1]["dollars_per_thousand"] == pytest.approx(plans[0]["dollars_per_thousand"], rel=0.01)


def test_each_count_of_conversations_has_the_latencies_of_a_pool_of_its_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--requests", "500", "--replicas", "20", "--step", "0.5", "--json"]
    monkeypatch.setattr(sys, "argv", ["scale_simulation.py", *words])
    simulation.main()
    found = json.loads(capsys.readouterr().out)
    assert found["measured"]["step"] == 0.5
    assert [row["conversations"] for row in found["plan"]] == [10**6, 10**8, 10**10]
    for row in found["plan"]:
        assert row["pool"] == min(row["replicas"], simulation.MOST_REPLICAS)
        assert 0 < row["seconds"] < row["p95_seconds"] < row["slowest_seconds"]
