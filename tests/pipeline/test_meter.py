"""What a stage costs, over all processes that it took."""

import subprocess
import sys

import pytest

from tanglenas_engine.pipeline.meter import Meter
from tanglenas_engine.runtime import distributed


def test_a_stage_that_goes_on_adds_its_time_and_keeps_the_highest_peak():
    meter = Meter()
    first = meter.read()
    assert 0 <= first["seconds"] < 60 and first["peak_memory_MiB"] > 10
    meter.go_on({"seconds": 1000.0, "processor_seconds": 500.0, "peak_memory_MiB": 10.0**6})
    again = meter.read()
    assert 1000 <= again["seconds"] < 1060 and 500 <= again["processor_seconds"] < 560
    assert again["peak_memory_MiB"] == 10**6


def test_the_work_of_a_stage_is_what_lies_between_its_start_and_its_result():
    meter = Meter()
    assert "work_seconds" not in meter.read()
    meter.begin()
    meter.go_on({"work_seconds": 100.0, "work_processor_seconds": 50.0})
    meter.end()
    ended = meter.read()
    assert 100 <= ended["work_seconds"] < 160 and 50 <= ended["work_processor_seconds"] < 60
    sum(range(10**6))
    assert meter.read()["work_processor_seconds"] == ended["work_processor_seconds"]


def test_the_processors_of_all_ranks_count(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 11.0, 13.0])  # made, begun, read, ended, read
    monkeypatch.setattr("tanglenas_engine.pipeline.meter._processor_seconds", lambda: next(times))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda own: [own[0] + 30, own[1] + 29])
    meter = Meter()
    meter.begin()
    running = meter.read()  # the others are not known yet
    assert (running["processor_seconds"], running["work_processor_seconds"]) == (12, 8)
    meter.end()
    ended = meter.read()  # this rank goes on alone
    assert (ended["processor_seconds"], ended["work_processor_seconds"]) == (43, 39)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "3"])
def test_numbers_that_no_meter_gave_are_refused(value):
    with pytest.raises((ValueError, TypeError)):
        Meter().go_on({"seconds": value})


def test_a_child_that_still_runs_counts_once():
    busy = "import time\nwhile time.process_time() < 0.6: pass\nprint('done', flush=True)\ninput()"
    meter = Meter()
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        used = meter.read()["processor_seconds"]
        child.communicate(b"\n")
    assert 0.6 <= used and meter.read()["processor_seconds"] < used + 0.5
