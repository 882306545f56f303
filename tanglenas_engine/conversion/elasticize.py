"""Search spaces made of ordinary torch modules."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tanglenas_engine.conversion.check import failing_choices
from tanglenas_engine.conversion.dimensions import DATA, Atom, Dim, length, resolved
from tanglenas_engine.conversion.forms import (
    FORMS,
    Axes,
    FixedProduct,
    Holder,
    Product,
    WidthMean,
    WidthNorm,
    make_elastic,
    method,
)
from tanglenas_engine.conversion.record import BATCHES, DataDependent, Recorder, record
from tanglenas_engine.conversion.rules import Analysis
from tanglenas_engine.conversion.stacks import Layers, find_stacks
from tanglenas_engine.conversion.traced import Reference, Stack, Traced
from tanglenas_engine.elastic.base import Elastic, tied
from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Axis, Size

SHARES: Mapping[str, tuple[float, ...]] = {
    "hidden": (0.25, 0.5, 0.75, 1),
    "heads": (0.25, 0.5, 0.75, 1),
    "residual": (0.5, 0.75, 1),
    "depth": (0.5, 0.75, 1),
}
"""The options of each kind of choice, as shares of the given model's number."""

PRODUCTS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "matmul", "bmm", "mm", "addmm",
    "baddbmm", "einsum", "scaled_dot_product_attention", "bilinear", "mv", "dot", "tensordot", "imatmul",
    "multi_head_attention_forward", "inner", "outer", "addbmm", "chain_matmul", "multi_dot", "vdot", "addmv",
}  # fmt: skip
"""Functions that multiply matrices."""


@dataclass(frozen=True)
class Part:
    """A row of the report: what became a choice, or what did not and why.

    Attributes:
        name: The choice, or the tensor whose dimension stays.
        kind: "hidden", "residual", "heads" or "depth"; "fixed" for a dimension that stays.
        largest: The number in the given model.
        options: The options; for a fixed dimension the number alone.
        reason: The reason for which it stays; empty for a choice.
        tensors: The number of parameters with the dimension.
    """

    name: str
    kind: str
    largest: int
    options: tuple[int, ...]
    reason: str = ""
    tensors: int = 0


@dataclass
class Report:
    """What became a choice, what did not, and why.

    Attributes:
        parts: The rows.
        elastic: The number of parameters in tensors of which at least one dimension varies.
        total: The number of all parameters.
    """

    parts: list[Part] = field(default_factory=list)
    elastic: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """The share of the parameters that are elastic."""
        return self.elastic / max(1, self.total)

    @property
    def choices(self) -> list[Part]:
        return [part for part in self.parts if not part.reason]

    @property
    def fixed(self) -> list[Part]:
        return [part for part in self.parts if part.reason]

    def __str__(self) -> str:
        rows = [("name", "kind", "options", "why it stays")]
        rows += [(part.name, part.kind, " ".join(map(str, part.options)), "") for part in self.choices]
        for reason in dict.fromkeys(part.reason for part in self.fixed):
            first, *others = [part.name for part in self.fixed if part.reason == reason]
            rows.append((f"{first} and {len(others)} more" if others else first, "fixed", "", reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.share:.0%} of {self.total:,} parameters are elastic"])


def tensor_of(output: Any) -> Any:
    """Return the tensor of an output: itself, its `logits`, or its first element."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TangleNASError(f"the model returns a {type(output).__name__}: give `output`, which returns a tensor from it")


class Elasticized(Traced, SearchSpace):
    """A space made of a torch module. `elasticize` makes it.

    Attributes:
        report: What became a choice, what did not, and why.
    """

    report: Report

    def __init__(self, model: nn.Module, example: Tensor, **options: Any):
        super().__init__(**options)
        self._initial: dict[str, tuple[float, float]] = {}
        self.register_buffer("_example", example.detach().clone(), persistent=False)
        for name, parameter in model._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in model._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
        for name, child in model._modules.items():
            self.add_module(name, child)

    def set_initial(self, model: nn.Module) -> None:
        """Take the means and deviations of a model's parameters for the initialisation of networks."""
        self._initial = {
            name: (float(p.detach().mean()), float(p.detach().std(correction=0)))
            for name, p in model.named_parameters()
        }

    def standalone(self, architecture: Architecture) -> nn.Module:
        """Return the newly initialised network of an architecture, a `torch.fx.GraphModule` over plain layers.

        Each parameter is drawn with the mean and the deviation that it has in the given model. So the model's own
        initialisation holds for it.
        """
        network = self.plain(self.assignment_of(architecture))
        there = dict(network.named_parameters())
        for names in tied(self):  # copies of tied weights are tied again
            present = [name for name in names if name in there]
            for name in present[1:]:
                owner, _, key = name.rpartition(".")
                setattr(network.get_submodule(owner), key, there[present[0]])
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and name in self._initial:
                mean, deviation = self._initial[name]
                nn.init.normal_(parameter, mean, deviation) if deviation else nn.init.constant_(parameter, mean)
        return network

    def example_input(self, batch: int) -> Tensor:
        """Return random inputs of the example's shape and type; whole numbers are drawn from the example's."""
        example: Tensor = self._example  # type: ignore[assignment]
        if example.is_floating_point():
            return torch.randn(batch, *example.shape[1:])
        picks = torch.randint(example.numel(), (batch, *example.shape[1:]))
        return example.flatten().cpu()[picks]


def elasticize(
    model: nn.Module,
    example: Tensor,
    *,
    hidden: Sequence[float] = SHARES["hidden"],
    residual: Sequence[float] = SHARES["residual"],
    heads: Sequence[float] = SHARES["heads"],
    depth: Sequence[float] = SHARES["depth"],
    divisor: int = 8,
    fixed: Sequence[str] = (),
    output: Callable[[Any], Any] = tensor_of,
    initial: nn.Module | None = None,
    **options: Any,
) -> Elasticized:
    """Return a search space inside a torch module. Its largest network is the module with its weights.

    The model is run on the example, and every call of a torch function is recorded. Dimensions that must have one size
    become one choice: the hidden units of an MLP, the channels of a residual stream with all that reads and writes it,
    the heads of an attention, the groups of a convolution, the depth of repeated layers. What the recording or the
    rules do not cover stays as it is, and the space's `report` says why. The module itself is not changed.

    Before the space is returned, its largest network is compared with the model, and some of its architectures with the
    networks extracted for them. A choice that fails becomes fixed.

    Inputs have the example's shape, apart from the batch. A convolutional network for other images is another space.

    Args:
        model: The module: one tensor in, one tensor out.
        example: A batch of inputs, such as `torch.randn(2, 3, 224, 224)`, or token ids.
        hidden: The options of sizes inside a block, as shares of the model's sizes. `(1,)` keeps these sizes.
        residual: The same for the widths of residual streams.
        heads: The same for numbers of heads.
        depth: The same for numbers of repeated layers.
        divisor: Sizes are multiples of this number, or of a smaller power of two where there are few entries.
        fixed: Names of choices that stay as they are.
        output: A function that returns a tensor from what the model returns. By default it is the tensor itself, its
            `logits`, or the first element.
        initial: A module of the same kind whose weights say how a network is initialised: each parameter is drawn with
            the mean and the deviation that it has there. By default it is the model.
        options: Options of every space, such as `relaxation`.

    Raises:
        TangleNASError: The module cannot be recorded, does not take the example, or has nothing that can vary.
    """
    _check_model(model, example)
    shares = {"hidden": hidden, "residual": residual, "heads": heads, "depth": depth}
    for kind, listed in shares.items():
        if not listed or any(not 0 < share <= 1 for share in listed):
            raise TangleNASError(f"{kind} is {listed!r}: expected shares of the model's size, such as (0.5, 1)")
    reference = next(model.parameters(), example)
    example = example.detach().to(reference.device)
    recorder, whole = _record(model, example, output)
    refused = dict.fromkeys(fixed, "it is named in `fixed`")
    for _ in range(4):
        builder = _Builder(copy.deepcopy(model), recorder, shares, divisor, refused)
        space = builder.build(example, options)
        space.report.parts[:0] = [Part(name, "fixed", 0, (), reason) for name, reason in whole.items()]
        failing = failing_choices(space, model, output)
        if not failing:
            space.set_initial(model if initial is None else initial)
            return space.train(model.training)
        refused.update(failing)
    raise TangleNASError(
        f"{type(model).__name__} cannot become a space: its architectures differ from the networks extracted for them"
    )


def _check_model(model: nn.Module, example: Tensor) -> None:
    """Refuse modules that a recording would not repeat, and examples that are no batch."""
    if not isinstance(model, nn.Module):
        raise TangleNASError(f"elasticize takes a torch module, got {type(model).__name__}")
    name = type(model).__name__
    if not isinstance(example, Tensor) or example.dim() < 2 or not len(example):
        shape = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"type {type(example).__name__}"
        raise TangleNASError(
            f"the example is of {shape}, expected a batch of inputs, such as torch.randn(2, 3, 224, 224)"
        )
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TangleNASError(f"{name} is compiled: give the module that was compiled (its `_orig_mod`)")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TangleNASError(f"{name} is a wrapper for several devices: give its `module`")
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})" if path else name
        if isinstance(module, Elastic):
            raise TangleNASError(f"{where} is elastic already: elasticize takes modules of torch alone")
        if type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torchao.")):
            raise TangleNASError(f"{where} is quantized: search in floating point, and quantize the network found")
        if nn.utils.parametrize.is_parametrized(module):
            raise TangleNASError(
                f"{where} computes a weight from others: remove its parametrization first, with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if any(
            getattr(module, hooks, None)
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ):
            raise TangleNASError(f"{where} has hooks, which a recording leaves out: remove them first")
        for key, tensor in module._parameters.items():
            if isinstance(tensor, nn.parameter.UninitializedParameter) or (tensor is not None and tensor.is_meta):
                raise TangleNASError(f"{where} has no numbers in {key} yet: run the model once, or load its weights")


def _record(model: nn.Module, example: Tensor, output: Callable[[Any], Any]) -> tuple[Recorder, dict[str, str]]:
    """Return the recording of a model, and the modules in it that are called as a whole, with the reasons."""
    name = type(model).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = copy.deepcopy(model).eval()(example)
    except Exception as error:
        raise TangleNASError(
            f"{name} does not take the example of shape {tuple(example.shape)} and type {example.dtype}: {describe(error)}"
        ) from error
    if not isinstance(output(result), Tensor):
        raise TangleNASError(
            f"`output` returns a {type(output(result)).__name__} for what {name} returns, expected a tensor"
        )
    whole: dict[str, str] = {}
    while True:
        try:
            return record(model, example, output, whole), whole
        except DataDependent as error:
            if not error.owner or error.owner in whole:
                raise TangleNASError(f"{name} cannot become a space: {error.reason}") from None
            whole[error.owner] = error.reason
        except TangleNASError:
            raise
        except Exception as error:
            raise TangleNASError(f"{name} cannot be recorded: {describe(error)}") from error


@dataclass(frozen=True)
class _Candidate:
    """A class of atoms that may become a choice, or a row of one."""

    label: str
    kind: str
    atom: Atom
    options: tuple[int, ...]
    reason: str | None
    tensors: int
    stack: Layers | None = None
    layer: int | None = None


class _Builder:
    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        shares: Mapping[str, Sequence[float]],
        divisor: int,
        refused: Mapping[str, str],
    ):
        self.model, self.graph, self.shares, self.divisor = model, recorder.graph, shares, divisor
        for name, tensor in recorder.constants.items():
            model.register_buffer(name, tensor, persistent=False)
        self.analysis = Analysis(self.graph, model)
        self.stacks = find_stacks(model, recorder.spans, self.analysis)
        self.refused = refused
        self.sizes: dict[Atom, Size] = {}
        self.report = Report()

    def build(self, example: Tensor, options: Mapping[str, Any]) -> Elasticized:
        self._fix_what_has_no_form()
        space = Elasticized(self.model, example, **options)
        depths = self._choose(space)
        self._make_layers(space)
        self._write(space, depths)
        space.report = self.report
        return space

    def _uses(self) -> dict[str, fx.Node]:
        """Return the tensors that the forward uses, in order, with the first node that does."""
        found: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and str(node.target) in self.analysis.stored:
                found.setdefault(str(node.target), node)
            elif node.op == "call_module":
                module = self.analysis.modules[str(node.target)]
                for name, _ in [*module.named_parameters(), *module.named_buffers()]:
                    found.setdefault(f"{node.target}.{name}", node)
        return found

    def _fix_what_has_no_form(self) -> None:
        """Fix dimensions of tensors that are not used, and all but one factor of each dimension of a tensor."""
        used = self._uses()
        names = {id(t) for n, t in self._tensors() if n in used}
        for name, tensor in self._tensors():
            if id(tensor) not in names:
                for dim in self.analysis.stored[name]:
                    for atom in resolved(dim):
                        atom.fix("the forward does not use it")
        for name in used:
            for dim in self.analysis.stored[name]:
                varying = [atom for atom in resolved(dim) if atom.fixed is None]
                if len(varying) > 1:
                    keep = max(varying, key=lambda atom: (atom.independent, atom.length))
                    for atom in varying:
                        if atom is not keep:
                            atom.fix("another factor of its dimension varies")

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]

    def _choose(self, space: SearchSpace) -> dict[str, Size]:
        """Declare a choice for each class of atoms that may vary, and list the others with their reasons."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found: dict[Atom, list[tuple[str, int]]] = {}
        for name in self._uses():
            if name in parameters:
                for position, dim in enumerate(self.analysis.stored[name]):
                    for atom in resolved(dim):
                        found.setdefault(atom, []).append((name, position))
        depths = self._choose_depths(space)
        fixed: dict[tuple[str, int, str], int] = {}
        rows: dict[str, list[_Candidate]] = {}  # those that differ in the layer of a stack only are one choice
        for atom, places in found.items():
            candidate = self._candidate(atom, places)
            reason = self.refused.get(candidate.label) or atom.fixed or candidate.reason
            if reason is not None:
                atom.fix(reason)
                if reason != DATA:
                    name, position = places[0]
                    tensor = name.rpartition(".")[2] if name.endswith((".weight", ".bias")) else ""
                    place = f"{candidate.label}.{tensor}" if tensor else candidate.label
                    key = (f"{place}[{position}]", atom.length, reason)
                    fixed[key] = fixed.get(key, 0) + len(places)
            else:
                rows.setdefault(candidate.label, []).append(candidate)
        for label, candidates in rows.items():
            self._declare(space, label, candidates, depths)
        for (label, largest, reason), count in fixed.items():
            self.report.parts.append(Part(label, "fixed", largest, (largest,), reason, count))
        if not space.choices:
            reasons = sorted({part.reason for part in self.report.fixed})
            raise TangleNASError(
                f"{type(self.model).__name__} has no layer whose size can vary"
                + (f": {'; '.join(reasons[:3])}" if reasons else "")
            )
        seen: set[int] = set()
        for name, parameter in parameters.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                self.report.total += parameter.numel()
                inside = any(name.startswith(f"{path}.") for path in depths)
                if inside or any(atom in self.sizes for dim in self.analysis.stored[name] for atom in resolved(dim)):
                    self.report.elastic += parameter.numel()
        return depths

    def _choose_depths(self, space: SearchSpace) -> dict[str, Size]:
        """Declare a choice for the depth of each stack, and keep the stacks that have one."""
        depths: dict[str, Size] = {}
        for stack in list(self.stacks):
            label, largest = f"{stack.path}.depth", len(stack.names)
            found = {max(stack.least, round(share * largest)) for share in self.shares["depth"]}
            options = tuple(sorted({n for n in found if n < largest} | {largest}))
            if len(options) == 1 or label in self.refused:
                self.stacks.remove(stack)
                if label in self.refused:
                    self.report.parts.append(Part(label, "fixed", largest, (largest,), self.refused[label]))
                continue
            depths[stack.path] = space.choice(label, options)
            self.report.parts.append(Part(label, "depth", largest, options))
        return depths

    def _candidate(self, atom: Atom, places: Sequence[tuple[str, int]]) -> _Candidate:
        """Return the choice that a class of atoms would be."""
        name, position = places[0]
        owner, _, key = name.rpartition(".")
        label = owner if owner and key in ("weight", "bias") else name
        kind = "heads" if atom.independent else "residual" if atom.joined else "hidden"
        atoms = resolved(self.analysis.stored[name][position])
        moves = math.prod(a.length for a in atoms[atoms.index(atom) + 1 :]) > 1
        options = self._options(atom.length, self.shares[kind], 1 if moves else self.divisor)
        reason = None
        if len(options) == 1:
            reason = "it is too small to vary" if len(self.shares[kind]) > 1 else f"sizes of the kind {kind!r} stay"
        for stack in self.stacks:
            for layer in range(len(stack.names)):
                if all(place.startswith(stack.prefix(layer)) for place, _ in places):
                    label = f"{stack.path}.{label.removeprefix(stack.prefix(layer))}"
                    return _Candidate(label, kind, atom, options, reason, len(places), stack, layer)
        return _Candidate(label, kind, atom, options, reason, len(places))

    def _declare(
        self, space: SearchSpace, label: str, candidates: Sequence[_Candidate], depths: Mapping[str, Size]
    ) -> None:
        """Declare the choices of the same name: one per class, or one for the classes in the layers of a stack."""
        number, groups = 0, list[list[_Candidate]]()
        for candidate in candidates:  # several in one layer become several choices
            group = next((g for g in groups if candidate.layer not in {None, *(c.layer for c in g)}), None)
            if group is None or candidate.stack is None:
                groups.append([candidate])
            else:
                group.append(candidate)
        for group in groups:
            number += 1
            name, first = label if number == 1 else f"{label}.{number}", group[0]
            while name in space.choices:
                number += 1
                name = f"{label}.{number}"
            self.report.parts.append(
                Part(name, first.kind, first.atom.length, first.options, "", sum(c.tensors for c in group))
            )
            if first.stack is None:
                self.sizes[first.atom] = space.choice(name, first.options)
                continue
            per = [(depths[first.stack.path], candidate.layer or 0) for candidate in group]
            if all(candidate.options == first.options for candidate in group):
                choice = space.choice(name, first.options, per)
                self.sizes.update({candidate.atom: choice[i] for i, candidate in enumerate(group)})
                continue
            shares = self._distinct(group)
            choice = space.choice(name, shares, per)
            for i, candidate in enumerate(group):
                values = {share: self._rounded(candidate, share) for share in shares}
                self.sizes[candidate.atom] = choice[i].map(values.__getitem__)

    def _distinct(self, group: Sequence[_Candidate]) -> tuple[float, ...]:
        """Return the shares that give every class of a group other sizes."""
        kept: list[float] = [1]
        for share in sorted(self.shares[group[0].kind], reverse=True):
            found = [[self._rounded(candidate, s) for s in (*kept, share)] for candidate in group]
            if all(len(set(sizes)) == len(sizes) for sizes in found):
                kept.append(share)
        return tuple(sorted(kept))

    def _rounded(self, candidate: _Candidate, share: float) -> int:
        return min(candidate.options, key=lambda option: abs(option - share * candidate.atom.length))

    def _options(self, largest: int, shares: Sequence[float], divisor: int) -> tuple[int, ...]:
        while divisor > 1 and (largest % divisor or largest < 4 * divisor):
            divisor //= 2
        found = {max(divisor, round(largest * share / divisor) * divisor) for share in shares}
        return tuple(sorted({n for n in found if n < largest} | {largest}))

    def axis(self, dim: Dim, role: str) -> Axis | None:
        """Return the axis of a dimension, or None if it never varies."""
        atoms = resolved(dim)
        position = next((i for i, atom in enumerate(atoms) if atom in self.sizes), None)
        if position is None:
            return None
        outer, inner = (math.prod(a.length for a in part) for part in (atoms[:position], atoms[position + 1 :]))
        if role == "write" and atoms[position].independent:
            role = "unit"
        return Axis(self.sizes[atoms[position]] * inner, blocks=outer, role=role, unit=inner)

    def size(self, dim: Iterable[Atom], varying: bool = False) -> Size:
        """Return the size of a dimension, or the product of its factors that vary."""
        total = Size.of(1)
        for atom in resolved(dim):
            total = total * self.sizes.get(atom, 1 if varying else atom.length)
        return total

    def _make_layers(self, space: Elasticized) -> None:
        called = {self.analysis.modules[str(node.target)] for node in self.graph.nodes if node.op == "call_module"}
        done: set[nn.Module] = set()
        for node in self.graph.nodes:
            if node.op == "call_module":
                module = self.analysis.modules[str(node.target)]
                if module not in done:
                    done.add(module)
                    self._make_layer(node, str(node.target), module)
            elif node.op == "get_attr" and str(node.target) in self.analysis.stored:
                owner, _, key = str(node.target).rpartition(".")
                holder = space if not owner else self.analysis.modules[owner]
                role = "buffer" if key in holder._buffers else "write"
                axes = [
                    self.axis(dim, "read" if (str(node.target), i) in self.analysis.sums else role)
                    for i, dim in enumerate(self.analysis.stored[str(node.target)])
                ]
                if any(axes) and holder not in called:
                    if not isinstance(holder, Elastic):
                        holder.__class__ = Holder
                    if key not in holder.axes:
                        holder.declare(**{key: axes})

    def _make_layer(self, node: fx.Node, name: str, module: nn.Module) -> None:
        axes: dict[str, Axes] = {}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                dims = self.analysis.stored[f"{name}.{key}"]
                roles = ["buffer" if key in module._buffers else "write"] * len(dims)
                if key == "weight" and isinstance(module, nn.Linear):
                    roles = ["write", "read"]
                elif key == "weight" and isinstance(module, nn.modules.conv._ConvNd):
                    grouped = module.groups > 1
                    roles[:2] = ["write" if grouped else "read", "write"] if module.transposed else ["write", "read"]
                summed = [(f"{name}.{key}", i) in self.analysis.sums for i in range(len(dims))]
                axes[key] = [self.axis(d, "read" if s else r) for d, r, s in zip(dims, roles, summed, strict=True)]
        width = self.analysis.norms.get(node)
        norm = None if width is None else self.axis(width, "statistics")
        if isinstance(module, nn.GroupNorm):
            norm = self.axis(self.analysis.dims[node][1], "statistics")
        positions = self.size([atom for dim in self.analysis.positions.get(node, ()) for atom in resolved(dim)], True)
        if type(module) not in FORMS or not (norm or positions.rows or any(any(a) for a in axes.values())):
            return
        groups = self.analysis.groups.get(node)
        make_elastic(module, axes, Size.of(1) if groups is None else self.size(groups), norm)
        if positions.rows:
            module.positions = positions  # type: ignore[assignment]

    def _write(self, space: Elasticized, depths: Mapping[str, Size]) -> None:
        """Write the programs of the space and of the layers of its stacks."""
        inside = {node for stack in self.stacks for nodes in stack.nodes for node in nodes}
        starts = {stack.nodes[0][0]: stack for stack in self.stacks}
        program = _Program(self, "")
        for node in self.graph.nodes:
            if node in starts:
                program.add_stack(starts[node])
            if node not in inside:
                program.add(node)
        program.write(space)
        for stack in self.stacks:
            for position, nodes in enumerate(stack.nodes):
                layer = space.get_submodule(f"{stack.path}.{stack.names[position]}")
                layer.__class__ = Traced
                program = _Program(self, stack.prefix(position))
                program.add_inputs([stack.inputs[position], *stack.context])
                for node in nodes:
                    program.add(node)
                program.program.output(program.env[stack.outputs[position]])
                program.write(layer)
            container = space.get_submodule(stack.path)
            container.__class__ = Stack
            container.set_depth(depths[stack.path])

    def sized(self, node: fx.Node, args: Any, kwargs: Any, number: Callable[[Dim, Any], Any]) -> tuple[Any, Any]:
        """Put references in place of the numbers of a shape that vary."""
        dims = self.analysis.shapes[node]
        name = self.analysis.name_of(node)
        varies = [any(atom in self.sizes for atom in resolved(dim)) for dim in dims]
        if not any(varies) or name in ("flatten", "squeeze", "expand_as"):
            return args, kwargs
        numbers, keywords = node.meta["numbers"]

        def replaced(given: Any, recorded: Any, wanted: Sequence[Dim]) -> Any:
            return type(given)(
                number(dim, g)
                if isinstance(n, int) and n == length(dim) and any(a in self.sizes for a in resolved(dim))
                else g
                for g, n, dim in zip(given, recorded, wanted, strict=True)
            )

        if name == "split":
            part = (
                numbers[1] if len(numbers) > 1 else keywords.get("split_size", keywords.get("split_size_or_sections"))
            )
            new = number(dims[0], part) if isinstance(part, int) else [number(dims[0], one) for one in part]
            if len(args) > 1:
                return (args[0], new, *args[2:]), kwargs
            return args, {k: new if k.startswith("split_size") else v for k, v in kwargs.items()}
        if name in ("layer_norm", "rms_norm"):
            new = (number(dims[0], None),)
            return ((args[0], new, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "normalized_shape": new})
        if name == "unflatten":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            given, recorded = (args[2], numbers[2]) if len(args) > 2 else (kwargs["sizes"], keywords["sizes"])
            start = dim if dim >= 0 else dim + len(dims) - len(given) + 1
            new = replaced(tuple(given), recorded, dims[start : start + len(given)])
            if len(args) > 2:
                return (*args[:2], new), kwargs
            return args, {**kwargs, "sizes": new}
        for key in ("shape", "size"):
            if key in kwargs:
                return args, {**kwargs, key: replaced(tuple(kwargs[key]), keywords[key], dims)}
        if len(args) == 2 and isinstance(args[1], tuple | list):
            return (args[0], replaced(tuple(args[1]), numbers[1], dims)), kwargs
        return (args[0], *replaced(tuple(args[1:]), numbers[1:], dims)), kwargs

    def operation(self, node: fx.Node) -> nn.Module | None:
        """Return the module that computes a node in the supernet, or None if the call itself does."""
        if node.op not in ("call_function", "call_method"):
            return None
        name = self.analysis.name_of(node)
        function = method(node.target) if isinstance(node.target, str) else node.target
        if node in self.analysis.norms:
            width = self.axis(self.analysis.norms[node], "statistics")
            return None if width is None else WidthNorm(width, name == "layer_norm")
        if node in self.analysis.means:
            width, dim = self.analysis.means[node]
            axis = self.axis(width, "statistics")
            return None if axis is None else WidthMean(function, axis, dim)
        if name not in PRODUCTS:
            return None
        dims = self.analysis.products.get(node)
        varying = [] if dims is None else [a for dim in dims for a in resolved(dim) if a in self.sizes]
        if dims is None or not varying:
            return FixedProduct(function)
        constant = math.prod(a.length for dim in dims for a in resolved(dim) if a not in self.sizes)
        return Product(function, constant, tuple(self.sizes[a] for a in varying), BATCHES[0])


class _Program:
    """A program in the making: nodes of the recording with references to sizes and operations.

    Args:
        prefix: The start of the names of what is in the module that runs the program. It is cut.
    """

    def __init__(self, builder: _Builder, prefix: str):
        self.builder, self.prefix = builder, prefix
        self.program = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._listed: list[Size] = []
        self._operations: list[nn.Module] = []
        self._specials: dict[Any, fx.Node] = {}

    def add_inputs(self, nodes: Sequence[fx.Node]) -> None:
        """Add the inputs of a layer, and the numbers that follow from the first of them."""
        for i, node in enumerate(nodes):
            self.env[node] = self.program.placeholder(f"x{i}" if i else "x")
        self._x, self._times = self.env[nodes[0]], nodes[0].meta["shapes"][0] // BATCHES[0]

    def add(self, node: fx.Node) -> None:
        args, kwargs = (fx.node.map_arg(value, self._node) for value in (node.args, node.kwargs))
        if node in self.builder.analysis.shapes:
            args, kwargs = self.builder.sized(node, args, kwargs, self._number)
        target = node.target
        if node.op in ("get_attr", "call_module") and not node.meta.get("special"):
            target = str(target).removeprefix(self.prefix)
        made = self.env[node] = self.program.create_node(node.op, target, args, kwargs)
        if node.op == "placeholder":
            self._guard(made, node.meta["shapes"][1:])
        if (operation := self.builder.operation(node)) is not None:
            made.meta["operation"] = len(self._operations)
            self._operations.append(operation)

    def _guard(self, x: fx.Node, expected: tuple[int, ...]) -> None:
        """Refuse inputs of another shape: numbers of the recording hold for the example's shape alone."""
        shape = self.program.call_function(getattr, (x, "shape"))
        given = self.program.call_function(operator.getitem, (shape, slice(1, None)))
        equal = self.program.call_function(operator.eq, (given, expected))
        sizes = ", ".join(map(str, expected))
        self.program.call_function(torch._assert, (equal, f"expected inputs of shape (batch, {sizes}), as recorded"))

    def add_stack(self, stack: Layers) -> None:
        """Add the call of a stack of layers, in place of the calls that were recorded."""
        given = tuple(self._node(node) for node in (stack.inputs[0], *stack.context))
        self.env[stack.outputs[-1]] = self.program.call_module(stack.path, given)

    def write(self, module: nn.Module) -> None:
        module.set_program(self.program, self._listed, self._operations)  # type: ignore[operator]

    def _node(self, node: fx.Node) -> fx.Node:
        """Return the program's node of a node. Numbers of the whole input are computed from a layer's own."""
        if node in self.env:
            return self.env[node]
        key, program = node.meta["special"], self.program
        if key not in self._specials:
            if key == "batch":
                made = program.call_method("size", (self._x, 0))
                if self._times > 1:
                    made = program.call_function(operator.floordiv, (made, self._times))
            elif key in ("device", "dtype"):
                made = program.call_function(getattr, (self._x, key))
            elif key == "training":
                made = program.create_node("get_attr", "training")
            else:
                kind, factor = key
                source = next(n for n in node.all_input_nodes if n.meta.get("special") == kind)
                made = program.call_function(operator.mul, (self._node(source), factor))
            self._specials[key] = made
        return self._specials[key]

    def _number(self, dim: Dim, given: Any) -> Any:
        """Return what stands for the length of a dimension, where the recording has the number or the node `given`."""
        size = self.builder.size(dim)
        if isinstance(given, fx.Node):  # a multiple of the batch
            batch = next(n for n in self.builder.graph.nodes if n.meta.get("special") == "batch")
            return self.program.call_function(operator.mul, (self._node(batch), self._reference(size // BATCHES[0])))
        return self._reference(size)

    def _reference(self, size: Size) -> Reference:
        key = (size.rows, size.values)
        if key not in self._sizes:
            self._sizes[key] = len(self._listed)
            self._listed.append(size)
        return Reference(self._sizes[key])
