"""What the scripts in the folder of a study call."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gin

from tanglenas_engine.errors import print_anything
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.pools import build, record_of
from tanglenas_engine.pipeline.stage import one_sentence
from tanglenas_engine.pipeline.studies import load
from tanglenas_engine.pipeline.studies.page import write_page
from tanglenas_engine.pipeline.studies.run import arguments_of
from tanglenas_engine.pipeline.studies.run_folder import in_run_folder, take_supernet, write_measured
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.files import exclusive
from tanglenas_engine.runtime.fingerprint import fingerprint
from tanglenas_engine.runtime.progress import ConsoleProgress

__all__ = ["build_pool", "compare_runs", "measure_run", "stage_of", "take_supernet"]


@contextmanager
def stage_of(arm: str, seed: str, stage: str, share: bool = True) -> Iterator[list[str]]:
    """Enter the folder of a run until the block ends, and give the arguments of a stage there.

    A TangleNASError or an interruption ends the process with one sentence and a status other than 0. With
    TANGLENAS_NPROC the script runs in that many processes, which share the stage.

    Args:
        share: True runs the stage in TANGLENAS_NPROC processes.
    """
    print_anything()
    with one_sentence(stage):
        if share:
            distributed.relaunch("pipelines.run", [arm, seed, stage])
        with distributed.process_group(), in_run_folder(arm, seed):
            if distributed.rank() == 0:
                print(f"{stage} of {arm}, seed {seed}")
            yield arguments_of(stage)


def measure_run(arm: str, seed: str) -> None:
    """Measure a run as its study says, and write the file of its measurements."""
    print_anything()
    with one_sentence("measure"), in_run_folder(arm, seed) as entry:
        print(f"measure of {arm}, seed {seed}")
        write_measured(entry, load(entry.study).measure(entry))


def build_pool(count: int, budget: float | None, seeds: int = 1) -> None:
    """Train random networks that cost up to a share of the largest, and write pool/pool.csv with its record.

    Each network is trained with so many seeds.

    DVC empties the folder pool/ before a stage runs. So the trainings are kept below .tanglenas/ until the pool is
    complete, and a pool that is cut off goes on.
    """
    print_anything()
    out = Path("pool").resolve()
    with one_sentence("pool"), in_run_folder("pool", "0") as entry:
        arguments = arguments_of("retrain")
        with configured(arguments):
            config = gin.config_str()
        # Code and versions count, as in other stages: a pool of other ones is trained anew.
        environment = (entry.root / "environment.json").read_text("utf-8")
        identity = fingerprint(arguments=arguments, budget=budget, config=config, environment=environment)
        kept = entry.root / ".tanglenas" / "pools" / identity
        kept.mkdir(parents=True, exist_ok=True)
        with exclusive(kept / "lock"):
            table = kept / "pool.csv"
            build(table, count=count, seeds=seeds, share=budget, progress=ConsoleProgress())
            out.mkdir(exist_ok=True)
            for file in (table, record_of(table)):
                shutil.copy(file, out)


def compare_runs() -> None:
    """Write the page of the study in the current folder."""
    print_anything()
    with one_sentence("page"):
        print(write_page(Path.cwd()))
