"""Search spaces: ordinary-looking models whose dimensions are choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, copied, sliced_state, tied
from tanglenas_engine.elastic.depth import walk
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.architectures import Architectures
from tanglenas_engine.spaces.cost import Additive, Cost, CostModel
from tanglenas_engine.superposition.choice import Choice
from tanglenas_engine.superposition.mixture import COVERED, EDGES, Mixture, Superposition
from tanglenas_engine.superposition.size import Assignment, Number, Row, Size

if TYPE_CHECKING:
    from tanglenas_engine.data import Dataset


SHARINGS = {
    "superposed": "it says so itself",
    "entangled": "its layers are linear in their weights, so that mixing the outputs of slices is the superposition",
    "separate": "weights of their own for every combination of its options would multiply beyond reason",
}
"""How options can share weights, and why a space refuses to: one weight of masks, one weight of slices, or none."""


class SearchSpace(Architectures, Elastic):
    """A supernet: a module made of elastic layers over `self.choice(...)`.

    A subclass makes its choices and layers in `__init__` and writes an ordinary `forward`. Which network the
    next forwards compute is set by `relax` (a mixture), `select` (one architecture) or `release` (the largest).

    Args:
        relaxation: How a mixture covers the weights: "exact" (default), "gated" or "paper".
        sharing: How options share weights; a space lists those it can do in `sharings`.
    """

    sharings: ClassVar[tuple[str, ...]] = ("superposed",)
    execute: Callable[..., Tensor] | None = None
    """How forwards run, of the forward and its inputs: a search in low precision, or a compiled one, sets it."""

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

    # What a space author calls.

    def choice(
        self, name: str, options: Iterable[Number | str], per: Size | Sequence[Size] | int | None = None
    ) -> Choice:
        """Declare a choice; `per` makes it for each layer of a depth or of several, or a number of times."""
        if name in self.choices:
            raise TangleNASError(f"choice {name!r} is declared twice in {type(self).__name__}")
        self.choices[name] = Choice(name, options, self.superposition, per)  # type: ignore[arg-type]
        return self.choices[name]

    def example_input(self, batch: int) -> Tensor:
        """A random batch of the right shape and type."""
        raise NotImplementedError(f"{type(self).__name__} must say what its input looks like: example_input(batch)")

    def standalone(self, architecture: Architecture) -> nn.Module:
        """The network of an architecture, newly initialised, with the supernet's parameter names.

        By default this class' own forward over plain torch layers. Spaces on timm parts build timm's model.
        """
        return self._standalone(self.assignment_of(architecture))

    def export(
        self, network: nn.Module, architecture: Architecture, folder: Path, dataset: Dataset | None = None
    ) -> None:
        """Write a standalone network as `architecture.json` and `model.safetensors`, or as its library has it.

        Args:
            dataset: What it was trained on, for libraries that keep how inputs are made with the weights.
        """
        from tanglenas_engine.runtime.files import write_atomic
        from tanglenas_engine.runtime.weights import save_weights

        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "architecture.json", architecture.to_json())
        save_weights(folder / "model.safetensors", network.state_dict(), {"space": self.name})

    def show(self, network: nn.Module, dataset: Dataset) -> str | None:
        """What a person would like to see of a trained network at the end, such as text that it writes."""
        return None

    @property
    def edge_rows(self) -> list[Row]:
        """The rows whose outputs a mixture may weigh: those of the edges in a cell space."""
        return []

    # Which network the next forwards compute.

    def __call__(self, *inputs: Tensor) -> Tensor:
        forward = super().__call__
        outputs: Tensor = forward(*inputs) if self.execute is None else self.execute(forward, *inputs)
        return outputs

    @property
    def relaxation(self) -> str:
        return self.superposition.relaxation

    @relaxation.setter
    def relaxation(self, relaxation: str) -> None:
        if relaxation not in COVERED:
            raise unknown("relaxation", relaxation, COVERED)
        self.superposition.release()
        self.superposition.relaxation = relaxation

    @cached_property
    def stacks(self) -> dict[int, int]:
        """For each number of options, how many rows have that many: the shapes of stacked mixing weights."""
        counts: dict[int, int] = {}
        for row in self.rows:
            counts[len(row.options)] = counts.get(len(row.options), 0) + 1
        return counts

    def mixture(self, weights: Mapping[str, Tensor] | Mapping[int, Tensor]) -> Mixture:
        """A mixture from weights by choice, `(options,)` or `(layers, options)`, or stacked by option count."""
        by_choice = {name: choice.layer_rows for name, choice in self.choices.items()}
        if isinstance(weights, Mixture):
            if weights.superposition is not self.superposition:
                raise TangleNASError(f"the mixture was made by another space than this {self.label}: make it anew")
            return weights
        if all(isinstance(key, int) for key in weights):
            return Mixture(by_choice, weights)  # type: ignore[arg-type]
        named: dict[str, Tensor] = {str(key): tensor for key, tensor in weights.items()}
        edges = named.pop(EDGES, None)
        for name in named:
            if name not in self.choices:
                raise unknown(f"choice of {self.label}", name, self.choices)
        for name, choice in self.choices.items():
            shape = tuple(named[name].shape) if name in named else None
            if shape != choice.shape:
                raise TangleNASError(f"the mixture's {name!r} has shape {shape}, expected {choice.shape}")
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
        """Soft path: the next forwards compute the expectation over a mixture."""
        self.superposition.relax(self.mixture(mixture))
        return self

    def select(self, chosen: Architecture | Mixture) -> Self:
        """Hard path: the next forwards compute one architecture, with real slices.

        Of a mixture every row's heaviest option is taken. If its weights are one-hot with a gradient (a
        straight-through sample), it reaches them through whatever the architecture uses, as it would on the soft path.
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
        """The next forwards compute the largest network; where operations are alternatives, the sum of all."""
        self.superposition.release()
        return self

    @contextmanager
    def as_largest(self) -> Iterator[Self]:
        """Compute the largest network in eval mode within the block; then all is as it was before."""
        mixture, assignment = self.superposition.mixture, self.superposition.assignment
        training = {module: module.training for module in self.modules()}
        self.release().eval()
        try:
            yield self
        finally:
            for module, mode in training.items():
                module.training = mode
            if assignment is not None:
                self.superposition.select(assignment, mixture)
            elif mixture is not None:
                self.superposition.relax(mixture)
            else:
                self.release()

    def one_hot(self, architecture: Architecture) -> Mixture:
        """The corner: the mixture with all weight on one architecture."""
        assignment = self.assignment_of(architecture)
        reference = next(self.parameters())
        stacks = {}
        for count in self.stacks:
            picks = torch.tensor([assignment[row] for row in self.rows if len(row.options) == count])
            stacks[count] = nn.functional.one_hot(picks, count).to(reference)
        return self.mixture(stacks)

    # The network found.

    def extract(self, architecture: Architecture) -> nn.Module:
        """The standalone network of an architecture with the supernet's weights, in the supernet's mode."""
        reference = next(self.parameters())
        network = self.standalone(architecture).to(reference.device, reference.dtype)
        network.load_state_dict(self.inherited(architecture))
        return network.train(self.training)

    def inherited(self, architecture: Architecture) -> dict[str, Tensor]:
        """The supernet's weights that an architecture uses, sliced, as the standalone network's `state_dict`."""
        assignment = self.assignment_of(architecture)
        state: dict[str, Tensor] = {}
        for name, module, gates in walk(self):
            if all(gate.value(assignment) for gate in gates):
                for key, value in sliced_state(module, assignment).items():
                    if key not in module._non_persistent_buffers_set:
                        state[f"{name}.{key}" if name else key] = value
        return state

    # Cost.

    @cached_property
    def cost_model(self) -> CostModel:
        return CostModel(self, self.superposition, self.example_input)

    def cost(self, architecture: Architecture) -> Cost:
        """Return the exact parameters and multiply-accumulates for one input of an architecture, as ints."""
        return self.assigned_cost(self.assignment_of(architecture))

    def assigned_cost(self, assignment: Assignment) -> Cost:
        return self.cost_model.cost(assignment)

    def expected_cost(self, mixture: Mapping[str, Tensor]) -> Cost:
        """The expectation of `cost` over independent rows: float64 scalars, differentiable.

        It counts what the supernet has. Where not every assignment is an architecture (the two edges of a node in
        `darts`) that is more than architectures have: between the corners each of the 14 edges counts with the
        probability of its operations other than `none`, so the uniform mixture has 12.25 edges to a cell, not 8.
        """
        return self.cost_model.expected(self.mixture(mixture))

    def terms(self, metric: str) -> Additive:
        """A metric of `cost.METRICS` as its tables over rows of choices."""
        return self.cost_model.metrics[metric]

    def _standalone(self, assignment: Assignment) -> nn.Module:
        """This class' methods over plain layers, without its choices: a module that needs no search space."""
        own: dict[str, Any] = {}
        for base in reversed(type(self).__mro__[: type(self).__mro__.index(SearchSpace)]):
            own.update({k: v for k, v in vars(base).items() if k not in ("__init__", "__dict__", "__weakref__")})
        network = copied(self, assignment)
        for attribute in ("superposition", "choices", "cost_model", "stacks", "execute"):
            network.__dict__.pop(attribute, None)
        network.__class__ = type(f"{type(self).__name__}Network", (Elastic,), own)
        there = dict(network.named_parameters())  # a copy has one of its own in each place
        for names in tied(self):
            present = [name for name in names if name in there]
            for name in present[1:]:
                owner, _, key = name.rpartition(".")
                setattr(network.get_submodule(owner), key, there[present[0]])
        return network
