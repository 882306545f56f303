"""`tanglenas predict`: the classes of images, or the continuation of texts, by a trained network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tanglenas_engine.errors import TangleNASError, describe, quoted, shown

from ._console import read_text
from ._model import OWN_TRANSFORM, Model, open_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


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
    and the tokenizer are those that lie in or beside it.
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


def _images(model: Model, files: Sequence[Path], top: int) -> list[str]:
    """Return for each image its name and its most probable classes with their probabilities in %."""
    make = _transform(model)
    names = model.known.config.get("label_names")
    names = names if isinstance(names, list | tuple) else ()
    lines = []
    for path in files:
        (logits,) = _run(model, make(path)[None])  # (classes,)
        chances, classes = logits.softmax(-1).topk(min(top, len(logits)))
        lines.append(shown(path))
        for chance, label in zip(chances.tolist(), classes.tolist(), strict=True):
            name = shown(names[label], 80) if label < len(names) else f"class {label}"
            lines.append(f"  {100 * chance:6.2f} %  {name}")
    return lines


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
) -> list[str]:
    """Return each text with its continuation: that of each file, or the prompt."""
    from tokenizers import Tokenizer

    block = model.known.config["block_size"]
    if not isinstance(block, int) or block < 1:
        raise TangleNASError(f"{model.path}: block_size is {quoted(block, 80)}, expected a number of tokens")
    if not model.known.tokenizer:
        raise TangleNASError(
            f"{model.path} has no tokenizer.json beside it, without which no text becomes tokens. Copy it from the "
            "folder of the retrained network, or export the network again"
        )
    try:
        tokenizer = Tokenizer.from_str(model.known.tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exception
        raise TangleNASError(f"the tokenizer.json of {model.path} is none: {describe(error)}. Copy it again") from None
    lines = []
    what = f"a text in UTF-8, which {model.path} continues"
    texts = [("the prompt", prompt)] if prompt is not None else [(shown(path), read_text(path, what)) for path in files]
    for name, text in texts:
        start = tokenizer.encode(text, add_special_tokens=False).ids
        if not start:
            raise TangleNASError(f"{name} is empty: give a text of at least one token, which is continued")
        added = _continued(model, start, block, tokens, temperature, seed)
        lines += [f"==> {name} <=="] * (len(texts) > 1)
        lines.append(_printable(text + _text_after(tokenizer, start, added)))
    return lines


def _text_after(tokenizer: Tokenizer, start: list[int], added: list[int]) -> str:
    """Return the text of tokens that follow others. Decoders such as Llama's drop a space at the start of a text."""
    before, whole, alone = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (start, start + added, added))
    return whole[len(before) :] if whole.startswith(before) else alone


def _continued(model: Model, start: list[int], block: int, tokens: int, temperature: float, seed: int) -> list[int]:
    """Return `tokens` more tokens, drawn one by one, each given the last `block` ones before it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = list(start)
    for _ in range(tokens):
        logits = _run(model, torch.tensor([found[-block:]]))[0, -1].double()  # (vocab_size,)
        if temperature == 0:
            found.append(int(logits.argmax()))
        else:
            chances = ((logits - logits.max()) / temperature).softmax(-1)  # no temperature overflows
            found.append(int(torch.multinomial(chances, 1, generator=generator)))
    return found[len(start) :]


def _printable(text: str) -> str:
    """Return a text of several lines without codes that a terminal would act upon."""
    lines = text.replace("\r\n", "\n")
    safe = (char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in lines)
    return "".join(safe)
