"""Reads a `tokenizer.json` of someone else. One that cannot encode a text, or not twice alike, is refused."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE

from tanglenas_engine import TangleNASError


def read_tokenizer(label: str, path: str, text: str) -> Tokenizer:
    """Read a tokenizer, without its truncation and padding.

    Args:
        label: The dataset's name, for errors.
        path: The file, as the library tokenizers writes it.
        text: The text that it is for. All its characters and its start are encoded on trial.

    Raises:
        TangleNASError: The file is no tokenizer, drops merges at random, or cannot encode the text.
    """
    with refusals(f"{label}: {path} is no tokenizer.json"):
        content = Path(path).read_text("utf-8-sig")
        tokenizer = Tokenizer.from_str(content)
        dropout = json.loads(content)["model"].get("dropout")
        count = max(tokenizer.get_vocab().values(), default=-1) + 1
    if dropout:
        raise TangleNASError(
            f"{label}: {path} has a dropout of {dropout}, so that a text has other tokens each time. Set it to null in "
            "the file"
        )
    if count != tokenizer.get_vocab_size():
        raise TangleNASError(
            f"{label}: {path} has {tokenizer.get_vocab_size()} tokens with numbers up to {count - 1}, expected the "
            f"numbers from 0 to {tokenizer.get_vocab_size() - 1}. Give another file"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with refusals(f"{label}: {path} cannot encode the text"):
        tokenizer.encode_batch_fast([text[:10_000], "".join(sorted(set(text)))], add_special_tokens=False)
    return tokenizer


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the token that stands for whatever a tokenizer does not know, or None if it has no such token.

    The library has the token's spelling as an attribute of some models, and nothing for Unigram.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "Unigram":
        number: int | None = model["unk_id"]
        return number
    return None if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])


def unknown_strings(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[tuple[int, int, str]]:
    """Yield the unknown tokens of a text: their position, and the start and content of the string that each stands for.

    The unknown token is a known one where the text spells it: BPE on bytes may name its separator of documents so, and
    the Penn Treebank writes `<unk>` itself.

    Args:
        tokenizer: The tokenizer. If it has no unknown token, nothing is unknown.
        pieces: The text, in the parts that are encoded at a time.
    """
    if (unknown := unknown_token(tokenizer)) is None:
        return
    spelling = tokenizer.id_to_token(unknown)
    tokens = characters = 0
    for piece in pieces:
        encoded = tokenizer.encode(piece, add_special_tokens=False)
        ids = encoded.ids
        for place, (token, (start, end)) in enumerate(zip(ids, encoded.offsets, strict=True), tokens):
            # A special token may take the white space beside it.
            if token == unknown and (string := piece[start:end]).strip() != spelling:
                yield place, characters + start, string
        tokens += len(ids)
        characters += len(piece)


def dropped(tokenizer: Tokenizer, pieces: Iterable[str]) -> Counter[str]:
    """Count the characters of a text, but for white space, that a tokenizer without an unknown token leaves out.

    Only BPE does so; other models refuse to encode them.
    """
    if not isinstance(tokenizer.model, BPE):
        return Counter()
    strings = unknown_strings(_with_unknown_token(tokenizer), pieces)
    # The bytes of one character are tokens with one start.
    places = groupby((start, string) for _, start, string in strings)
    return Counter(string for (_, string), _ in places if string.strip())


def _with_unknown_token(tokenizer: Tokenizer) -> Tokenizer:
    """Return a BPE with an unknown token in place of each character that the given one leaves out.

    It meets each character as the given one does: normalized, within its word, and apart from special tokens. A
    character that is left out shifts the offsets of those behind it, so that the given one's do not tell which it was.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    unknown = "<unk>" + max(tokenizer.get_vocab(), key=len, default="")  # longer than all tokens, so none of them
    model["vocab"][unknown] = len(model["vocab"])
    model.update(unk_token=unknown, fuse_unk=False)
    return Tokenizer.from_str(json.dumps(content))


@contextmanager
def refusals(message: str, remedy: str = "Give another file.") -> Iterator[None]:
    """Turn any error of the library into a sentence. It raises no narrower type, and its panics are no Exception.

    Args:
        message: The start of the error, before the library's reason.
        remedy: The end of the error, the next step.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300]
        raise TangleNASError(f"{message}: {reason}. {remedy}") from error
