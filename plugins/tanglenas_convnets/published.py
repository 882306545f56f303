"""What the spaces inside a convolutional network of timm have in common: choices by stage and block, and files."""

from __future__ import annotations

from collections.abc import Sequence

from tanglenas_engine import Architecture, Choice, Size, TangleNASError
from tanglenas_timm.space import TimmSpace


class PublishedConvNet(TimmSpace):
    """A space of timm's convolutional networks with four stages, whose parameter names it has.

    Every stage has a choice of its depth, `depth_1` to `depth_4`. Shares choose what is kept of the channels of each
    stage, and of the hidden channels of each block.
    """

    def choose(
        self,
        depth: Sequence[Sequence[int]],
        channels: Sequence[int],
        expansion: int,
        inside: int,
        width_share: Sequence[float],
        hidden_share: Sequence[float],
    ) -> tuple[list[Choice], list[Size], list[list[Size]]]:
        """Declare the choices, and return the depths, the channels of each stage, and the hidden ones of each block.

        A stage has `expansion`, and its blocks have `inside`, times as many as `channels` says.
        """
        if len(depth) != len(channels) or len(channels) != 4:
            raise TangleNASError(f"depth has {len(depth)} stages and channels {len(channels)}: expected 4 of each")
        for name, shares in (("width_share", width_share), ("hidden_share", hidden_share)):
            if max(shares) != 1:
                raise TangleNASError(f"{name} has the options {tuple(shares)}: 1, the network itself, is the largest")
        self.channels, self.expansion, self.inside = tuple(channels), expansion, inside
        D = [self.choice(f"depth_{number}", options) for number, options in enumerate(depth, 1)]
        W = self.choice("width_share", width_share, per=4)
        H = self.choice("hidden_share", hidden_share, per=D)
        widths = [(W[s] * (expansion * count)).map(round) for s, count in enumerate(channels)]
        hidden = [
            [(H[s, b] * (inside * count)).map(round) for b in range(D[s].max)] for s, count in enumerate(channels)
        ]
        return D, widths, hidden

    def chosen(self, architecture: Architecture) -> dict[str, list[int]]:
        """Return the depths, widths and hidden channels of an architecture, as JSON can hold them."""
        self.assignment_of(architecture)
        choices = architecture.choices
        depths = [choices[f"depth_{number}"] for number in range(1, 5)]
        by_block = [count for count, depth in zip(self.channels, depths, strict=True) for _ in range(depth)]
        return {
            "depths": depths,
            "widths": [
                round(share * self.expansion * count)
                for share, count in zip(choices["width_share"], self.channels, strict=True)
            ],
            "hidden": [
                round(share * self.inside * count)
                for share, count in zip(choices["hidden_share"], by_block, strict=True)
            ],
        }
