"""The choices of a space made of a recorded model, and its elastic layers."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from tanglenas_engine.conversion.analysis import Analysis
from tanglenas_engine.conversion.dimensions import DATA, Atom, resolved
from tanglenas_engine.conversion.forms import FORMS, Axes, Holder, make_elastic
from tanglenas_engine.conversion.program import Plan, Program
from tanglenas_engine.conversion.record import Recorder
from tanglenas_engine.conversion.report import Part, Report
from tanglenas_engine.conversion.rules import REFUSED, RULES
from tanglenas_engine.conversion.stacks import Layers, find_stacks
from tanglenas_engine.conversion.traced import Stack, Traced
from tanglenas_engine.elastic.base import Elastic, shared
from tanglenas_engine.elastic.parts import part
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Size


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


class Builder:
    """The way from a recording to the choices and layers of a space.

    Attributes:
        names: The names of the choices, with those that are refused.
        still: The names that choices would have whose sizes stay for another reason.

    Args:
        model: The model, which the space takes over.
        recorder: Its recording.
        shares: The options of each kind of choice.
        divisor: A number of which sizes are multiples.
        refused: The choices that stay as they are, with the reasons.
    """

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
        self.analysis = Analysis(self.graph, model, RULES, REFUSED)
        self.stacks = find_stacks(model, recorder.spans, self.analysis)
        self.refused = refused
        self.plan = Plan(self.analysis)
        self.report = Report()
        self.names: set[str] = set()
        self.still: set[str] = set()

    def build(self, space: Any) -> Report:
        """Declare the choices of a space with the model's tensors, make its layers elastic, and write its programs.

        Raises:
            TangleNASError: No size varies.
        """
        self._fix_unequal_positions()
        self._fix_what_has_no_form()
        depths = self._choose(space)
        self._make_layers(space)
        self._write(space, depths)
        return self.report

    def output_layer(self) -> str:
        """Return the name of the layer that makes the classes of the output; "" if no layer alone does.

        No other tensor has a dimension of the classes then: no second head, no norm behind it, and no tied embedding.
        """
        outputs = [source for node in self.graph.nodes if node.op == "output" for source in node.all_input_nodes]
        dims = [dim for node in outputs for dim in self.analysis.of(node)]
        classes = {atom for atom in resolved(itertools.chain(*dims)) if atom.fixed != DATA}
        stored = self.analysis.stored
        places = {(name, i) for name in stored for i, dim in enumerate(stored[name]) if classes & {*resolved(dim)}}
        for name, module in self.analysis.modules.items():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                own = {(f"{name}.{key}", 0) for key in module._parameters if f"{name}.{key}" in stored}
                if places == own and classes == {*resolved(stored[f"{name}.weight"][0])}:
                    return str(name)
        return ""

    def _uses(self) -> dict[str, fx.Node]:
        """Return the tensors that the forward uses, in order, with the first node that reads them."""
        found: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and str(node.target) in self.analysis.stored:
                found.setdefault(str(node.target), node)
            elif node.op == "call_module":
                module = self.analysis.modules[str(node.target)]
                for name, _ in [*module.named_parameters(), *module.named_buffers()]:
                    found.setdefault(f"{node.target}.{name}", node)
        return found

    def _fix_unequal_positions(self) -> None:
        """Fix positions of a linear layer that vary in some of its calls only: it has one count for all calls."""
        calls: dict[nn.Module, list[Counter[Atom]]] = {}
        for node, dims in self.analysis.positions.items():
            varying = Counter(atom for atom in resolved(itertools.chain(*dims)) if atom.fixed is None)
            calls.setdefault(self.analysis.modules[str(node.target)], []).append(varying)
        for found in calls.values():
            common = functools.reduce(operator.and_, found)
            for varying in found:
                for atom in varying - common:
                    atom.fix("a linear layer goes along it in one call and not in another")

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
            reason = atom.fixed or candidate.reason
            if reason is not None:
                self.still.add(candidate.label)
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
                if inside or any(map(self.plan.varies, self.analysis.stored[name])):
                    self.report.elastic += parameter.numel()
        return depths

    def _choose_depths(self, space: SearchSpace) -> dict[str, Size]:
        """Declare a choice for the depth of each stack that may vary, and return these by the stack's path."""
        depths: dict[str, Size] = {}
        for stack in self.stacks:
            label, largest = f"{stack.path}.depth", len(stack.names)
            found = {max(stack.least, round(share * largest)) for share in self.shares["depth"]}
            options = tuple(sorted({n for n in found if n < largest} | {largest}))
            self.names.add(label)
            if len(options) == 1 or label in self.refused:
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
                    if label in self.refused:  # one layer alone
                        return _Candidate(label, kind, atom, options, reason or self.refused[label], len(places))
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
            while name in self.names:
                number += 1
                name = f"{label}.{number}"
            self.names.add(name)
            largest, tensors = first.atom.length, sum(c.tensors for c in group)
            if name in self.refused:
                self.report.parts.append(Part(name, "fixed", largest, (largest,), self.refused[name], tensors))
                continue
            self.report.parts.append(Part(name, first.kind, largest, first.options, "", tensors))
            if first.stack is None:
                self.plan.sizes[first.atom] = space.choice(name, first.options)
                continue
            depth = depths.get(first.stack.path)
            per = [(depth, candidate.layer or 0) for candidate in group] if depth is not None else len(group)
            if all(candidate.options == first.options for candidate in group):
                choice = space.choice(name, first.options, per)
                self.plan.sizes.update({candidate.atom: choice[i] for i, candidate in enumerate(group)})
                continue
            shares = self._distinct(group)
            choice = space.choice(name, shares, per)
            for i, candidate in enumerate(group):
                values = {share: self._rounded(candidate, share) for share in shares}
                self.plan.sizes[candidate.atom] = choice[i].map(values.__getitem__)

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

    def _make_layers(self, space: Any) -> None:
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
                    self.plan.axis(dim, "read" if (str(node.target), i) in self.analysis.sums else role)
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
                axes[key] = [self.plan.axis(d, "read" if s else r) for d, r, s in zip(dims, roles, summed, strict=True)]
        width = self.analysis.norms.get(node)
        norm = None if width is None else self.plan.axis(width, "statistics")
        if isinstance(module, nn.GroupNorm):
            norm = self.plan.axis(self.analysis.dims[node][1], "statistics")
        positions = self.plan.size(itertools.chain(*self.analysis.positions.get(node, ())), varying=True)
        if type(module) not in FORMS or not (norm or positions.rows or any(any(a) for a in axes.values())):
            return
        groups = self.analysis.groups.get(node)
        make_elastic(module, axes, Size.of(1) if groups is None else self.plan.size(groups), norm)
        if positions.rows:
            module.positions = positions  # type: ignore[assignment]

    def _write(self, space: Any, depths: Mapping[str, Size]) -> None:
        """Write the programs of the space and of the layers of its stacks."""
        stacks = [stack for stack in self.stacks if stack.path in depths]
        inside = {node for stack in stacks for nodes in stack.nodes for node in nodes}
        starts = {stack.nodes[0][0]: stack for stack in stacks}
        program = Program(self.plan)
        for node in self.graph.nodes:
            if node in starts:
                program.add_stack(starts[node])
            if node not in inside:
                program.add(node)
        _check_names(self.model, type(self.model).__name__)
        program.write(space)
        groups = shared(space)
        for stack in stacks:
            for position, nodes in enumerate(stack.nodes):
                layer = part(space, f"{stack.path}.{stack.names[position]}")
                _check_names(layer, f"{stack.path}.{stack.names[position]}")
                layer.__class__ = Traced
                program = Program(self.plan, stack.prefix(position))
                program.add_inputs([stack.inputs[position], *stack.context])
                for node in nodes:
                    program.add(node)
                program.program.output(program.env[stack.outputs[position]])
                program.write(layer)
            container = part(space, stack.path)
            container.__class__ = Stack
            elsewhere = any(
                node.op in ("get_attr", "call_module") and str(node.target).startswith(f"{stack.path}.")
                for node in self.graph.nodes
                if node not in inside
            )
            layers = [stack.prefix(position) for position in range(stack.changing, len(stack.names))]
            # The ties of a network follow the places of its layers, so all layers must have the same ones.
            ties = [_ties(groups, layer) for layer in layers]
            uneven = any(one != ties[0] for one in ties)
            container.set_depth(depths[stack.path], stack.changing, placed=elsewhere or uneven)


def _ties(groups: Sequence[Sequence[str]], layer: str) -> set[tuple[frozenset[str], int | None]]:
    """Return what is tied in a layer, which is given by its prefix.

    Each shared parameter has its names in the layer, and its number if it has names elsewhere, too.

    Args:
        groups: The names of each shared parameter of the space.
        layer: The prefix.
    """
    found = set()
    for number, group in enumerate(groups):
        if names := frozenset(name.removeprefix(layer) for name in group if name.startswith(layer)):
            found.add((names, number if len(names) < len(group) else None))
    return found


def _check_names(module: nn.Module, where: str) -> None:
    """Refuse parts that a `GraphModule`, which the module becomes in an extracted network, would read as its own.

    Raises:
        TangleNASError: A part has the name of an attribute of such modules.
    """
    network = fx.GraphModule(nn.Module(), fx.Graph())
    for name in (*module._parameters, *module._buffers, *module._modules):
        if hasattr(network, name):
            raise TangleNASError(
                f"{where}.{name} has the name of an attribute of torch.fx.GraphModule, which extracted networks are: "
                "rename it in the model"
            )
