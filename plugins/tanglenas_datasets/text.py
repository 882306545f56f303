"""Datasets of text: your own, or the source code of Python's standard library."""

import hashlib
import math
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tanglenas_datasets.tokenizer_file import dropped, read_tokenizer, unknown_strings, unknown_token
from tanglenas_engine import Dataset, TangleNASError, TokenSamples, at_least, content_hash, data_path

UNKNOWN = "<unk>"
END = "<|endoftext|>"
# The number of characters that are encoded at a time, by our tokenizers and by a tokenizer.json at most. A library's
# tokenizer takes many bytes for each character of a text.
_PIECE, _LONG_PIECE = 1 << 16, 1 << 20
_PATTERN = "*.txt"
_VOCAB_SIZE = 4096
# A text with a larger share of unknown tokens is not one for its tokenizer. The Penn Treebank with its 10,000 words, a
# text with many of them, has 4.8 % (Merity et al., Pointer Sentinel Mixture Models, 2016, table 1).
_MOST_UNKNOWN = 0.05
# A test text whose share exceeds the text's by more than this is of another kind: the network learned to expect fewer
# of them, and "char" learned none. A short one has some more by chance, so that standard errors are added. They are
# those of the text's share, which counts as at least 1 %: a text without unknown tokens would have none.
_MOST_MORE_UNKNOWN, _STANDARD_ERRORS = 0.01, 4


class Text(Dataset):
    """A dataset of the tokens of a text, in windows of `block_size`, each with the token that follows.

    `make_splits` deals blocks of consecutive windows to the splits, the test split included, and no window crosses the
    border of a block. If `test_portion` is given, the last part of the text is the official test part instead, as the
    literature has it for tiny-shakespeare. `test_root` gives another text as test part. The vocabulary is made from the
    text without an official test part. Windows lie end to end; in training, each window starts at a random token within
    its place.

    Args:
        root: A text file in UTF-8, or a folder. The files in a folder that match `pattern`, at any depth, are joined.
        block_size: Tokens in a window.
        tokenizer: "char", "bpe", or the path of a `tokenizer.json`, which is used as it is; it gets a longer text in
            parts of up to 1,048,576 characters, which end at line breaks. "char" has a token for each character that
            occurs, and `<unk>` for others. "bpe" is trained on the text, on bytes: it encodes any text.
        vocab_size: Tokens of "bpe", by default 4096. Other tokenizers refuse it.
        test_portion: Share of the characters, the last ones, that are the test part. None deals test windows too.
        test_root: A file or folder that is the test part instead.
        pattern: Pattern of the files in a folder; names that start with a dot are skipped.

    Raises:
        TangleNASError: A file or folder is missing, empty or not UTF-8, the text is shorter than a few windows, the
            tokenizer does not know more than 5 % of its tokens or drops more than 5 % of its characters, this share of
            the test part exceeds the text's by more than 1 percentage point and 4 standard errors, or an option would
            do nothing.
    """

    name = "text"
    labels = None
    _folders: Sequence[Path] = ()
    """The folders that texts were read from, which `describe` tells about."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        block_size: int = 64,
        tokenizer: str = "char",
        vocab_size: int | None = None,
        test_portion: float | None = None,
        test_root: str | os.PathLike[str] | None = None,
        pattern: str = _PATTERN,
    ) -> None:
        if test_root is not None and test_portion is not None:
            raise TangleNASError(
                f"{self.name}: test_root gives the test part, so test_portion {test_portion} would do nothing: set one "
                "of them to None."
            )
        paths = [data_path(it) for it in (root, test_root) if it is not None]
        if pattern != _PATTERN and all(path.is_file() for path in paths):
            raise TangleNASError(
                f"{self.name}: root is a file, so pattern {pattern!r} would do nothing: give a folder, or leave it out."
            )
        self._read_paths: set[Path] = set()
        test_files = [] if test_root is None else self._files(test_root, pattern)
        text = self._read(root, pattern, {_identity(path): path for path in test_files})
        test = None if test_root is None else self._read(test_root, pattern)
        self._prepare(text, test, block_size, tokenizer, vocab_size, test_portion)
        self._folders = [path for path in paths if path.is_dir()]

    def _prepare(
        self,
        text: str,
        test: str | None,
        block_size: int,
        tokenizer: str,
        vocab_size: int | None,
        test_portion: float | None,
    ) -> None:
        at_least(f"{self.name}: block_size", block_size, 1)
        if test_portion is not None and not (isinstance(test_portion, Real) and 0 < test_portion < 1):
            raise TangleNASError(f"{self.name}: test_portion is {test_portion!r}; give a share between 0 and 1.")
        if test is None and test_portion is not None:
            cut = int(len(text) * (1 - test_portion))
            text, test = text[:cut], text[cut:]
        if vocab_size is not None and tokenizer != "bpe":
            raise TangleNASError(
                f"{self.name}: vocab_size is {vocab_size}, and the tokenizer {tokenizer!r} has a vocabulary of its "
                "own: set tokenizer = 'bpe', or leave out vocab_size."
            )
        self.block_size = block_size
        self._own_tokenizer = tokenizer in ("char", "bpe")
        self.tokenizer = self._tokenizer(tokenizer, _VOCAB_SIZE if vocab_size is None else vocab_size, text)
        self.vocab_size: int = self.tokenizer.get_vocab_size()
        texts = {"the text": text} if test is None else {"the text": text, "the test part": test}
        tokens = {part: self.encode(content).int() for part, content in texts.items()}
        unknown = self._unknown(texts, tokens, tokenizer)
        parts = [self._rows(one, part) for part, one in tokens.items()]
        self._pool = torch.cat(parts)  # (N, block_size + 1)
        self._first_test = len(parts[0])
        if test is not None:
            self.test_indices = torch.arange(self._first_test, len(self._pool))
        self.fingerprint = content_hash(*parts, self.tokenizer.to_str())
        # Whoever reads the stored tokenizer shall get the tokens of the windows, and none that begin or end a text.
        # The fingerprint is as before, so that the splits of earlier runs fit.
        self.tokenizer.post_processor = None
        self._description = (
            f"  {len(text) + len(test or ''):,} characters, {self.vocab_size:,} kinds of tokens by {tokenizer}{unknown}"
        )

    def describe(self) -> str:
        return "\n".join([*map(self._read_of, self._folders), self._description])

    def __len__(self) -> int:
        return len(self._pool)

    def space_options(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "block_size": self.block_size}

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.tokenizer.to_str(pretty=True)}

    def subset(self, indices: Tensor, *, train: bool) -> TokenSamples:
        # The gap keeps the last window before the test part from reaching into it.
        return TokenSamples(self._pool[indices], indices + (indices >= self._first_test), shift=train)

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, shape (n,), int64."""
        encoded = self.tokenizer.encode_batch_fast([*self._encoded_at_a_time(text)], add_special_tokens=False)
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(np.array(e.ids, np.int64) for e in encoded)]))

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens (n,)."""
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text

    def _files(self, root: str | os.PathLike[str], pattern: str) -> list[Path]:
        """Return the files of a text in their order.

        Raises:
            TangleNASError: There is no such file or folder, or a file is there twice, by links.
        """
        root = data_path(root)
        if not root.exists():
            raise TangleNASError(
                f"{self.name}: there is no file or folder {root}. Give root= (create_dataset.root in a gin file), a "
                "text file or a folder."
            )
        if not root.is_dir():
            return [root]
        found = (path for path in sorted(root.rglob(pattern)) if path.is_file())
        paths = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
        seen: dict[tuple[int, int], Path] = {}
        for path in paths:
            if (first := seen.setdefault(_identity(path), path)) is not path:
                raise TangleNASError(
                    f"{self.name}: {path} and {first} are one file, and its text would be in several splits: remove "
                    "one of them, or leave it out with pattern=."
                )
        return paths

    def _read(
        self, root: str | os.PathLike[str], pattern: str, apart: Mapping[tuple[int, int], Path] | None = None
    ) -> str:
        """Return the text of a file or folder without the files of the test part, which may lie in the same folder."""
        paths = [path for path in self._files(root, pattern) if _identity(path) not in (apart or {})]
        self._read_paths.update(paths)
        text, root = "".join(map(self._decoded, paths)), data_path(root)
        if apart and not paths:
            raise TangleNASError(f"{self.name}: all text of {root} is the test part. Give another root= or test_root=.")
        if not text.strip():
            what = f"has no text in files {pattern}" if root.is_dir() else "is empty"
            raise TangleNASError(f"{self.name}: {root} {what}. Put text there, or give another root= or pattern=.")
        return text

    def _read_of(self, folder: Path) -> str:
        """Return a line with the number of files that were read of a folder, and the suffixes of the others."""
        read, others = 0, Counter[str]()
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(place, name) for name in names if not name.startswith(".")):
                if path in self._read_paths:
                    read += 1
                else:
                    others[path.suffix or "without suffix"] += 1
        passed = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(5))
        return f"  {folder}: {read:,} files" + (f" (passed over: {passed})" if passed else "")

    def _decoded(self, path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TangleNASError(
                f"{self.name}: {path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. "
                "Convert the file (iconv -f LATIN1 -t UTF-8, if that is what it is), or leave it out with pattern=."
            ) from None

    def _tokenizer(self, kind: str, vocab_size: int, text: str) -> Tokenizer:
        if kind == "char":
            vocabulary = [UNKNOWN, *sorted(set(text))]
            tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=UNKNOWN))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
            return tokenizer
        if kind == "bpe":
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            at_least(f"{self.name}: vocab_size", vocab_size, len(alphabet) + 1)  # bytes come first
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
            )
            tokenizer.train_from_iterator(_pieces(text), trainer)
            return tokenizer
        if not isinstance(kind, str | os.PathLike) or not (path := data_path(kind)).is_file():
            raise TangleNASError(
                f"{self.name}: tokenizer is {kind!r}; give 'char', 'bpe', or the path of a tokenizer.json that exists."
            )
        return read_tokenizer(self.name, str(path), text)

    def _encoded_at_a_time(self, text: str) -> Iterator[str]:
        return _pieces(text) if self._own_tokenizer else _pieces_of_lines(text)

    def _rows(self, tokens: Tensor, part: str) -> Tensor:
        """Return all full windows of tokens (n,), each with the token after it, shape (windows, block_size + 1)."""
        length = self.block_size + 1
        if len(tokens) < length:
            raise TangleNASError(
                f"{self.name}: {part} has {len(tokens)} tokens, too few for a window of block_size {self.block_size} "
                "and the token after it. Use more text, or a smaller block_size."
            )
        return tokens[: self._used(tokens)].view(-1, length)

    def _used(self, tokens: Tensor) -> int:
        """Return the number of the first tokens (n,) that are in full windows."""
        return len(tokens) - len(tokens) % (self.block_size + 1)

    def _unknown(self, texts: Mapping[str, str], tokens: Mapping[str, Tensor], kind: str) -> str:
        """Return a line with the share of each part that is unknown, or "" where all is known.

        It is that of unknown tokens in the windows, or of characters that become no token where a tokenizer has no
        unknown token.

        Raises:
            TangleNASError: The share of the text is too large, or that of the test part much larger than the text's.
        """
        unknown = unknown_token(self.tokenizer)
        if unknown is None and self._own_tokenizer:
            return ""  # "bpe" has all bytes
        if unknown is None:
            unit, sizes = "characters", {part: len(one) for part, one in texts.items()}
            found = {part: dropped(self.tokenizer, self._encoded_at_a_time(one)) for part, one in texts.items()}
        else:
            unit, sizes = "tokens", {part: self._used(one) for part, one in tokens.items()}
            found = {
                part: self._unknown_strings(texts[part], tokens[part][:size], unknown) for part, size in sizes.items()
            }
        shares = {part: found[part].total() / max(size, 1) for part, size in sizes.items()}
        expected = shares["the text"]
        error = math.sqrt(max(expected, _MOST_MORE_UNKNOWN) / max(sizes.get("the test part", 0), 1))
        limits = {
            "the text": (_MOST_UNKNOWN, "a tokenizer.json made for such text"),
            "the test part": (
                expected + _MOST_MORE_UNKNOWN + _STANDARD_ERRORS * error,
                "another test_root or test_portion",
            ),
        }
        for part, share in shares.items():
            most, remedy = limits[part]
            if share > most:
                examples = ", ".join(repr(one[:40]) for one, _ in found[part].most_common(5))
                raise TangleNASError(
                    f"{self.name}: tokenizer {kind} does not know {100 * share:.1f} % of the {unit} of {part} "
                    f"({examples}...), expected at most {100 * most:.1f} %. Give {remedy}, or tokenizer='bpe', "
                    "which is trained on the text and knows all characters."
                )
        said = ", ".join(f"{100 * share:.2g} % of {part}" for part, share in shares.items())
        return f"\n  {unit} that the tokenizer does not know: {said}" if any(shares.values()) else ""

    def _unknown_strings(self, text: str, tokens: Tensor, unknown: int) -> Counter[str]:
        """Count the strings that become unknown tokens among the first tokens (n,) of a text."""
        if not (tokens == unknown).any():
            return Counter()  # the strings are found by encoding the text again
        found = unknown_strings(self.tokenizer, self._encoded_at_a_time(text))
        return Counter(string for place, _, string in found if place < len(tokens))


class StdlibText(Text):
    """A dataset of the source code of Python's own standard library, a text that every machine has.

    The order of the modules depends on their names alone but looks random, so that every split has some of each kind.
    Another version of Python has another text.

    Args:
        characters: Largest number of characters.
        block_size, tokenizer, vocab_size, test_portion: See `Text`.
    """

    name = "stdlib_text"

    def __init__(
        self,
        characters: int = 1_000_000,
        block_size: int = 64,
        tokenizer: str = "char",
        vocab_size: int | None = None,
        test_portion: float | None = None,
    ) -> None:
        at_least(f"{self.name}: characters", characters, 1)
        text = _up_to(characters, map(self._decoded, _stdlib_sources()))
        if not text:
            raise TangleNASError(
                f"{self.name}: {_stdlib()} has no sources of the standard library, as this Python comes without them. "
                "Use the dataset 'text'."
            )
        self._prepare(text, None, block_size, tokenizer, vocab_size, test_portion)

    @classmethod
    def edition(cls) -> str:
        return f"Python {platform.python_version()}"


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_sources() -> list[Path]:
    """List the modules of the standard library, without installed packages and without tests (odd encodings)."""
    apart = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    found = []
    for folder, inner, names in os.walk(_stdlib()):
        inner[:] = set(inner) - apart
        found += [Path(folder, name).relative_to(_stdlib()) for name in names if name.endswith(".py")]
    return [_stdlib() / p for p in sorted(found, key=lambda p: hashlib.sha256(p.as_posix().encode()).hexdigest())]


def _up_to(characters: int, texts: Iterable[str]) -> str:
    """Return the first `characters` of the texts together, and read no more texts than that needs."""

    def taken() -> Iterator[str]:
        left = characters
        for text in texts:
            if left <= 0:
                return
            yield text[:left]
            left -= len(text)

    return "".join(taken())


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of one length."""
    return (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))


def _pieces_of_lines(text: str) -> Iterator[str]:
    """Cut a long text behind line breaks, or anywhere in a line that is longer than a piece."""
    start = 0
    while len(text) - start > _LONG_PIECE:
        end = text.rfind("\n", start, start + _LONG_PIECE) + 1 or start + _LONG_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from others, whatever its name."""
    status = path.stat()
    return status.st_dev, status.st_ino
