"""`tanglenas predict`: the classes of images, or the continuation of texts, by a trained network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tanglenas_engine.errors import TangleNASError, describe, quoted, readable, shown

from . import WrongInput
from ._console import read_text
from ._model import OWN_TRANSFORM, Model, open_model, open_tokenizer
from .export import TOLERANCE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

T = TypeVar("T")


@click.command(short_help="Name the classes of images, or continue texts.")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("files", metavar="FILE...", type=click.Path(path_type=Path), nargs=-1)
@click.option("--prompt", metavar="TEXT", help="Texts: a text to continue, in place of files.")
@click.option("--top", metavar="N", type=click.IntRange(1), help="Images: classes to print.  [default: 5]")
@click.option("--tokens", metavar="N", type=click.IntRange(1), help="Texts: tokens to add.  [default: 200]")
@click.option("--temperature", metavar="X", type=click.FloatRange(0), help="Texts: below 1 for likely tokens, above 1 "
              "for unlikely ones, 0 for the most likely one.  [default: 0.8]")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), help="Texts: the seed.  [default: 0]")
def command(
    model: Path,
    files: tuple[Path, ...],
    prompt: str | None,
    top: int | None,
    tokens: int | None,
    temperature: float | None,
    seed: int | None,
) -> None:
    """Print the most probable classes of each image FILE, or continue each text FILE, with the network MODEL.

    MODEL is what `tanglenas export` wrote, a folder or a file, or the output of a run: a project, its folder out/ or
    out/retrain/. A folder with a language model of transformers will do, too. How inputs are made, the names of classes
    and the tokenizer are those that lie in or beside it. A FILE that cannot be read is told among the results, and the
    command ends with status 2.
    """
    import torch

    if prompt is None and not files:
        raise click.UsageError("give images or texts as FILE..., or --prompt TEXT for a language model")
    if prompt is not None and files:
        raise click.UsageError("give files or --prompt, not both")
    opened = open_model(model)
    given = {"--prompt": prompt, "--top": top, "--tokens": tokens, "--temperature": temperature, "--seed": seed}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about the files of this one
        if "block_size" in opened.known.config:
            _refuse(opened, "continues texts", given, ("--top",))
            heat = 0.8 if temperature is None else temperature
            for line in _texts(opened, files, prompt, tokens or 200, heat, seed or 0):
                click.echo(line)
        else:
            _refuse(opened, "takes images", given, ("--prompt", "--tokens", "--temperature", "--seed"))
            for line in _images(opened, files, top or 5):
                click.echo(line)


def _refuse(model: Model, what: str, given: dict[str, Any], foreign: Sequence[str]) -> None:
    if wrong := [name for name in foreign if given[name] is not None]:
        raise TangleNASError(f"{model.path} {what}, so {wrong[0]} would do nothing: leave it out")


def _each(files: Sequence[Path], read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """Yield each file with what `read` makes of it. Tell those that it refuses, and end with status 2 at last."""
    refused = False
    for path in files:
        try:
            content = read(path)
        except TangleNASError as error:
            WrongInput(readable(error)).show()
            refused = True
        else:
            yield path, content
    if refused:
        click.get_current_context().exit(WrongInput.exit_code)


def _run(model: Model, inputs: Tensor) -> Tensor:
    """Return the network's outputs.

    Raises:
        TangleNASError: The network refuses the inputs, or its outputs are not finite.
    """
    try:
        outputs = model.forward(inputs)
    except Exception as error:  # whatever the runtime raises
        raise TangleNASError(
            f"{model.path} cannot compute inputs of shape {tuple(inputs.shape)}: {describe(error)}. Export it again"
        ) from None
    if not outputs.isfinite().all():
        raise TangleNASError(f"{model.path} computes values that are not finite: its weights are damaged. Train again")
    return outputs


# Images.


def _images(model: Model, files: Sequence[Path], top: int) -> Iterator[str]:
    """Yield for each image its name and its most probable classes with their probabilities in %."""
    make = _transform(model)
    names = model.known.config.get("label_names")
    names = names if isinstance(names, list | tuple) else ()
    for path, made in _each(files, make):
        (logits,) = _run(model, made[None])  # (classes,)
        chances, classes = logits.softmax(-1).topk(min(top, len(logits)))
        yield shown(path)
        for chance, label in zip(chances.tolist(), classes.tolist(), strict=True):
            name = shown(names[label], 80) if label < len(names) else f"class {label}"
            yield f"  {100 * chance:6.2f} %  {name}"


def _transform(model: Model) -> Any:
    """Return the function from the path of an image to an input (C, H, W) of the network.

    Raises:
        TangleNASError: It is not known how inputs are made.
    """
    config = model.known.config
    size, mean, std = (_numbers(config.get(name)) for name in ("input_size", "mean", "std"))
    if len(size) != 3 or size[0] not in (1, 3) or not len(mean) == len(std) == size[0] or 0 in std or min(size) < 1:
        raise TangleNASError(
            f"{model.path} does not say how its inputs are made: input_size is {quoted(config.get('input_size'), 80)}, "
            f"mean {quoted(config.get('mean'), 80)}, std {quoted(config.get('std'), 80)}. {OWN_TRANSFORM}"
        )
    from timm.data.transforms_factory import create_transform

    from tanglenas_datasets.decoding import decode, reason

    channels, height, width = (int(one) for one in size)
    share = config.get("crop_pct", 1.0)
    transform = create_transform(
        (channels, height, width),
        interpolation=str(config.get("interpolation", "bilinear")),
        mean=mean,
        std=std,
        crop_pct=share if isinstance(share, float) and 0 < share <= 1 else 1.0,
    )

    def make(path: Path) -> Tensor:
        if path.is_dir():
            raise TangleNASError(f"{shown(path)} is a folder: give the images in it, such as {shown(path / '*')}")
        try:
            image = decode(path, "L" if channels == 1 else "RGB")
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise TangleNASError(
                f"{shown(path)} is no readable image: {shown(reason(error))}. {model.path} takes images, which it "
                f"brings to {height} x {width} pixels"
            ) from None
        made: Tensor = transform(image)
        return made

    return make


def _numbers(value: Any) -> tuple[float, ...]:
    """Return a list of finite numbers as a tuple, and () for anything else."""
    ours = isinstance(value, list | tuple) and all(type(one) in (int, float) and math.isfinite(one) for one in value)
    return tuple(value) if ours else ()


# Texts.


def _texts(
    model: Model, files: Sequence[Path], prompt: str | None, tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yield each text with its continuation: that of each file, or the prompt."""
    block = model.known.config["block_size"]
    if not isinstance(block, int) or block < 1:
        raise TangleNASError(f"{model.path}: block_size is {quoted(block, 80)}, expected a number of tokens")
    from tanglenas_datasets.tokenizer_file import unknown_strings

    tokenizer = _tokenizer(model)

    def begin(name: str, text: str) -> tuple[str, list[int]]:
        start: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if not start:
            raise TangleNASError(f"{name} is empty: give a text of at least one token, which is continued")
        if count := sum(1 for _ in unknown_strings(tokenizer, [text])):
            click.echo(f"{name}: {count} of {len(start)} tokens are unknown to the network", err=True)
        return text, start

    def read(path: Path) -> tuple[str, list[int]]:
        return begin(shown(path), read_text(path, f"a text in UTF-8, which {model.path} continues"))

    one = [(Path(), begin("the prompt", prompt))] if prompt is not None else _each(files, read)
    for path, (text, start) in one:
        added = _continued(model, start, block, tokens, temperature, seed)
        if len(files) > 1:
            yield f"==> {shown(path)} <=="
        yield _printable(text + _text_after(tokenizer, start, added))


def _tokenizer(model: Model) -> Tokenizer:
    if not model.known.tokenizer:
        raise TangleNASError(
            f"{model.path} has no tokenizer.json beside it, without which no text becomes tokens. Copy it from the "
            "folder of the retrained network, or export the network again"
        )
    return open_tokenizer(model.known.tokenizer, model.path)


def _text_after(tokenizer: Tokenizer, start: list[int], added: list[int]) -> str:
    """Return the text of tokens that follow others. Decoders such as Llama's drop a space at the start of a text."""
    before, whole, alone = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (start, start + added, added))
    return whole[len(before) :] if whole.startswith(before) else alone


def _continued(model: Model, start: list[int], block: int, tokens: int, temperature: float, seed: int) -> list[int]:
    """Return `tokens` more tokens, drawn one by one, each given the last `block` ones before it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = list(start)
    block = min(block, model.length or block)
    _check_causal(model, start[-block:])
    for _ in range(tokens):
        logits = _next(model, found[-block:]).double()  # (vocab_size,)
        if temperature == 0:
            found.append(int(logits.argmax()))
        else:
            chances = ((logits - logits.max()) / temperature).softmax(-1)  # no temperature overflows
            found.append(int(torch.multinomial(chances, 1, generator=generator)))
    return found[len(start) :]


def _next(model: Model, window: list[int], filling: int = 0) -> Tensor:
    """Return the logits (vocab_size,) of the token after a window. A graph of one length gets it filled up behind."""
    import torch

    filled = window + [filling] * ((model.length or 0) - len(window))
    return _run(model, torch.tensor([filled]))[0, len(window) - 1]


def _check_causal(model: Model, window: list[int]) -> None:
    """Refuse a window that needs filling up where the outputs depend on the filling."""
    if model.length is None or len(window) == model.length:
        return
    one, other = (_next(model, window, filling) for filling in (0, 1))
    if (one - other).abs().max() > TOLERANCE * one.abs().max():
        raise TangleNASError(
            f"{model.path} takes exactly {model.length} tokens, and what it computes for a text of {len(window)} "
            f"depends on what is filled up behind it. Give a text of at least {model.length} tokens"
        )


def _printable(text: str) -> str:
    """Return a text of several lines without codes that a terminal would act upon."""
    lines = text.replace("\r\n", "\n")
    safe = (char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in lines)
    return "".join(safe)
