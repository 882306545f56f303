"""A trained network within a budget: ours against Torch-Pruning, FastNAS, uniform shrinking and training from scratch.

    pip install torch-pruning nvidia-modelopt torchprofile==0.0.4      (in an environment of its own)
    python -m benchmarks.compress run vit --data FOLDER_OF_FASHION_MNIST
    python -m benchmarks.compress run mobilenetv3 --data FOLDER_OF_FASHION_MNIST
    python -m benchmarks.compress run gpt --data TINYSHAKESPEARE.txt
    python -m benchmarks.compress table benchmarks/results/compress_vit.jsonl

`run` trains the largest network of a space with every seed. Each method then makes a smaller network of the same
weights for every budget, which is fine-tuned and tested. All methods get the same splits and the same recipe of
fine-tuning, and one counter says what a network costs. Networks are scored on the `architecture` split, on which
nothing is trained, and tested on the test split, by which nothing is chosen. All times are of the processor.

Each result is a line of the file, so a study that is cut off goes on where it was. What a peer cannot do is a line,
too, with its error.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks import peers
from tanglenas_engine import (
    Architecture,
    SearchSpace,
    cosine,
    create_dataset,
    create_objective,
    create_optimizer,
    create_space,
    cross_entropy,
    discretize,
    load_pretrained,
    make_splits,
    search,
)
from tanglenas_engine.data import DataView, Stream, held
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.runtime.weights import save_weights, weights_metadata
from tanglenas_engine.spaces.layers import order_layers
from tanglenas_engine.spaces.products import count_products
from tanglenas_engine.spaces.units import order_units, taylor
from tanglenas_engine.stages.retrain import Retraining
from tanglenas_engine.training.measure import measure, random_inputs, recalibrate, running_statistics
from tanglenas_engine.training.options import Computation, Session

RESULTS = Path(__file__).parent / "results"
BATCH = 64
ORDER_BATCHES = 8
"""Batches of the weights split by which units and layers are put in order, and whose gradients Taylor scores take."""
CANDIDATES = {"search": 150, "direct": 300}
"""Candidates that are judged after a search, and without one."""
JUDGED = 64
"""Samples of the first look at a candidate."""
RATE = 0.004
"""The largest learning rate of AdamW in the training of the largest network."""
SEARCH_RATE = 0.002
"""The same for the weights of the supernet, which start from the trained network."""
STATISTICS = 2
"""Batches of 256 inputs that set the statistics of batch norms anew."""
PERMUTED = 1e-5
"""The largest difference between the outputs of the largest network before and after its units are permuted."""


@dataclass(frozen=True)
class Task:
    """A network, its data and its budgets.

    Attributes:
        options: The options of the space; its largest network is the one to compress.
        place: The option of the dataset that says where its files are, or None for data that need no files.
        samples: The numbers of samples to train on, to score on, to validate on and to test on.
        epochs: The epochs of the whole training, of the fine-tuning, and of the search of ours.
        rate: The largest learning rate after the compression, for all methods: the one of 0.002, 0.004 and 0.008 with
            the smallest validation loss, on average over a network of ours and one of Torch-Pruning at 30 %, with a
            seed outside of the study.
        cost: "macs" or "params".
        budgets: Shares of the cost of the largest network.
        by_class: Whether the samples of a split come class by class, as those of a folder do. A part of them is then
            drawn at random.
    """

    space: str
    dataset: str
    options: dict[str, Any]
    place: str | None
    samples: tuple[int, int, int, int]
    epochs: tuple[int, int, int] = (6, 1, 1)
    rate: float = 0.004
    cost: str = "macs"
    budgets: tuple[float, ...] = (0.7, 0.5, 0.3)
    by_class: bool = False


IMAGES = (6000, 512, 1000, 5000)
VIT = {
    "weight_init": "jax",  # that of the stored results
    "embed_dim": (32, 40, 48, 56, 64),
    "depth": (2, 3, 4),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratio": (0.5, 1, 1.5, 2, 3, 4),
}
MOBILENET = {"depth": (1, 2), "kernel_size": (3, 5), "expand_ratio": (1, 2, 3, 4, 5, 6)}
# The rates of the tasks on folders of CIFAR-10 are those of the tasks on Fashion-MNIST: nothing was chosen there.
TASKS = {
    "vit": Task("autoformer_nano", "fashion_mnist", {"patch_size": 7, **VIT}, "root", IMAGES),
    "vit_cifar10": Task("autoformer_nano", "image_folder", {"patch_size": 8, **VIT}, "root", IMAGES, by_class=True),
    "mobilenetv3": Task(
        "mobilenetv3_nano", "fashion_mnist", MOBILENET, "root", (3000, 256, 1000, 3000), epochs=(8, 2, 1), rate=0.008,
    ),
    "mobilenetv3_cifar10": Task(
        "mobilenetv3_nano", "image_folder", MOBILENET, "root", (6000, 256, 1000, 3000), epochs=(6, 1, 1), rate=0.008,
        by_class=True,
    ),
    "gpt": Task(
        "gpt_nano", "text",
        {"bias": True, "embed_dim": (32, 40, 48, 56, 64), "mlp_ratio": (0.5, 1, 1.5, 2, 3, 4)},
        "root", (2000, 256, 500, 500), cost="params", budgets=(0.5,),
    ),
}  # fmt: skip


class Study:
    """A task in progress: its data, its trained networks, and the file of results.

    Attributes:
        scored: The networks that FastNAS has scored for its sensitivities, and the seconds that took, by seed.
    """

    def __init__(self, name: str, path: Path, data: str | None = None, threads: int = 1, weights: Path | None = None):
        torch.set_num_threads(threads)
        self.name, self.task, self.path = name, TASKS[name], path
        place = {self.task.place: data} if self.task.place else {}
        self.dataset = create_dataset(self.task.dataset, **place)
        self.data = self._data()
        space = self.space()
        self.largest = self.cost(space.standalone(space.largest()))
        self.weights = weights or Path(tempfile.mkdtemp(prefix="compress"))
        self.weights.mkdir(parents=True, exist_ok=True)
        self.scored: dict[int, tuple[int, float]] = {}
        self.sensitivities = Path(tempfile.mkdtemp(prefix="fastnas"))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.done: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def _data(self) -> DataView:
        """Return all splits. Networks are trained on `training`, which is `weights`; nothing else trains."""
        splits = make_splits(self.dataset, seed=0)
        names = ("weights", "architecture", "validation", "test")
        of = {name: splits.indices(name) for name in names}
        if self.task.by_class:
            generator = torch.Generator().manual_seed(0)
            of = {name: one[torch.randperm(len(one), generator=generator)] for name, one in of.items()}
        training = torch.cat([of["weights"], of["architecture"]])
        rest = of["validation"]
        train, score, validate, test = self.task.samples
        chosen = {
            "weights": training[:train],
            "training": training[:train],
            "architecture": rest[:score],
            "validation": rest[score : score + validate],
            "test": of["test"][:test],
        }
        # Images are decoded once, here: no method pays for it.
        cpu = torch.device("cpu")
        return DataView(
            {name: held(self.dataset.subset(indices, train=False), 256, cpu) for name, indices in chosen.items()}
        )

    def space(self) -> SearchSpace:
        torch.manual_seed(0)
        return create_space(self.task.space, **{**self.dataset.space_options(), **self.task.options})

    @property
    def example(self) -> Tensor:
        return self.data.weights.batch(torch.arange(1))[0]

    def cost(self, network: nn.Module) -> int:
        """Return a network's multiply-accumulates for one input, or its parameters."""
        if self.task.cost == "params":
            return sum(parameter.numel() for parameter in network.parameters())
        training = network.training
        products = count_products(network.eval(), self.example)
        network.train(training)
        return products

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return the few batches by which units are scored."""
        stream = Stream(self.data.weights, BATCH, seed=seed).start()
        return [next(stream) for _ in range(ORDER_BATCHES)]

    def once(self, key: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a job, which is run if the file lacks it."""
        if key not in self.done:
            line = json.dumps({"key": key, **job()})
            self.done[key] = json.loads(line)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            click.echo(line[:240])
        return self.done[key]

    def train(self, network: nn.Module, epochs: int, rate: float, seed: int) -> dict[str, Any]:
        """Train a network, and measure it on validation and test."""
        start = time.process_time()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            history = Retraining(
                network,
                self.data,
                epochs=epochs,
                batch_size=BATCH,
                optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
                scheduler=partial(cosine, warmup=0.2),
                wrap=None,
                ema=None,
                loss=cross_entropy,
                distillation=None,
                seed=seed,
                computation=Computation(clip=5.0),
                session=Session(device="cpu"),
            ).run()
        seconds = time.process_time() - start
        tested = measure(network, self.data.test)
        return {
            "validation_loss": history[-1]["validation_loss"],
            "test_loss": tested.loss,
            "test_accuracy": tested.accuracy,
            "epochs": epochs,
            "train_seconds": round(seconds, 2),
        }

    def trained(self, seed: int) -> Path:
        """Train the largest network, unless its weights are there, and return their file.

        The file has the result of the training, too, so that every file of results has it.
        """
        path = self.weights / f"{self.name}-{seed}.safetensors"
        if not path.exists():
            space = self.space()
            torch.manual_seed(seed)
            network = space.standalone(space.largest())
            found = self.train(network, self.task.epochs[0], RATE, seed)
            save_weights(path, network.state_dict(), {"result": json.dumps({"cost": self.largest, **found})})
        self.once(f"largest/{seed}", lambda: json.loads(weights_metadata(path)["result"]))
        return path

    def started(self, seed: int) -> SearchSpace:
        """Return the space with the trained weights."""
        space = self.space()
        load_pretrained(space, self.trained(seed))
        return space

    def network(self, seed: int) -> nn.Module:
        """Return the trained network, as a module of timm or torch."""
        space = self.started(seed)
        return space.extract(space.largest())

    def recalibrated(self, network: nn.Module, seed: int) -> nn.Module:
        """Return a copy of a network with the statistics of batch norms that it has itself, in evaluation mode."""
        network = copy.deepcopy(network).eval()
        if running_statistics(network):
            recalibrate(network, random_inputs(self.data.weights, 256, STATISTICS, seed, torch.device("cpu")))
        return network

    def compress(self, method: str, share: float, seed: int) -> dict[str, Any]:
        """Compress the network by a method, and fine-tune what it returns."""
        self.started(seed)  # weights that do not load are an error of the study, and no result of a method
        most = math.floor(share * self.largest)
        start = time.process_time()
        try:
            network, details = METHODS[method](self, most, seed)
        except (peers.MissingError, click.UsageError):
            raise
        except Exception as error:  # what a library cannot do is a result
            return {"failed": f"{type(error).__name__}: {error}"[:500]}
        seconds = time.process_time() - start
        before = measure(self.recalibrated(network, seed), self.data.validation)
        epochs = details.pop("epochs", self.task.epochs[1])
        found = self.train(network, epochs, self.task.rate, seed)
        return {
            "most": most,
            "cost": self.cost(network),
            "share": self.cost(network) / self.largest,
            "before_tuning": before.loss,
            **found,
            "compress_seconds": round(seconds + details.pop("charged_seconds", 0.0), 2),
            **details,
        }


Found = tuple[nn.Module, dict[str, Any]]


def ordered(study: Study, seed: int) -> tuple[SearchSpace, dict[str, Any]]:
    """Return the space with the trained weights, its units and layers in order of importance."""
    space = study.started(seed)
    batches = study.batches(seed)
    with torch.no_grad(), space.as_largest():
        before = space.eval()(batches[0][0])
    order_units(space, taylor(space, cross_entropy, batches))
    told = order_layers(space, cross_entropy, batches)
    with torch.no_grad(), space.as_largest():
        difference = float((space.eval()(batches[0][0]) - before).abs().max())
    if difference > PERMUTED:
        raise RuntimeError(f"the largest network's outputs differ by {difference} after its units were permuted")
    return space, {"permuted": difference, "layers": told}


def derived(study: Study, space: SearchSpace, most: int, seed: int, candidates: int, details: dict[str, Any]) -> Found:
    """Judge candidates of the band, and return the best one with the supernet's weights."""
    found = discretize(
        space,
        study.data,
        None,
        method="random",
        candidates=candidates,
        max_macs=most if study.task.cost == "macs" else None,
        max_params=most if study.task.cost == "params" else None,
        recalibration_batches=STATISTICS,
        batch_size=JUDGED,
        seed=seed,
        device="cpu",
    )
    return inherited(study, space, found.architecture, details)


def inherited(study: Study, space: SearchSpace, architecture: Architecture, details: dict[str, Any]) -> Found:
    network = space.release().extract(architecture)
    cost = getattr(space.cost(architecture), study.task.cost)
    if cost != study.cost(network):
        raise RuntimeError(f"the space counts {cost:,} {study.task.cost}, torch {study.cost(network):,}")
    return network, {**details, "architecture": dict(architecture.choices)}


def direct(study: Study, most: int, seed: int) -> Found:
    """Judge candidates with the ordered weights of the trained network, without a search."""
    space, details = ordered(study, seed)
    return derived(study, space, most, seed, CANDIDATES["direct"], details)


def searched(study: Study, most: int, seed: int) -> Found:
    """Train the supernet on samples of the band for a few epochs, and judge candidates then."""
    space, details = ordered(study, seed)
    search(
        space,
        create_optimizer("spos"),
        study.data,
        epochs=study.task.epochs[2],
        batch_size=BATCH,
        weight_optimizer=partial(torch.optim.AdamW, lr=SEARCH_RATE, weight_decay=0.05),
        targets=[Target(create_objective(study.task.cost), value=most)],
        recalibration_batches=STATISTICS,
        seed=seed,
        device="cpu",
    )
    return derived(study, space, most, seed, CANDIDATES["search"], details)


def uniform(study: Study, most: int, seed: int) -> Found:
    """Shrink every choice alike, as far as the budget needs.

    All choices take the largest option of at most a share of their largest. The largest share that fits is taken. Then
    the choices take their next options in turn, as long as the budget allows.
    """
    space, details = ordered(study, seed)
    budget = Budget(space, {study.task.cost: most})
    options = {name: sorted(set(choice.options)) for name, choice in space.choices.items()}

    def at(levels: dict[str, int]) -> Architecture:
        picks = {row: row.options.index(options[row.choice][levels[row.choice]]) for row in space.rows}
        return space.architecture_of(picks)

    def fits(levels: dict[str, int]) -> bool:
        return budget.excess(space.assignment_of(at(levels))) == 0

    for share in np.linspace(1, 0, 101):
        levels = {
            name: max([i for i, one in enumerate(listed) if one <= share * listed[-1] + 1e-9], default=0)
            for name, listed in options.items()
        }
        if fits(levels):
            break
    grown = True
    while grown:
        grown = False
        for name, listed in options.items():
            more = {**levels, name: levels[name] + 1}
            if more[name] < len(listed) and fits(more):
                levels, grown = more, True
    return inherited(study, space, at(levels), details)


def scratch(study: Study, most: int, seed: int, whole: bool) -> Found:
    """Return the architecture that ours found, newly initialised, to be trained as long as fine-tuning or in full."""
    space = study.space()
    keys = [key for key in study.done if key.startswith(f"{OURS}/") and key.endswith(f"/{seed}")]
    ours = [study.done[key] for key in keys if study.done[key].get("most") == most]
    if not ours:
        raise click.UsageError(f"there is no network of {OURS!r} to train from scratch: add it to --methods, in front")
    architecture = space.architecture(**ours[0]["architecture"])
    torch.manual_seed(seed)
    return space.standalone(architecture), {"epochs": study.task.epochs[0 if whole else 1]}


def pruned(study: Study, most: int, seed: int, importance: str) -> Found:
    network, batches = study.network(seed), study.batches(seed)
    return peers.torch_pruning(network, study.example, study.cost, most, batches, importance)


def fastnas(study: Study, most: int, seed: int) -> Found:
    network = study.network(seed)
    count = STATISTICS if running_statistics(network) else 0
    times: list[float] = []

    def score(found: nn.Module) -> float:
        times.append(time.process_time())
        value = -measure(found, study.data.architecture).loss
        times.append(time.process_time())
        return value

    # The sensitivities are measured once for all budgets, and every budget is charged for them: the first one as well,
    # and if the library finds no network for it, the next.
    scored, seconds = study.scored.get(seed, (0, 0.0))
    try:
        network, details = peers.fastnas(
            network,
            study.example,
            study.cost,
            most,
            {"macs": "flops", "params": "params"}[study.task.cost],
            score,
            list(random_inputs(study.data.weights, 256, count, seed=seed, device=torch.device("cpu"))) if count else [],
            str(study.sensitivities / f"{seed}.pth"),
        )
    finally:
        if times:
            study.scored[seed] = scored + len(times) // 2, round(seconds + times[-1] - times[0], 2)
    all_scored, all_seconds = study.scored.get(seed, (0, 0.0))
    return network, {**details, "scored": all_scored, "scoring_seconds": all_seconds, "charged_seconds": seconds}


def longer(study: Study, most: int, seed: int, method: Callable[[Study, int, int], Found]) -> Found:
    """Compress by a method, and fine-tune for the epochs of the search of ours, too."""
    network, details = method(study, most, seed)
    return network, {**details, "epochs": study.task.epochs[1] + study.task.epochs[2]}


OURS = "ours, search"
METHODS: dict[str, Callable[[Study, int, int], Found]] = {
    "ours, search": searched,
    "ours, direct": direct,
    "uniform": uniform,
    "torch-pruning, magnitude": partial(pruned, importance="magnitude"),
    "torch-pruning, taylor": partial(pruned, importance="taylor"),
    "fastnas": fastnas,
    "scratch": partial(scratch, whole=False),
    "scratch, whole training": partial(scratch, whole=True),
}
for _name in ("ours, direct", "uniform", "torch-pruning, magnitude", "torch-pruning, taylor", "fastnas"):
    METHODS[f"{_name}, longer tuning"] = partial(longer, method=METHODS[_name])


@click.group()
def main() -> None:
    """Compress trained networks, by ours and by others."""


@main.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.option("--data", required=True, help="The file or folder of the data.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="The folder of results.")
@click.option("--methods", default=";".join(METHODS), help="Methods, with ; between them.")
@click.option("--budgets", help="Shares of the largest network's cost, with ; between them; by default the task's.")
@click.option("--seeds", default=3)
@click.option("--weights", type=click.Path(path_type=Path), help="A folder that keeps trained networks between runs.")
@click.option("--threads", default=1)
def run(
    task: str,
    data: str,
    out: Path,
    methods: str,
    budgets: str | None,
    seeds: int,
    weights: Path | None,
    threads: int,
) -> None:
    """Train the network, and compress and fine-tune it with each method, budget and seed."""
    study = Study(task, out / f"compress_{task}.jsonl", data, threads, weights)
    shares = tuple(map(float, budgets.split(";"))) if budgets else study.task.budgets
    for seed in range(seeds):
        for share in shares:
            for method in filter(None, methods.split(";")):
                study.once(f"{method}/{share}/{seed}", partial(study.compress, method, share, seed))


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def table(path: Path) -> None:
    """Print the results in the file PATH as a table for each budget, and what ours gains over each method."""
    rows = {row["key"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}
    whole = [row for key, row in rows.items() if key.startswith("largest/")]
    if not whole:
        raise click.UsageError(f"{path} has no largest network: give a file that `benchmarks.compress run` wrote")
    click.echo(
        f"the largest network, {whole[0]['cost']:,}: test loss {_mean(whole, 'test_loss'):.4f}, accuracy "
        f"{_mean(whole, 'test_accuracy'):.1f} %, {_mean(whole, 'train_seconds'):.0f} s, {len(whole)} seeds"
    )
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for key, row in rows.items():
        if not key.startswith("largest/"):
            method, share, seed = key.split("/")
            found.setdefault(share, {}).setdefault(method, {})[seed] = row
    for share, methods in found.items():
        click.echo(f"\n| {100 * float(share):.0f} % | used, % | before tuning | test loss | accuracy, % |", nl=False)
        click.echo(" loss above ours, 95 % | compression, s | with tuning, s |")
        click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for method, seeds in methods.items():
            good = [row for row in seeds.values() if "failed" not in row]
            if not good:
                click.echo(f"| {method} | | | {next(iter(seeds.values()))['failed']} | | | | |")
                continue
            seconds = [row["compress_seconds"] + row["train_seconds"] for row in good]
            click.echo(
                f"| {method} | {100 * _mean(good, 'share'):.0f} | {_mean(good, 'before_tuning'):.3f} "
                f"| {_mean(good, 'test_loss'):.4f} | {_mean(good, 'test_accuracy'):.1f} "
                f"| {_interval([*_differences(methods, method).values()])} | {_mean(good, 'compress_seconds'):.0f} "
                f"| {np.mean(seconds):.0f} |"
            )
    click.echo(f"\n{OURS} against each method, a mean over 50 % and 30 % for each seed:")
    for method in {method: None for methods in found.values() for method in methods if method != OURS}:
        pairs = [_differences(methods, method) for share, methods in found.items() if float(share) <= 0.5]
        seeds = {seed: [pair[seed] for pair in pairs if seed in pair] for pair in pairs for seed in pair}
        if seeds:
            means = [float(np.mean(values)) for values in seeds.values()]
            cases = [value for values in seeds.values() for value in values]
            click.echo(
                f"- {method}: loss above ours by {_interval(means)} (seeds: {len(means)}), "
                f"ours ahead in {sum(value > 0 for value in cases)} of {len(cases)}"
            )


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _differences(methods: dict[str, dict[str, dict[str, Any]]], method: str) -> dict[str, float]:
    """Return by how much the test loss of a method is above that of ours, by the seeds that both have."""
    ours, theirs = methods.get(OURS, {}), methods.get(method, {})
    good = [seed for seed in theirs if "test_loss" in theirs[seed] and "test_loss" in ours.get(seed, {})]
    return {seed: theirs[seed]["test_loss"] - ours[seed]["test_loss"] for seed in good} if method != OURS else {}


def _interval(values: list[float]) -> str:
    """Return a mean with the half-width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:+.4f}" if values else ""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):+.4f} +- {half:.4f}"


if __name__ == "__main__":
    main()
