"""Reads a `tokenizer.json` of someone else. One that cannot encode a text, or not twice alike, is refused."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

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
    with _refusals(f"{label}: {path} is no tokenizer.json"):
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
    with _refusals(f"{label}: {path} cannot encode the text"):
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


def dropped(tokenizer: Tokenizer, text: str) -> Counter[str]:
    """Count the characters of a text, but for white space, that become no token, not even an unknown one.

    A BPE without an unknown token leaves out what it does not know.
    """
    counts = Counter(text)
    characters = [one for one in counts if not one.isspace()]
    # Tokenizers may put a space before a text, whose token counts as a part of the first character.
    encoded = tokenizer.encode_batch([2 * one for one in characters], add_special_tokens=False)
    pairs = zip(characters, encoded, strict=True)
    return Counter({one: counts[one] for one, twice in pairs if all(end < 2 for _, end in twice.offsets)})


@contextmanager
def _refusals(message: str) -> Iterator[None]:
    """Turn any error of the library into a sentence. It raises no narrower type, and its panics are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300]
        raise TangleNASError(f"{message}: {reason}. Give another file.") from error
