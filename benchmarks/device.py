"""Figures of a search on a GPU, in one command and one JSON object.

    benchmarks/device.sh --output device.json
    benchmarks/device.sh --parts search host --spaces gpt --budget-seconds 200
    WHEELS=wheels benchmarks/device.sh

The command needs a checkout, and a Python with torch 2.11 or later, torchvision, timm, scikit-learn, scipy and pytest.
What else pyproject.toml asks for can come as wheels from the folder `WHEELS`: they are installed into a temporary
folder, without a network and without their dependencies. The package itself need not be installed.

Every part runs in processes of its own and has a time limit, so that one that fails leaves the others: the JSON object
has its reason. Parts are prepared side by side, and those with a clock are measured one after the other. They come by
value, and those for which no time is left are skipped. Without a GPU everything runs on the CPU, which takes
`--sizes tiny`.

| part | what |
| --- | --- |
| search/SPACE/bfloat16 | `search_step`: plain, weight and architecture steps, pad-and-sum, memory |
| search/SPACE/bfloat16/compiled | the same compiled, without pad-and-sum |
| search/SPACE/bfloat16/graphs | the same with each forward and backward as one CUDA graph, without pad-and-sum |
| search/SPACE/tf32 | the same in float32, whose products are rounded as TF32 does it |
| host/SPACE | steps of the search stage: waits for the device, launches, the host's share, Python's functions |
| half | a search of the GPT in float16, whose scaler doubles and halves the scale |
| demo | all stages of the demo, twice, and whether they end with one architecture |
| tests | the tests that need a GPU |
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("search", "discretize", "retrain", "evaluate")
GRACE = 10.0
"""The seconds of the budget that are kept for ending processes and writing the result."""


@dataclass(frozen=True)
class Size:
    """A space as it is measured: its registered name, options, and batch."""

    space: str
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)


SIZES: dict[str, dict[str, Size]] = {
    "full": {
        # 8 x 1,024 tokens; the largest network is a GPT-2 of 124 million parameters.
        "gpt": Size("gpt", 8, {"layers": (8, 10, 12), "block_size": 1024}),
        "autoformer_s": Size("autoformer_s", 128, {"image_size": 224}),
        "mobilenetv3": Size("mobilenetv3", 128, {"image_size": 224}),
    },
    "tiny": {
        "gpt": Size("gpt_nano", 2),
        "autoformer_s": Size("autoformer_nano", 2, {"image_size": 16}),
        "mobilenetv3": Size("mobilenetv3_nano", 2),
    },
}
ROUNDS = {"full": 7, "tiny": 1}


@dataclass(frozen=True)
class Part:
    """A part of the figures, which a process of its own finds.

    Attributes:
        name: The kind, and for some kinds the space and the precision, separated by slashes.
        seconds: The time limit of the preparation, and that of the measurement.
        group: Parts with equal groups are prepared side by side.
        clock: True if nothing else may run while the part is measured. Other parts begin as soon as they are prepared.
    """

    name: str
    seconds: float
    group: str
    clock: bool = True

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]

    @property
    def space(self) -> str | None:
        """The key of `SIZES`, or None for a part that is of no space."""
        return self.name.split("/")[1] if "/" in self.name else None


def all_parts() -> list[Part]:
    """Return all parts, the most valuable first."""
    spaces = list(SIZES["full"])
    return [
        Part("host/gpt", 120, "first"),
        *(Part(f"search/{space}/bfloat16/graphs", 120, "first") for space in spaces),
        *(Part(f"search/{space}/bfloat16", 120, "second") for space in spaces),
        *(Part(f"search/{space}/bfloat16/compiled", 240, "third") for space in spaces[1:]),
        *(Part(name, 220, "third", clock=False) for name in ("tests", "demo")),  # beside the compilers
        Part("half", 120, "fourth"),
        *(Part(f"search/{space}/tf32", 120, "fourth") for space in reversed(spaces)),
        *(Part(f"host/{space}", 120, "fourth") for space in spaces[1:]),
        Part("search/gpt/bfloat16/compiled", 240, "fifth"),  # nothing waits for this compilation of three minutes
    ]


# --- the parts, each in a process of its own ----------------------------------------------------------------------

Figures = dict[str, Any]
Measure = Callable[[], Figures]


def prepare(name: str, sizes: str, device: str) -> Measure:
    """Import and build what a part needs, and return the function that finds its figures."""
    kind, *rest = name.split("/")
    return {"search": _search, "host": _host, "half": _half, "demo": _demo, "tests": _tests}[kind](sizes, device, *rest)


def _search(sizes: str, device: str, key: str, precision: str, way: str = "") -> Measure:
    from benchmarks.search_step import Bench, computation, figures

    size, space = _space(sizes, key)
    bench: list[Bench] = []

    def make() -> Bench:
        # The tests have no time for a compiler, and a backend that only traces shows that what is traced runs.
        compiled = way == "compiled" and ("inductor" if sizes == "full" else "aot_eager")
        return Bench(
            space.to(device),
            size.batch,
            naive=not way,
            sampled=False,
            computation=computation(precision, compiled),
            repeat=3 if device == "cuda" else 1,
            graphs=way == "graphs" and device == "cuda",  # there are none on a CPU
        )

    if way == "compiled":  # compiling is not to be timed, and three spaces can be compiled side by side
        bench.append(make())
        began = time.perf_counter()
        bench[0].seconds(rounds=1, warmup=1)
        compiling = time.perf_counter() - began
        _empty(device)

    def measured() -> Figures:
        one = bench[0] if bench else make()
        found = figures(one, ROUNDS[sizes])
        found |= {"space": size.space, "options": dict(size.options), "batch": size.batch, "precision": precision}
        return found | ({"compile_seconds": compiling} if way == "compiled" else {})

    return measured


def _host(sizes: str, device: str, key: str) -> Measure:
    from benchmarks.host import watched

    size, space = _space(sizes, key)
    return lambda: watched(space, size.batch, device, steps=ROUNDS[sizes])


def _half(sizes: str, device: str) -> Measure:
    from functools import partial

    from tanglenas_engine import create_optimizer
    from tanglenas_engine.stages.search import search
    from tanglenas_engine.testing import random_data

    low = "float16" if device == "cuda" else "bfloat16"  # the scaler needs a GPU

    def measured() -> Figures:
        import torch

        found: Figures = {"precision": low}
        for precision in ("float32", low):
            size, space = _space(sizes, "gpt")
            space = space.to(device)
            data = random_data(space, ("weights", "architecture", "validation"), samples=2 * size.batch)
            began = time.perf_counter()
            result = search(
                space,
                create_optimizer("drnas"),
                data,
                epochs=8 if sizes == "full" else 2,
                batch_size=size.batch,
                weight_optimizer=partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.05),
                device=device,
                precision=precision,
            )
            found[f"losses_{precision}"] = [row["weight_loss"] for row in result.history]
            found[f"seconds_{precision}"] = time.perf_counter() - began
        pairs = zip(found["losses_float32"], found[f"losses_{low}"], strict=True)
        return found | {"largest_difference": max(abs(one - other) for one, other in pairs)}

    return measured


def _demo(sizes: str, device: str) -> Measure:
    small = ["search.epochs = 1", "search.warmup_epochs = 0", "retrain.epochs = 1", "discretize.candidates = 3"]

    def bindings(stage: str) -> list[str]:
        return [binding for binding in small if sizes == "tiny" and binding.startswith(f"{stage}.")]

    def measured() -> Figures:
        from tanglenas_engine.pipeline.config.params import stage_arguments

        found: Figures = {"stage_seconds": {}}
        with tempfile.TemporaryDirectory() as folder:
            projects = [Path(folder, name) for name in ("first", "second")]
            environment = {**os.environ, "TANGLENAS_DEVICE": device, "MLFLOW_DISABLE_TELEMETRY": "true"}
            environment.pop("DVC_ROOT", None)
            for project in projects:
                for name in ("gin", "pipelines"):
                    shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
                for name in ("dvc.yaml", "params.yaml"):
                    shutil.copy(ROOT / name, project)
                (project / ".dvc").mkdir()  # the place of MLflow's store
            for stage in STAGES:
                arguments = stage_arguments(stage, ROOT / "params.yaml", ROOT / "dvc.yaml")
                command = [sys.executable, "-m", f"pipelines.{stage}", *arguments, *bindings(stage)]
                began = time.perf_counter()
                both = [subprocess.Popen(command, cwd=project, env=environment) for project in projects]
                if codes := [code for code in (one.wait() for one in both) if code]:
                    raise RuntimeError(f"stage {stage} ended with {codes}")
                found["stage_seconds"][stage] = time.perf_counter() - began
            texts = [(project / "out" / "discretize" / "architecture.json").read_text("utf-8") for project in projects]
            found["equal_architectures"] = texts[0] == texts[1]
            found["architecture"] = json.loads(texts[0])
            for name in ("search", "evaluate"):
                found[f"{name}_metrics"] = [
                    json.loads((project / "metrics" / f"{name}.json").read_text("utf-8")) for project in projects
                ]
        return found

    return measured


def _tests(sizes: str, device: str) -> Measure:
    def measured() -> Figures:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
        command += ["-m", "gpu", "tests/training"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        print(done.stdout, done.stderr, file=sys.stderr)
        if done.returncode not in (0, 5 if device == "cpu" else 0):  # 5: no test was chosen
            raise RuntimeError("\n".join(lines[-40:]))
        return {"outcome": lines[-1] if lines else ""}

    return measured


def _space(sizes: str, key: str) -> tuple[Size, Any]:
    import torch

    from tanglenas_engine import create_space

    torch.manual_seed(0)
    size = SIZES[sizes][key]
    return size, create_space(size.space, **size.options)


def _empty(device: str) -> None:
    """Give memory back that a process has no use for while it waits."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()


# --- the command, which starts the parts --------------------------------------------------------------------------


class Running:
    """A process of a part. It waits for a line on its input before it measures."""

    def __init__(self, part: Part, command: Sequence[str], environment: Mapping[str, str], folder: Path):
        stem = part.name.replace("/", "-")
        self.part, self.began = part, time.monotonic()
        self.limit = self.began + part.seconds
        self.seconds = 0.0
        self.result, self.ready, self.log = (folder / f"{stem}.{end}" for end in ("json", "ready", "log"))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--run", part.name, str(folder / stem)],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        """Return True if the process has ended."""
        if self.process.poll() is None:
            self.seconds = time.monotonic() - self.began
            return False
        return True

    def arrived(self) -> bool:
        """Return True if the process has ended, or waits to be measured. End it if its time is over."""
        if self.ended() or (self.part.clock and self.ready.exists()):
            return True
        if time.monotonic() > self.limit:
            self.end()
        return False

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended. End it at the deadline, or when its time is over."""
        while not self.ended():
            if time.monotonic() > min(deadline, self.limit):
                self.end()
            time.sleep(0.05)

    def measure(self) -> None:
        """Let the process measure, unless it has ended before: it failed, or its preparation overran."""
        if self.ended():
            return
        assert self.process.stdin is not None
        self.limit = time.monotonic() + self.part.seconds
        with suppress(BrokenPipeError):  # it fails just now
            self.process.stdin.write(b"\n")
            self.process.stdin.close()

    def end(self) -> None:
        """End the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def outcome(self) -> Figures:
        """Return the figures, or the reason why there are none."""
        found: Figures = {"status": "ok", "seconds": round(self.seconds, 1)}
        if self.process.returncode == 0 and self.result.exists():
            return found | json.loads(self.result.read_text("utf-8"))
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        code = self.process.returncode
        return found | {"status": "overran" if code == -signal.SIGKILL else f"failed: {code}", "log": lines[-40:]}


def run_parts(
    parts: Sequence[Part],
    command: Sequence[str],
    environment: Mapping[str, str],
    deadline: float,
    folder: Path,
) -> Iterator[tuple[Part, Figures]]:
    """Run parts group by group, and yield the figures of each as it ends."""
    for group in dict.fromkeys(part.group for part in parts):
        members = [part for part in parts if part.group == group]
        if time.monotonic() > deadline - GRACE:
            yield from ((part, {"status": "skipped: no time was left"}) for part in members)
            continue
        running = [Running(part, command, environment, folder) for part in members]
        try:
            for one in running:
                if not one.part.clock:
                    one.measure()  # it is read as soon as the part is prepared
            while time.monotonic() < deadline - GRACE and not all([one.arrived() for one in running]):
                time.sleep(0.05)
            for one in running:
                if one.part.clock:
                    one.measure()
                one.wait(deadline - GRACE)
                yield one.part, one.outcome()
        finally:
            for one in running:
                one.end()


def environment_of(folder: Path, wheels: Path | None) -> dict[str, str]:
    """Return environment variables by which this checkout, its plugins and the wheels are importable."""
    paths = [ROOT, ROOT / "plugins"]
    environment = {"KINETO_LOG_LEVEL": "99", **os.environ, "PYTHONUNBUFFERED": "1"}
    if wheels is not None:
        site = folder / "site"
        files = sorted(map(str, wheels.glob("*.whl")))
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, *files], check=True)
        paths.append(site)
    try:
        importlib.metadata.distribution("tanglenas")
    except importlib.metadata.PackageNotFoundError:
        paths.append(_metadata(folder / "metadata"))
    paths += [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return environment | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def _metadata(folder: Path) -> Path:
    """Write the metadata by which the plugins of a checkout are found, as an installation would."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    lines = [f"{plugin} = {module}" for plugin, module in project["entry-points"]["tanglenas"].items()]
    (info / "entry_points.txt").write_text("[tanglenas]\n" + "\n".join(lines) + "\n", "utf-8")
    return folder


def machine(environment: Mapping[str, str]) -> Figures:
    """Return the names and versions of what the figures are of."""
    code = (
        "import json, torch; gpu = torch.cuda.is_available();"
        "print(json.dumps({'device': 'cuda' if gpu else 'cpu', 'torch': torch.__version__,"
        " 'card': torch.cuda.get_device_name() if gpu else None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"torch cannot be used: {done.stderr.strip().splitlines()[-1]}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return found | {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def chosen(parts: Sequence[str], spaces: Sequence[str]) -> list[Part]:
    """Return the parts whose names start with one of `parts`, for these spaces."""
    return [
        part
        for part in all_parts()
        if any(part.name == name or part.name.startswith(f"{name}/") for name in parts)
        and part.space in (None, *spaces)
    ]


def collect(arguments: argparse.Namespace) -> Figures:
    """Run the chosen parts and return everything that is printed."""
    began = time.monotonic()
    deadline = began + arguments.budget_seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = environment_of(folder, arguments.wheels)
        found: Figures = machine(environment)
        sizes = arguments.sizes or ("full" if found["device"] == "cuda" else "tiny")
        found |= {"sizes": sizes, "parts": {}}
        command = [sys.executable, "-m", "benchmarks.device", "--sizes", sizes, "--device", found["device"]]
        for part, figures in run_parts(
            chosen(arguments.parts, arguments.spaces), command, environment, deadline, folder
        ):
            found["parts"][part.name] = figures
            found["seconds"] = round(time.monotonic() - began, 1)
            print(_line(part, figures), file=sys.stderr, flush=True)
            if arguments.output is not None:  # what was found survives an end from outside
                arguments.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def _line(part: Part, figures: Figures) -> str:
    shown = (
        "search_over_plain", "search_over_eager", "peak_memory_over_plain", "naive_over_search", "waits", "host_share",
    )  # fmt: skip
    numbers = [f"{name} {figures[name]:.3g}" for name in shown if isinstance(figures.get(name), int | float)]
    return f"{part.name:36} {figures['status']:10} {figures.get('seconds', '')!s:>6}  {'  '.join(numbers)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(dict.fromkeys(part.kind for part in all_parts()))
    parser.add_argument("--parts", nargs="+", default=kinds, metavar="PART", help="Parts, or the start of their names.")
    parser.add_argument("--spaces", nargs="+", default=list(SIZES["full"]), choices=list(SIZES["full"]))
    parser.add_argument("--sizes", choices=list(SIZES), help="By default full on a GPU, and tiny on a CPU.")
    parser.add_argument("--budget-seconds", type=float, default=460)
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS"), help="A folder of wheels to install.")
    parser.add_argument("--output", type=Path, help="A file for the JSON object, written anew as each part ends.")
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is None:
        arguments.wheels = arguments.wheels and Path(arguments.wheels).resolve()
        print(json.dumps(collect(arguments)))
        return
    name, stem = arguments.run
    measured = prepare(name, arguments.sizes, arguments.device)
    Path(f"{stem}.ready").touch()
    if sys.stdin.readline():  # nothing comes from a command that was ended
        Path(f"{stem}.json").write_text(json.dumps(measured()), "utf-8")


if __name__ == "__main__":
    main()
