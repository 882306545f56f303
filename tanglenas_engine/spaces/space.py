"""Search spaces: models in ordinary form whose dimensions are choices."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import CellType, FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, copied, sliced_state, tied
from tanglenas_engine.elastic.depth import Depth, walk
from tanglenas_engine.elastic.forms import check_foreign, explained
from tanglenas_engine.elastic.parts import reference
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.architectures import Architectures
from tanglenas_engine.spaces.cost import FORMER, Additive, Cost, CostModel
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.mixture import COVERED, EDGES, Mixture, Superposition
from tanglenas_engine.superposition.size import Assignment, Number, Row, Size

if TYPE_CHECKING:
    from tanglenas_engine.data import Dataset, Described


SHARINGS = {
    "superposed": "it says so itself",
    "entangled": "its layers are linear in their weights, so that mixing the outputs of slices is the superposition",
    "separate": "weights of their own for every combination of its options would multiply beyond reason",
}
"""The ways in which options share weights, with the reason why a space may not support each.

"superposed" masks one weight, "entangled" slices one weight, and "separate" has a weight per option.
"""


class _Constructor(type):
    """The constructor of spaces: an error that a foreign layer raises because of a Size becomes a sentence."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            space = super().__call__(*args, **kwargs)
        except (TypeError, TangleNASError) as error:
            if (refusal := explained(error)) is None:
                raise
            raise refusal from error
        check_foreign(space)
        return space

    @property
    def __signature__(cls) -> inspect.Signature:
        """The options of a space are those of its `__init__`, not of the method above."""
        _, *options = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        return inspect.Signature(options)


class SearchSpace(Architectures, Elastic, metaclass=_Constructor):
    """A supernet: a module of elastic layers whose dimensions are declared with `self.choice(...)`.

    A subclass makes its choices and layers in `__init__` and writes an ordinary `forward`. Three methods decide what
    the next forwards compute: `relax` (a mixture), `select` (one architecture) and `release` (the largest network).

    Args:
        relaxation: The way in which a mixture covers the weights: "exact" (default), "gated" or "paper".
        sharing: The way in which options share weights: one of the space's `sharings`.

    Raises:
        TangleNASError: The relaxation or the sharing is unknown, or the space does not support the sharing.
    """

    sharings: ClassVar[tuple[str, ...]] = ("superposed",)
    execute: Callable[..., Tensor] | None = None
    """A function that runs a forward on its inputs. Searches set it for low precision or compilation."""
    created_with: Mapping[str, Any] | None = None
    """The options with which `create_space` made the space; None for a space that was made in another way."""
    _costs: tuple[dict[Any, Any], CostModel] | None = None
    """The ranks of layers for which costs were computed, and the tables."""
    dynamic_axes: Mapping[int, tuple[str, int]] = MappingProxyType({})
    """The axes of the input, beside the batch's axis 0, whose length may vary: the name and the largest length.

    `example_input` has the largest lengths.
    """
    output_layer: str = ""
    """The name of the module whose outputs are the classes. Weights to start from may have another one."""
    scratch_warning: str = ""
    """A sentence with which a training from scratch warns, or "" for none."""
    trained_on: Mapping[str, Any] = MappingProxyType({})
    """How the images were made on which weights that the space brings along were trained: `mean`, `std` and more, as in
    the `pretrained_cfg` of timm's models. It is empty where nothing is known."""

    def __init__(self, *, relaxation: str = "exact", sharing: str = "superposed"):
        super().__init__()
        self.superposition = Superposition()
        self.choices: dict[str, Choice] = {}
        if sharing not in SHARINGS:
            raise unknown("sharing", sharing, SHARINGS)
        if sharing not in self.sharings:
            raise TangleNASError(
                f"{type(self).__name__} cannot do sharing {sharing!r}: {SHARINGS[sharing]}. "
                f"Choose one of: {', '.join(self.sharings)}."
            )
        self.sharing = sharing
        self.relaxation = relaxation

    # Methods for authors of spaces.

    def choice(
        self,
        name: str,
        options: Iterable[Number | str],
        per: Size | Sequence[Size] | Sequence[tuple[Size, int]] | int | None = None,
    ) -> Choice:
        """Declare a choice and return it.

        Args:
            name: The name of the choice.
            options: Distinct positive numbers, or distinct names.
            per: A depth, several depths, pairs of a depth and a layer, or a number of rows, to repeat the choice (see
                `Choice`).

        Raises:
            TangleNASError: The name was declared before, or the options are invalid.
        """
        if name in self.choices:
            raise TangleNASError(f"choice {name!r} is declared twice in {type(self).__name__}")
        self.choices[name] = Choice(name, options, self.superposition, per)
        return self.choices[name]

    def example_input(self, batch: int) -> Tensor:
        """Return a random batch with the right shape and data type."""
        raise NotImplementedError(f"{type(self).__name__} must say what its input looks like: example_input(batch)")

    def standalone(self, architecture: Architecture) -> nn.Module:
        """Return the newly initialised network of an architecture, with the supernet's parameter names.

        By default it has this class' forward and plain torch layers. Spaces built from timm parts return timm's model.
        """
        return self._standalone(self.assignment_of(architecture))

    def export(
        self, network: nn.Module, architecture: Architecture, folder: Path, dataset: Described | None = None
    ) -> None:
        """Write a standalone network into a folder, in its library's format if there is one.

        By default the folder has `architecture.json`, `model.safetensors`, and a `config.json` with the space, its
        options and, under `pretrained_cfg`, how inputs are made and what outputs mean. The files of the dataset, such
        as a tokenizer, lie beside them.

        Args:
            network: The standalone network.
            architecture: Its architecture.
            folder: The folder, which is created if it is missing.
            dataset: The dataset that the network was trained on, or what is known of it.
        """
        from tanglenas_engine.runtime.files import write_atomic
        from tanglenas_engine.runtime.weights import save_weights

        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "architecture.json", architecture.to_json())
        about = {"space": self.name, "architecture": architecture.digest}
        save_weights(folder / "model.safetensors", network.state_dict(), about)
        config: dict[str, Any] = {"space": self.name, "pretrained_cfg": dataset.input_config() if dataset else {}}
        with suppress(TypeError):  # an option may be a function, which JSON cannot hold
            json.dumps(self.created_with)
            config["options"] = self.created_with
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for name, text in (dataset.files() if dataset else {}).items():
            write_atomic(folder / name, text)

    def to_transformers(self, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]] | None:
        """Return a standalone network in the form of transformers, or None for a space that has none there.

        Returns:
            The weights by transformers' names, the content of its `config.json`, and the text of further files by name.
            Those are modules that `trust_remote_code=True` runs, for a network that transformers' own classes cannot
            hold.
        """
        return None

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of another library's network under this space's names, and in its shapes.

        A space overrides this to rename and transpose tensors, or to resample position embeddings. By default the
        weights stay as they are.
        """
        return state

    def source(self, folder: Path) -> nn.Module | None:
        """Return the network of a folder with weights to start from, as its own library builds it, or None.

        Its outputs are compared with those of the largest network. If it has another number of classes, it gets this
        space's head. A space that sees that the outputs would differ raises a TangleNASError, which refuses the folder.
        """
        return None

    def show(self, network: nn.Module, dataset: Dataset) -> str | None:
        """Return text that shows a trained network to a person, such as text that it generates, or None."""
        return None

    @property
    def edge_rows(self) -> list[Row]:
        """The rows whose outputs a mixture may weight: those of the edges in a cell space."""
        return []

    @property
    def untrained(self) -> str:
        """Say which weights of an extracted network no search has trained; "" if all are trained, or all are new."""
        divisor = self.superposition.trained_divisor
        if divisor == 1:
            return ""
        return (
            f"the search trained the supernet with 1/{divisor} of the channels of each operation, and an extracted "
            "network has all of them"
        )

    # What the next forwards compute.

    def __call__(self, *inputs: Tensor) -> Tensor:
        forward = super().__call__
        outputs: Tensor = forward(*inputs) if self.execute is None else self.execute(forward, *inputs)
        return outputs

    @property
    def relaxation(self) -> str:
        """The way in which a mixture covers the weights: a key of `COVERED`."""
        return self.superposition.relaxation

    @relaxation.setter
    def relaxation(self, relaxation: str) -> None:
        if relaxation not in COVERED:
            raise unknown("relaxation", relaxation, COVERED)
        self.superposition.release()
        self.superposition.relaxation = relaxation

    @cached_property
    def stacks(self) -> dict[int, int]:
        """The number of rows for each number of options: the shapes `(rows, options)` of stacked mixing weights."""
        counts: dict[int, int] = {}
        for row in self.rows:
            counts[len(row.options)] = counts.get(len(row.options), 0) + 1
        return counts

    def mixture(self, weights: Mapping[str, Tensor] | Mapping[int, Tensor]) -> Mixture:
        """Return a mixture with the given weights.

        Args:
            weights: Weights by choice, `(options,)` or `(layers, options)`, or stacked by number of options,
                `(rows, options)`.

        Raises:
            TangleNASError: A choice is unknown, a shape is wrong, a row is not on the simplex, or the mixture was made
                by another space.
        """
        by_choice = {name: choice.rows for name, choice in self.choices.items()}
        if isinstance(weights, Mixture):
            if weights.superposition is not self.superposition:
                raise TangleNASError(f"the mixture was made by another space than this {self.label}: make it anew")
            return weights
        if all(isinstance(key, int) for key in weights):
            return Mixture(by_choice, weights)  # type: ignore[arg-type]
        named = {str(key): torch.as_tensor(tensor) for key, tensor in weights.items()}
        edges = named.pop(EDGES, None) if self.edge_rows else None
        for name in named:
            if name not in self.choices:
                raise unknown(f"choice of {self.label}", name, self.choices)
        expected = {name: choice.shape for name, choice in self.choices.items()}
        given = {name: tuple(tensor.shape) for name, tensor in named.items()}
        if edges is not None:
            expected[EDGES], given[EDGES] = (len(self.edge_rows),), tuple(edges.shape)
        for name, shape in expected.items():
            if given.get(name) != shape:
                raise TangleNASError(f"the mixture's {name!r} has shape {given.get(name)}, expected {shape}")
        stacked = {
            count: torch.cat(
                [
                    named[name].reshape(-1, count)
                    for name, choice in self.choices.items()
                    if len(choice.options) == count
                ]
            )
            for count in self.stacks
        }
        for count, stack in stacked.items():
            if bool((stack < 0).any()) or not torch.allclose(stack.sum(1), torch.ones_like(stack[:, 0]), atol=1e-4):
                raise TangleNASError(f"the mixture's rows of {count} options must be non-negative and sum to 1")
        mixture = Mixture(by_choice, stacked)
        if edges is not None:
            mixture.edges = dict(zip(self.edge_rows, edges, strict=True))
        return mixture

    def relax(self, mixture: Mapping[str, Tensor]) -> Self:
        """Take the soft path: make the next forwards compute the expectation over a mixture, in the weights' type."""
        mixed, weight = self.mixture(mixture), next(self.parameters(), None)
        given = [*mixed.stacks.values(), *mixed.edges.values()]
        if weight is not None and any(it.dtype != weight.dtype or it.device != weight.device for it in given):
            mixed = mixed.replaced([it.to(weight) for it in given])
        self.superposition.relax(mixed)
        return self

    def select(self, chosen: Architecture | Mixture) -> Self:
        """Take the hard path: make the next forwards compute one architecture with slices.

        For a mixture, each row takes its heaviest option. If the mixture is one-hot with a gradient (a straight-through
        sample), the gradient reaches it through all parts that the architecture uses, as on the soft path.
        """
        if isinstance(chosen, Architecture):
            self.superposition.select(self.assignment_of(chosen))
            return self
        picks = {count: stack.argmax(1).tolist() for count, stack in chosen.stacks.items()}
        learns = any(stack.requires_grad for stack in chosen.stacks.values())
        self.superposition.select(
            {row: picks[len(row.options)][row.slot] for row in self.rows}, chosen if learns else None
        )
        return self

    def release(self) -> Self:
        """Make the next forwards compute the largest network. Alternative operations are added up."""
        self.superposition.release()
        return self

    @contextmanager
    def as_largest(self) -> Iterator[Self]:
        """Compute the largest network in eval mode inside the block, and restore path and mode afterwards."""
        training = {module: module.training for module in self.modules()}
        with self.superposition.restored():
            self.release().eval()
            try:
                yield self
            finally:
                for module, mode in training.items():
                    module.training = mode

    def one_hot(self, architecture: Architecture) -> Mixture:
        """Return the corner of an architecture: the mixture with all weight on it."""
        assignment = self.assignment_of(architecture)
        place = reference(self)
        stacks = {}
        for count in self.stacks:
            picks = torch.tensor([assignment[row] for row in self.rows if len(row.options) == count])
            stacks[count] = nn.functional.one_hot(picks, count).to(place)
        return self.mixture(stacks)

    # Standalone networks.

    def extract(self, architecture: Architecture) -> nn.Module:
        """Return the standalone network of an architecture with the supernet's weights, in the supernet's mode.

        It has all of its channels, also where a search with partial channels trained a share of them (`untrained`).
        """
        place = reference(self)
        network = self.standalone(architecture).to(place.device, place.dtype)
        network.load_state_dict(self.inherited(architecture))
        return network.train(self.training)

    def inherited(self, architecture: Architecture) -> dict[str, Tensor]:
        """Return the slices of the supernet's weights for an architecture, as its standalone network's `state_dict`."""
        assignment = self.assignment_of(architecture)
        names = self._names(assignment)
        return {
            _joined(names[name], key): value
            for name, module, _ in walk(self)
            if name in names
            for key, value in sliced_state(module, assignment).items()
            if key not in module._non_persistent_buffers_set
        }

    def _names(self, assignment: Assignment) -> dict[str, str]:
        """Return the names in the network of an architecture of all modules that it has, by their names here.

        Layers of a network are numbered without those that it lacks.
        """
        names: dict[str, str] = {}
        numbers: dict[str, str] = {}
        for name, module, gates in walk(self):
            if not all(gate.value(assignment) for gate in gates):
                continue
            parent, _, key = name.rpartition(".")
            names[name] = _joined(names.get(parent, ""), numbers.get(name, key))
            if isinstance(module, Depth):
                numbers |= {_joined(name, k): str(number) for number, k in enumerate(module.kept(assignment))}
        return names

    # Cost.

    @property
    def cost_model(self) -> CostModel:
        """The tables from which costs are computed. They are computed anew after layers were put in order."""
        if self._costs is None or self._costs[0] != self.superposition.ranks:
            with self.as_largest():
                model = CostModel(self, self.superposition, self.example_input, self.decisions)
            self._costs = dict(self.superposition.ranks), model
        return self._costs[1]

    def cost(self, architecture: Architecture) -> Cost:
        """Return the exact cost of an architecture as ints: parameters, and multiply-accumulates for one input."""
        return self.assigned_cost(self.assignment_of(architecture))

    def assigned_cost(self, assignment: Assignment) -> Cost:
        return self.cost_model.cost(assignment)

    def expected_cost(self, mixture: Mapping[str, Tensor]) -> Cost:
        """Return the expectation of `cost` over the architectures of a mixture: float64 scalars, differentiable.

        Architectures are drawn as `sample` draws them by the mixture's scores. Most spaces decide each row by itself,
        by its weights. In `darts`, the edges into a node are decided together: a cell of its supernet has 14 edges, and
        8 of an architecture's cell count.
        """
        mixed = self.mixture(mixture)
        return Cost(**{metric: self.expectation_of(terms, mixed) for metric, terms in self.cost_model.metrics.items()})

    def terms(self, metric: str) -> Additive:
        """Return the tables over rows of choices for a metric of `cost.METRICS`."""
        return self.cost_model.metrics[FORMER.get(metric, metric)]

    def _standalone(self, assignment: Assignment) -> nn.Module:
        """Return a module with this class' methods over plain layers. It has no choices and needs no search space."""
        network = copied(self, assignment)
        for attribute in ("superposition", "choices", "_costs", "stacks", "_decided", "execute", "created_with"):
            network.__dict__.pop(attribute, None)
        network.__class__ = _network_class(type(self))
        # Copying makes several modules of one with several names, and unties weights.
        names, called = self._names(assignment), dict[nn.Module, list[str]]()
        for name, module, _ in walk(self):
            if name in names:
                called.setdefault(module, []).append(names[name])
        modules = {name for name, _ in network.named_modules(remove_duplicate=False)}
        for own in called.values():
            for other in (present := [name for name in own if name in modules])[1:]:
                network.set_submodule(other, network.get_submodule(present[0]))
        self._tie(network, assignment)
        return network

    def _tie(self, network: nn.Module, assignment: Assignment) -> None:
        """Tie parameters of an architecture's network that are tied here. Copying untied them."""
        names, there = self._names(assignment), dict(network.named_parameters())
        for group in tied(self):
            parts = [name.rpartition(".") for name in group]
            places = [(names[owner], key) for owner, _, key in parts if owner in names]
            tied_here = [place for place in places if _joined(*place) in there]
            for owner, key in tied_here[1:]:
                setattr(network.get_submodule(owner), key, there[_joined(*tied_here[0])])


def _network_class(space: type[SearchSpace]) -> type[nn.Module]:
    """Return a class with the methods of a space's class, and of those that it extends, that is no search space."""
    made: type[nn.Module] = Elastic
    for base in reversed(space.__mro__[: space.__mro__.index(SearchSpace)]):
        cell = CellType()

        def own(value: Any, cell: CellType = cell) -> Any:
            """Return a method whose `super()` is the network's."""
            if isinstance(value, classmethod | staticmethod):
                return type(value)(own(value.__func__))
            if isinstance(value, property):
                return property(own(value.fget), own(value.fset), own(value.fdel), value.__doc__)
            if not isinstance(value, FunctionType) or "__class__" not in value.__code__.co_freevars:
                return value
            cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)) | {"__class__": cell}
            closure = tuple(cells.values())
            method = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
            method.__kwdefaults__ = value.__kwdefaults__
            return method

        left = {k: own(v) for k, v in vars(base).items() if k not in ("__init__", "__dict__", "__weakref__")}
        cell.cell_contents = made = type(f"{base.__name__}Network", (made,), left)
    return made


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
