"""Stages that are killed and run again: does what they leave equal, byte for byte, what they leave undisturbed?

    python tests/support/kills.py 100 --seed 0      # `make soak`

A stage runs as it does in `dvc repro`, by its `main`, in a process of its own; one that has imported torch already
forks it. Kills come at a random moment, in the middle of an operation on a file (an open, a rename, ...), or a random
while after one, which is inside a write. The same command is run again until it ends.
"""

import argparse
import functools
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forked import server
from paths import ROOT
from project import contents
from stages import MAIN

# Each is small enough to end in about a second.
SPACES = {
    "autoformer_nano": ["create_space.embed_dim = (8, 16)", "create_space.depth = (1, 2)"],
    "nb201": ["create_space.channels = 4", "create_space.cells = 1"],
    "toy_cell": ["create_space.channels = 4"],
    "gpt_nano": [
        "create_space.embed_dim = (8, 16)", "create_space.layers = (1, 2)",
        "create_dataset.characters = 20000", "create_dataset.block_size = 16",
    ],
}  # fmt: skip
SHORT = ["search.epochs = 2", "search.batch_size = 256", "search.checkpoint_every = 1"]
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Case:
    """A stage, and all bindings it runs with."""

    stage: str
    space: str
    optimizer: str
    bindings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.stage, self.space, self.optimizer, *self.bindings))

    @functools.cached_property
    def arguments(self) -> list[str]:
        names = {"SPACE": self.space, "DATASET": "stdlib_text" if self.space == "gpt_nano" else "digits", "SEED": 3}
        if self.stage == "search":
            names["OPTIMIZER"] = self.optimizer
        if self.stage == "search":
            small = SHORT
        elif self.stage == "retrain":
            small = [binding.replace("search", "retrain") for binding in SHORT]
        else:
            small = []
        return [
            f"gin/stages/{self.stage}.gin",
            *(f"{name} = {value!r}" for name, value in names.items()),
            *SPACES[self.space],
            *small,
            *self.bindings,
        ]


def searches(optimizers: Iterable[str]) -> list[Case]:
    strategies = ("search.strategy = 'simultaneous'",)
    cases = [Case("search", space, optimizer) for space, optimizer in itertools.product(SPACES, optimizers)]
    return [*cases, Case("search", "autoformer_nano", "drnas", strategies)]


EMA = "timm.utils.ModelEmaV3"
LATER = [
    Case("retrain", "autoformer_nano", "drnas"),
    Case("retrain", "nb201", "drnas", ("retrain.mode = 'finetune'", f"retrain.ema = @{EMA}")),
    Case("discretize", "autoformer_nano", "spos", ("discretize.candidates = 6",)),
    Case("discretize", "nb201", "drnas"),
    Case("evaluate", "autoformer_nano", "drnas"),
]


@dataclass(frozen=True)
class Kill:
    """A signal `delay` seconds after the stage began its n-th operation on a file, or began at all.

    Without delay it comes before the operation does anything.
    """

    operation: int | None
    delay: float
    number: signal.Signals = signal.SIGKILL


def _child(
    project: str,
    case: Case,
    kill: Kill | None,
    limit: tuple[int, int] | None,
    environment: Mapping[str, str],
    record: str | None,
) -> None:
    """Run a stage here, and send this process a signal as `kill` says."""
    os.chdir(project)
    for name in [name for name in os.environ if re.match("DVC_|MLFLOW_|TANGLENAS_|INTERRUPT", name)]:
        del os.environ[name]
    os.environ.update(TANGLENAS_TRACKING="off", **environment)
    log = os.open(f"{project}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if limit is not None:
        resource.setrlimit(limit[0], (limit[1], limit[1]))
    torch.set_num_threads(1)
    operations: list[str] = []

    def watch(event: str, args: tuple) -> None:
        if event in CHANGES or (event == "open" and _writes(args[1], args[2])):
            operations.append(f"{event} {args[0]!s}".replace(project, "."))
            if kill is not None and len(operations) == kill.operation:
                if kill.delay:  # the default action of SIGALRM ends a process as SIGKILL does: no handler runs
                    signal.setitimer(signal.ITIMER_REAL, kill.delay)
                else:
                    os.kill(os.getpid(), kill.number)

    sys.addaudithook(watch)
    MAIN[case.stage](case.arguments)
    if record:
        Path(record).write_text("\n".join(operations[:]))


def _writes(mode: str | None, flags: int) -> bool:
    return bool(set("wxa+") & set(mode)) if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))


def play(
    project: Path,
    case: Case,
    kill: Kill | None = None,
    *,
    limit: tuple[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
    record: Path | None = None,
    wait: bool = True,
) -> Any:
    """Run the stage once, for its exit status, negative for a signal; what it prints goes to `<project>.log`.

    Args:
        limit: Of a resource, as `resource.setrlimit` has it.
        record: A file for the operations on files, one a line.
        wait: Otherwise the process is returned, which still runs.
    """
    arguments = (str(project), case, kill, limit, dict(environment or {}), record and str(record))
    process = server().Process(target=_child, args=arguments)
    process.start()
    if not wait:
        return process
    if kill is not None and kill.operation is None:
        process.join(kill.delay)
        process.kill()
    process.join()
    status = process.exitcode
    process.close()
    return status


@dataclass
class Undisturbed:
    """What a case leaves in a project, how long it takes, and its operations on files."""

    before: Path
    after: dict[str, bytes]
    seconds: float
    operations: list[str]


def lay_out(folder: Path) -> Path:
    shutil.copytree(ROOT / "gin", folder / "gin")
    return folder


class Theatre:
    """Plays cases with kills, in folders below `folder`. What a case starts from is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._undisturbed: dict[Case, Undisturbed] = {}

    def copy(self, project: Path) -> Path:
        return Path(shutil.copytree(project, self.folder / str(next(self._numbers)) / "project"))

    def undisturbed(self, case: Case) -> Undisturbed:
        if case not in self._undisturbed:
            if case.stage == "search":
                before = lay_out(self.folder / str(next(self._numbers)) / "project")
            else:
                before = self._after(self._earlier(case))
            project = self.copy(before)
            record = project.with_suffix(".operations")
            start = time.monotonic()
            status = play(project, case, record=record)
            seconds = time.monotonic() - start
            assert status == 0, f"{case} ends with {status}:\n{Path(f'{project}.log').read_text()}"
            operations = record.read_text().splitlines()
            self._undisturbed[case] = Undisturbed(before, contents(project), seconds, operations)
        return self._undisturbed[case]

    def _earlier(self, case: Case) -> Case:
        stages = list(MAIN)
        return Case(stages[stages.index(case.stage) - 1], case.space, case.optimizer)

    def _after(self, case: Case) -> Path:
        """A project in which the case was played."""
        whole = self.undisturbed(case)
        project = self.folder / str(next(self._numbers)) / "project"
        for name, content in whole.after.items():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_bytes(content)
        return project

    def random_kills(self, case: Case, generator: random.Random) -> Iterator[Kill]:
        whole = self.undisturbed(case)
        while True:
            operation = generator.randint(1, len(whole.operations))
            yield generator.choice(
                [
                    Kill(None, generator.uniform(0, whole.seconds)),
                    Kill(operation, 0),
                    Kill(operation, generator.uniform(1e-6, 2e-3)),
                ]
            )

    def killed(self, case: Case, kills: Iterable[Kill]) -> "Outcome":
        """Play a case, each kill in a run of its own, until a run ends by itself after the last one."""
        whole = self.undisturbed(case)
        project = self.copy(whole.before)
        done = 0
        for kill in kills:
            status = play(project, case, kill)
            if status == 0:  # it was faster than the kill
                break
            assert status in (-signal.SIGKILL, -signal.SIGALRM), f"{status}:\n{Path(f'{project}.log').read_text()}"
            done += 1
        else:
            status = play(project, case)
        log = Path(f"{project}.log").read_text()
        found = contents(project)
        different = sorted(name for name in whole.after.keys() | found if whole.after.get(name) != found.get(name))
        shutil.rmtree(project.parent)
        return Outcome(done, log.count("resuming at step"), status, different, log)


@dataclass
class Outcome:
    kills: int
    resumes: int
    status: int
    different: list[str]
    log: str = field(repr=False)


def main() -> None:
    from tanglenas_engine.plugins import manager

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    cases = [*searches(manager().names("optimizer")), *LATER]
    generator.shuffle(cases)
    totals: dict[str, Counter[str]] = {}
    start = time.monotonic()
    done = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        theatre = Theatre(Path(folder))
        for case in itertools.cycle(cases):
            if done >= options.kills:
                break
            kills = list(itertools.islice(theatre.random_kills(case, generator), generator.randint(1, 3)))
            outcome = theatre.killed(case, kills)
            done += outcome.kills
            total = totals.setdefault(case.stage, Counter())
            total.update(plays=1, kills=outcome.kills, resumes=outcome.resumes)
            if outcome.status or outcome.different:
                failed += 1
                print(f"NOT EQUAL: {case}, {kills}: {outcome}\n{outcome.log}", flush=True)
            else:
                total["equal"] += 1
            print(f"\r{done} kills, {failed} plays not equal, {time.monotonic() - start:.0f} s", end="", flush=True)
    print()
    for stage, total in totals.items():
        print(f"{stage:<10}", "  ".join(f"{count:>4} {what}" for what, count in total.items()))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
