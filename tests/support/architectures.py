"""Architectures of a space for a test to go through, the space set to one of them, and what its network counts."""

import itertools

import torch
from spaces import SMALL
from torch.utils.flop_counter import FlopCounterMode

from tanglenas_engine.spaces.products import in_plain_products


def some_architectures(space, count):
    """The smallest and random ones; the largest too where that is small."""
    generator = torch.Generator().manual_seed(1)
    extreme = [space.smallest()] if space.name in SMALL else [space.smallest(), space.largest()]
    return [*extreme, *(space.sample(generator) for _ in range(1 if space.name in SMALL else count))]


def put(space, path, architecture):
    """Set the space to an architecture: by real slices, or as a corner of a relaxation."""
    if path == "hard":
        return space.select(architecture)
    space.relaxation = path
    return space.relax(space.one_hot(architecture))


def every_assignment(space):
    """All options of all layers, those beyond the depth included."""
    listed = {
        name: list(itertools.product(choice.options, repeat=len(choice.rows)))
        if choice.layered
        else list(choice.options)
        for name, choice in space.choices.items()
    }
    for picks in itertools.product(*listed.values()):
        yield dict(zip(listed, picks, strict=True))


def counted(network, x):
    with in_plain_products(), FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(x)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2
