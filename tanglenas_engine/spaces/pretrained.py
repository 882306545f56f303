"""A space that starts from a trained network: its weights are loaded, and its outputs are compared with the source's.

A supernet's parameters have the names and the shapes of its largest network. So weights of that network load as they
are. A space says what differs in the files of other libraries: `SearchSpace.converted`, `output_layer` and `source`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import tied
from tanglenas_engine.elastic.depth import Depth
from tanglenas_engine.elastic.parts import reference
from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.runtime.weights import (
    FLOATS,
    OtherWeightsError,
    check_tied,
    check_values,
    read_weights,
    save_weights,
    without_prefix,
)
from tanglenas_engine.spaces.space import SearchSpace

TOLERANCE = 1e-4
"""The largest difference between outputs that rounding explains, as a share of the largest output."""

Explain = Callable[[Mapping[str, tuple[torch.Size, torch.Size]]], Mapping[str, str]]
"""A function of the two shapes of tensors, in the file and in the space. It returns a remedy for each that it knows."""


def load_pretrained(space: SearchSpace, path: str | Path, explain: Explain | None = None) -> list[str]:
    """Load the weights of a trained network into a space, and return sentences about what was done.

    A head for another number of classes is left out. If the space can build the source's network from a folder, both
    networks' outputs for a random batch are compared.

    Args:
        space: The space, whose largest network is the file's.
        path: A safetensors file, or a folder with `config.json` and `model.safetensors` or several such files.
        explain: A function that gets the shapes in the file and here of the tensors whose shapes differ, by name, and
            returns a sentence with the remedy for those of which it knows one, by name. By default the remedy is to
            give the space other options.

    Raises:
        OtherWeightsError: Names or shapes are not those of the largest network, it ties what differs in the file, or
            it computes something else.
        TangleNASError: A file is missing or damaged, a tensor is quantised, complex or not finite, or the space refuses
            the folder.
    """
    own = space.state_dict()
    given, prefix = without_prefix(read_weights(path), own)
    notes = [f"all names begin with {prefix!r}, which was left out"] if prefix else []
    # The order of a supernet's layers is found anew.
    orders = {f"{name}.order" for name, module in space.named_modules() if isinstance(module, Depth)}
    state = space.converted({name: tensor for name, tensor in given.items() if name not in orders})
    has_head = any(name in state for name in _head(space, own))
    if left_out := _without_head(space, state, own):
        why = "has another number of classes, so it was left out and" if has_head else "is not among the weights, so it"
        notes.append(f"the head ({', '.join(left_out)}) {why} starts untrained")
    _check_names(space, path, state, own, left_out, explain)
    check_values(path, state, own, prefix)
    check_tied(space, state, path)
    types = {tensor.dtype for name, tensor in state.items() if tensor.dtype in FLOATS} - {torch.float32}
    if types:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        notes.append(f"weights in {names} were converted to float32")
    space.load_state_dict({**own, **state})
    with _readable(Path(path), given, prefix) as folder:
        notes.append(_compare(space, Path(path), folder))
    return notes


@contextmanager
def _readable(path: Path, given: Mapping[str, Tensor], prefix: str) -> Iterator[Path]:
    """Yield a folder that the source's library reads: the path, or one of the weights without the prefix of a wrapper.

    Libraries do not know such names. transformers would compare with newly initialised weights.
    """
    config = path / "config.json"
    if not prefix or not config.is_file():
        yield path
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(config, folder)
        save_weights(folder / "model.safetensors", given, {"format": "pt"})
        yield folder


def _head(space: SearchSpace, own: Mapping[str, Tensor]) -> list[str]:
    return [name for name in own if space.output_layer and name.startswith(f"{space.output_layer}.")]


def _without_head(space: SearchSpace, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Remove the tensors of a head with another number of classes from `state`, and return the names of the space's.

    A part of a head with the same classes stays, and so the rest of it is missing.
    """
    names = _head(space, own)
    given = [name for name in names if name in state]
    other = not given or any(state[name].shape[:1] != own[name].shape[:1] for name in given)
    if not names or not other or any(state[name].shape[1:] != own[name].shape[1:] for name in given):
        return []
    for name in given:
        del state[name]
    return names


def _check_names(
    space: SearchSpace,
    path: str | Path,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    left_out: Sequence[str],
    explain: Explain | None,
) -> None:
    """Refuse names and shapes that are not the largest network's.

    Raises:
        OtherWeightsError: A tensor is missing, is one too many, or has another shape.
    """
    given = set(state) | set(left_out)
    for names in tied(space):
        if given & set(names):
            given |= set(names)
    missing = [
        name
        for name in space.inherited(space.largest())
        if name not in given and not name.endswith("num_batches_tracked")
    ]
    surplus = [name for name in state if name not in own]
    shapes = {
        name: (state[name].shape, own[name].shape)
        for name in own
        if name in state and state[name].shape != own[name].shape
    }
    differing = [f"{name} is {tuple(there)} there and {tuple(here)} here" for name, (there, here) in shapes.items()]
    wrong = [
        f"{what} {found[0]}{f' and {len(found) - 1:,} more' if len(found) > 1 else ''}"
        for what, found in (("it lacks", missing), ("the space has no", surplus), ("the shapes differ:", differing))
        if found
    ]
    if not wrong:
        return
    head = _head(space, own)  # another number of classes is no obstacle
    body = {name: both for name, both in shapes.items() if name not in head}
    remedies = explain(body) if explain and body else {}
    advice = list(dict.fromkeys(remedies.values()))
    if missing or surplus or shapes.keys() - remedies.keys():
        largest = ", ".join(f"{name} {max(choice.options)}" for name, choice in space.choices.items())
        advice.append(
            f"The largest options of this space are {largest}. Give the space the options of the file's network "
            "(create_space.OPTION), the largest of each choice included, or choose another space"
        )
    raise OtherWeightsError(
        f"{path} holds the weights of another network than the largest of {space.label}: {'; '.join(wrong)}. "
        + ". ".join(advice)
    )


def _compare(space: SearchSpace, path: Path, folder: Path) -> str:
    """Compare the outputs of the largest network with those of the source's network, and return what was found.

    Args:
        space: The space, with the weights.
        path: The file or folder that was given.
        folder: The folder that the source's network is built from, if the path is one.

    Raises:
        OtherWeightsError: The outputs differ by more than rounding.
    """
    unknown = f"the outputs were not compared with those of the network that the weights are of: {{}} ({path})"
    if not path.is_dir():
        return unknown.format("a file alone does not say how it is built")
    if not (path / "config.json").is_file():
        return unknown.format("there is no config.json")
    try:
        with seeded(0, accelerators=False):  # building a network draws random numbers
            source = space.source(folder)
    except TangleNASError:
        raise
    except (
        ImportError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return unknown.format(f"it cannot be built, {describe(error)}")
    if source is None:
        return unknown.format(f"{space.label} cannot build it from this folder")
    source = source.to(reference(space)).eval()
    with torch.no_grad(), seeded(0, accelerators=False), space.as_largest():
        x = space.example_input(2).to(reference(space).device)
        ours, theirs = space(x.clone()), source(x)
    theirs = getattr(theirs, "logits", theirs)  # transformers' networks return an object
    if ours.shape != theirs.shape:
        raise OtherWeightsError(
            f"the network of {path} has outputs of shape {tuple(theirs.shape)} for a batch of 2, and the largest of "
            f"{space.label} {tuple(ours.shape)}: give the space the options of that network (create_space.OPTION)"
        )
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(theirs.abs().max())):
        reasons = list(_differences(space.standalone(space.largest()).eval(), source))[:3]
        likely = "; ".join(reasons) or "an option without weights, such as the pooling, an activation or an epsilon"
        raise OtherWeightsError(
            f"the weights of {path} fit, but the outputs of the largest of {space.label} differ from those of the "
            f"network that they are of by up to {difference:.3g}. The likely reason is {likely}. Correct the option "
            "(create_space.OPTION)"
        )
    return f"the largest network's outputs equal those of the network in {path} (largest difference {difference:.1g})"


def _differences(ours: nn.Module, theirs: nn.Module) -> Iterator[str]:
    """Yield in words where modules of the same name differ in a plain attribute, or an activation in its kind."""
    others = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        other = others.get(name)
        if other is None:
            continue
        if type(module) is not type(other) and not [*module.parameters(recurse=False), *module.children()]:
            yield f"{name} is {type(other).__name__} there and {type(module).__name__} here"
        for key, value in _plain(module).items():
            there = _plain(other).get(key, value)
            if there != value:
                where = f"{name}.{key}" if name else key
                yield f"{where} is {there!r} there and {value!r} here"


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str)
    return {key: value for key, value in vars(module).items() if isinstance(value, kinds) and key[0] != "_"}
