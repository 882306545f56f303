"""A choice between operations, relaxed to their expectation. Kernels of one family share one entangled weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, plain
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.size import Assignment, Axis, Size, combinations


class Family(NamedTuple):
    """Options of a choice between operations that are one module, such as a convolution with kernels of 3 and 5.

    Attributes:
        kernels: The kernel size of each option, by its name; 1 for operations without a kernel.
        layer: A function from the kernel's Size to the module. The Size is 0 where none of the options is chosen.
    """

    kernels: Mapping[str, int]
    layer: Callable[[Size], nn.Module]


class MixedOperation(Elastic, nn.ModuleDict):
    """The expectation `sum_g P(g) operation_g(x)` over operations. An architecture has one of them.

    An operation may stand for several options at once, such as a separable convolution for kernels 3 and 5. Its kernel
    is a Size that is 0 if none of its options is chosen. Its weight is the expectation over its options, given that one
    of them is chosen: their masks divided by their total probability. The output is multiplied by that total. This
    keeps the gradient of alpha correct if the operation ends with a BatchNorm, which removes any factor in front of it.

    Differs from the paper's code, which does not multiply the output of an entangled group by the group's probability;
    `relaxation="paper"` keeps this. Behind a BatchNorm, groups then get almost no gradient against each other.

    Args:
        operations: For each name, a Size that is 1 if an architecture has the operation and 0 otherwise, and the
            module.
        sharing: "superposed" uses one weight and masks it, as described above. "entangled" uses one weight and mixes
            outputs: each option has a forward with its slice. For "separate", give each option as an operation of its
            own.
        channels: The input channels. A `PartialSize` lets a search apply the operations to a part of them only. The
            other channels bypass the operations, pooled at a stride of 2. Then all channels are shuffled (Xu et al.
            2020).

    Raises:
        TangleNASError: An architecture would have no operation or several, or a module cannot have an operation's name.
    """

    def __init__(
        self,
        operations: Mapping[str, tuple[Size, nn.Module]],
        sharing: str = "superposed",
        channels: Size | int | None = None,
    ):
        nn.ModuleDict.__init__(self)
        self.channels = None if channels is None else Size.of(channels)
        self.presence = {name: present for name, (present, _) in operations.items()}
        rows = list(dict.fromkeys(row for present in self.presence.values() for row in present.rows))
        self._row = rows[0] if len(rows) == 1 else None
        for picks in combinations(rows):
            names = [name for name, present in self.presence.items() if present.value(picks)]
            if len(names) != 1:
                chosen = ", ".join(f"{row!r}={row.options[i]}" for row, i in picks.items())
                raise TangleNASError(f"for {chosen} the operations are {names or 'none'}, expected exactly one")
        self.members: dict[str, list[Assignment]] = {}
        for name, (_, module) in operations.items():
            try:
                self.add_module(name, module)
            except KeyError as error:  # such as "gate", which is a method, or a name with a dot
                raise TangleNASError(
                    f"an operation cannot be named {name!r}: {error.args[0]}. Give it another name, such as "
                    f"{name.replace('.', '_') + '_' * ('.' not in name)!r}"
                ) from None
        for name, present in self.presence.items():
            role, size = "value", present
            if sum(present.values) > 1 and sharing == "entangled":
                self.members[name] = [picks for picks in combinations(present.rows) if present.value(picks)]
                self._check_members(name)
                numbers = (i if there else 0 for i, there in enumerate(present.values, 1))
                size = Size(present.rows, numbers)  # a different value, and so a probability, for each option
            elif sum(present.values) > 1:
                role = "group"
            axes = {name: (Axis(size, layout="value", role=role),)}
            self.declare(role, **axes)

    @classmethod
    def of(
        cls,
        choice: Size,
        families: Mapping[str, Family],
        sharing: str = "superposed",
        channels: Size | int | None = None,
    ) -> Self:
        """Return the mixed operation of a choice between names.

        Args:
            choice: The choice, such as one layer of `space.choice("op", ("conv3", "conv5", "skip"), per=4)`.
            families: A family for each name of a module. Together they have each option once. For sharing "separate",
                each option has a module of its own, under its own name.
        """
        operations = {}
        for family, (kernels, layer) in families.items():
            for names in [(name,) for name in kernels] if sharing == "separate" else [tuple(kernels)]:
                sizes = {option: kernels[option] if option in names else 0 for option in choice.values}
                kernel = choice.map(sizes.__getitem__)
                operations[family if len(names) > 1 else names[0]] = kernel.positive(), layer(kernel)
        return cls(operations, sharing, channels)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.channels
        if channels is None or channels.used == channels.max:
            y = self._mixed(x)
        else:
            y, rest = self._mixed(x[:, : channels.used]), x[:, channels.used :]
            if y.shape[-2:] != x.shape[-2:]:
                rest = F.max_pool2d(rest, 2, 2, ceil_mode=True)
            y = F.channel_shuffle(torch.cat([y, rest], 1), channels.max // channels.used)
        mixture = self._superposition.mixture if self._superposition else None
        edge = mixture.edges.get(self._row) if mixture and self._row else None
        return y if edge is None else y * edge

    def _mixed(self, x: Tensor) -> Tensor:
        if self.assignment is not None:
            name = self._chosen(self.assignment)
            if name not in self.members:
                return self.covered(name, self[name](x))
            with self._selected(self.assignment):  # kernels inside are those of the option, without a mask
                y = self[name](x)
            return self.covered(name, y)
        terms = list(self._terms(x))
        return sum(terms[1:], terms[0])

    def gate(self, child: str) -> Size:
        return self.presence[child]

    def plain(self, assignment: Assignment) -> nn.Sequential:
        """Return a network with the chosen operation under its name, so that parameter names stay the same."""
        name = self._chosen(assignment)
        network = nn.Sequential()
        network.add_module(name, plain(self[name], assignment))
        return network

    def _chosen(self, assignment: Assignment) -> str:
        return next(name for name, present in self.presence.items() if present.value(assignment))

    def _terms(self, x: Tensor) -> Iterator[Tensor]:
        mixture = self._superposition.mixture if self._superposition else None
        kept = mixture.kept.get(self._row) if mixture and self._row else None
        for name, module in self.items():
            if kept is not None and not any(self.presence[name].values[option] for option in kept):
                continue
            factors = self.factors(name)
            if not factors:  # a group of the relaxation "paper", or a network without a mixture
                yield module(x)
            elif name in self.members:
                yield from self._one_by_one(
                    module, x, self.members[name], factors[0].whole()[-len(self.members[name]) :]
                )
            else:
                yield module(x) * factors[0].whole()[-1]

    def _one_by_one(
        self, module: nn.Module, x: Tensor, members: list[Assignment], probabilities: Tensor
    ) -> Iterator[Tensor]:
        """Yield `p_k operation_k(x)` for each option of a group.

        Running statistics move by the expected change, given that the group is chosen.
        """
        shares = probabilities.detach() / probabilities.detach().sum().clamp_min(1e-12)
        before = dict(module.named_buffers())
        moves = {key: torch.zeros_like(buffer) for key, buffer in before.items()}
        for picks, probability, share in zip(members, probabilities, shares, strict=True):
            after = {key: buffer.clone() for key, buffer in before.items()}
            with self._selected(picks):
                output = torch.func.functional_call(module, after, (x,))
            yield output * probability
            for key, buffer in before.items():
                moved = after[key] - buffer
                moves[key] = moves[key] + moved * share if buffer.is_floating_point() else moved
        for key, buffer in before.items():
            buffer += moves[key]

    @contextmanager
    def _selected(self, picks: Assignment) -> Iterator[None]:
        """Take the hard path inside the block, without a mixture."""
        state = self._superposition
        assert state is not None
        with state.restored():
            state.select(picks)
            yield

    def _check_members(self, name: str) -> None:
        layers = [module for module in self[name].modules() if isinstance(module, Elastic)]
        rows = {row for layer in layers for axes in layer.axes.values() for axis in axes for row in axis.size.rows}
        if foreign := rows - set(self.presence[name].rows):
            raise TangleNASError(
                f"operation {name!r} is evaluated for each of its options (sharing 'entangled'), but its layers "
                f"follow other choices too: {', '.join(sorted(map(repr, foreign)))}. Use sharing 'superposed'"
            )
