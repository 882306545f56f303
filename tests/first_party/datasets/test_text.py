"""Text: vocabularies from the training part, windows that stay in their split, and what is said about bad files."""

import hashlib
import itertools
import os
import pickle
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from forked import Forked
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tanglenas_datasets.digits import Digits
from tanglenas_datasets.text import StdlibText, Text
from tanglenas_datasets.tokenizer_file import unknown_token
from tanglenas_engine import content_hash, create_dataset, create_space
from tanglenas_engine.data import Dataset, Stream, TokenSamples, batches, make_splits, open_splits
from tanglenas_engine.errors import TangleNASError

SPLITS = {"a": "architecture", "w": "weights", "v": "validation", "t": "test"}


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def letters(tmp_path):
    """A text of 2,000 random letters: any 8 in a row are there once."""
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrst\n", k=2000))
    assert len({text[i : i + 8] for i in range(1993)}) == 1993
    return text, Text(written(tmp_path / "letters.txt", text), block_size=9)


# Windows and splits.


def test_a_target_is_the_token_that_follows(letters):
    text, dataset = letters
    (inputs, targets), *_ = batches(dataset.subset(torch.arange(3), train=False), 3)
    assert inputs.shape == targets.shape == (3, 9) and inputs.dtype == targets.dtype == torch.int64
    assert [dataset.decode(row) for row in inputs] == [text[0:9], text[10:19], text[20:29]]
    assert [dataset.decode(row) for row in targets] == [text[1:10], text[11:20], text[21:30]]


def test_every_split_has_blocks_from_every_part_of_the_text(letters):
    _, dataset = letters
    splits = make_splits(dataset, seed=0)
    assert splits.sizes() == {"weights": 72, "architecture": 72, "validation": 16, "test": 40}
    assert splits.assignment != make_splits(dataset, seed=7).assignment
    assert splits == make_splits(dataset, seed=0)
    other = make_splits(dataset, seed=0, train_portion=0.75)
    assert other.validation.equal(splits.validation) and other.test.equal(splits.test)
    assert len(other.weights) == 108
    for part in range(0, 200, 100):  # each half of the text is shared out like the whole
        half = splits.assignment[part : part + 100]
        assert [half.count(letter) for letter in "wavt"] == pytest.approx([36, 36, 8, 20], abs=8)


def test_blocks_stay_together_and_get_shorter_in_a_short_text():
    class Long(Numbers):
        def __len__(self):
            return 4000

    for block in (8, 5):
        assignment = make_splits(Long(), seed=0, block=block).assignment
        runs = [(letter, len(list(run))) for letter, run in itertools.groupby(assignment)]
        whole = [count % block == 0 for _, count in runs]
        assert sum(whole) > 0.95 * len(whole)  # a border between splits may cut a block
    assert max(len(list(run)) for _, run in itertools.groupby(make_splits(Numbers(), seed=0).assignment)) < 8


@pytest.mark.parametrize("block", [0, -1, 2.0, True])
def test_a_block_has_at_least_one_sample(block):
    with pytest.raises(TangleNASError, match=f"make_splits.block is {block}, expected a whole number of at least 1"):
        make_splits(Numbers(), seed=0, block=block)


class Numbers(Dataset):
    """Rows of the numbers from 0 on, without an official test part."""

    name, labels, fingerprint = "numbers", None, "0"

    def __len__(self):
        return 50

    def subset(self, indices, *, train):
        return TokenSamples(torch.arange(250).view(50, 5)[indices], indices, shift=train)


def places(text, dataset, samples, count=300):
    """Where in the text the windows of many training batches start; each with the token after it."""
    found = []
    for inputs, targets in itertools.islice(Stream(samples, min(8, len(samples)), seed=0).start(), count):
        for row, last in zip(inputs, targets[:, -1:], strict=True):
            found.append(text.index(dataset.decode(torch.cat([row, last]))))
    return found


def test_windows_never_cross_the_border_of_a_split(letters):
    text, dataset = letters
    splits = make_splits(dataset, seed=0)
    view = open_splits(dataset, splits, [*SPLITS.values(), "training"])
    for letter, name in SPLITS.items():
        rows = {row for row, other in enumerate(splits.assignment) if other == letter}
        starts = set(places(text, dataset, getattr(view, name), count=1200))
        laid = {10 * row for row in rows}
        if name in ("weights", "architecture"):
            # A window starts anywhere in its place, if the row behind it is in the split too.
            assert starts == laid | {10 * row + late for row in rows if row + 1 in rows for late in range(10)}
        else:
            assert starts == laid
    inner = next(row for row in range(200) if splits.assignment[row : row + 2] in ("wa", "aw"))
    assert set(range(10 * inner + 1, 10 * inner + 10)) & set(places(text, dataset, view.training, count=1200))


def test_windows_never_run_into_the_test_part(tmp_path):
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrst", k=507))
    dataset = Text(written(tmp_path / "t.txt", text), block_size=9, test_portion=0.1)
    assert len(dataset) == 45 + 5 and dataset.test_indices.tolist() == [45, 46, 47, 48, 49]
    # 456 characters are not test, and 6 of them are in no window.
    starts = places(text, dataset, dataset.subset(torch.arange(50), train=True))
    assert not {start for start in starts if 440 < start < 456}
    assert {440, 456, 457, 496} <= set(starts)


def test_windows_of_rows_apart_do_not_reach_into_each_other(letters):
    text, dataset = letters
    starts = places(text, dataset, dataset.subset(torch.tensor([3, 4, 8, 20, 21]), train=True))
    assert set(starts) == {*range(30, 41), 80, *range(200, 211)}


def test_streams_of_text_resume_and_follow_their_seed(letters):
    _, dataset = letters
    samples = dataset.subset(torch.arange(60), train=True)

    def taken(seed, step=0, workers=0):
        stream = Stream(samples, 8, seed=seed, num_workers=workers)
        return list(itertools.islice(stream.start(step), 20 - step))

    for one, other in zip(taken(1)[13:], taken(1, 13), strict=True):
        assert one[0].equal(other[0]) and one[1].equal(other[1])
    assert not taken(1)[0][0].equal(taken(2)[0][0])
    evaluated = [list(batches(dataset.subset(torch.arange(20), train=False), 8)) for _ in range(2)]
    assert all(a[0].equal(b[0]) for a, b in zip(*evaluated, strict=True))
    assert [len(inputs) for inputs, _ in evaluated[0]] == [8, 8, 4]


def test_a_subset_holds_its_own_tokens_and_no_others(letters):
    _, dataset = letters
    part = dataset.subset(torch.tensor([1, 2]), train=True)
    assert part._tokens.untyped_storage().nbytes() == 2 * 10 * part._tokens.element_size()
    before = part._tokens.clone()
    dataset._pool.zero_()
    assert part._tokens.equal(before) and part.labels is None
    again = pickle.loads(pickle.dumps(part))
    assert len(again) == 2 and again._tokens.equal(before)


def test_a_dataset_without_labels_says_its_own_length():
    class Forgetful(Numbers):
        __len__ = Dataset.__len__

    with pytest.raises(NotImplementedError, match="Forgetful has no labels: it must say its own length"):
        len(Forgetful())


def test_text_too_short_for_four_splits_is_refused(tmp_path):
    dataset = Text(written(tmp_path / "t.txt", "abcdefghij" * 4), block_size=3)
    with pytest.raises(TangleNASError, match="text has 10 samples, too few for these portions: validation"):
        make_splits(dataset, seed=0, validation_portion=0.01)


# Vocabularies.


def test_the_vocabulary_is_of_what_is_not_test(tmp_path):
    dataset = Text(written(tmp_path / "t.txt", "abcab" * 180 + "abcaé" + "abcab" * 19), block_size=4, test_portion=0.1)
    assert dataset.vocab_size == 4 and dataset.tokenizer.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    assert dataset.encode("cabé<").tolist() == [3, 1, 2, 0, 0]
    assert dataset.decode(torch.tensor([3, 1, 0])) == "ca<unk>"
    assert (dataset._pool == 0).sum() == 1


def test_every_character_is_a_token_line_ends_and_all(tmp_path):
    text = "a\r\nb\tc \u2028\U0001f600\x00e\u0301\n" * 20
    dataset = Text(written(tmp_path / "t.txt", "\ufeff" + text), block_size=4)
    assert len(dataset.encode(text)) == len(text) and dataset.decode(dataset.encode(text)) == text
    assert dataset.vocab_size == len(set(text)) + 1
    assert dataset.encode("").shape == (0,)


def test_a_text_longer_than_what_is_encoded_at_a_time_is_the_same(tmp_path):
    text = "".join(random.Random(0).choices("abc\n", k=150_000))
    dataset = Text(written(tmp_path / "t.txt", text), block_size=99)
    assert dataset.decode(dataset._pool.flatten()) == text


SOURCE = Path(hashlib.__file__).read_text() + Path(random.__file__).read_text()


def test_byte_pairs_are_learned_from_the_text_and_know_every_other(tmp_path):
    dataset = Text(written(tmp_path / "t.txt", SOURCE), tokenizer="bpe", vocab_size=600)
    assert dataset.vocab_size == dataset.tokenizer.get_vocab_size() == 600
    assert dataset._pool.max() < 600
    assert len(dataset) * 65 < 0.7 * len(SOURCE)
    for text in (SOURCE, "Größe \U0001f600\r\n\x00", "one<|endoftext|>two"):
        assert dataset.decode(dataset.encode(text)) == text
    assert len(dataset.encode("<|endoftext|>")) == 1


@pytest.mark.exhaustive
def test_byte_pairs_are_the_same_in_every_process(tmp_path):
    path = written(tmp_path / "t.txt", SOURCE)
    code = f"from tanglenas_datasets.text import Text; print(Text({str(path)!r}, tokenizer='bpe').fingerprint)"
    found = Forked(code, environment={**os.environ, "RAYON_NUM_THREADS": "3"}).finished()
    assert found.strip() == Text(path, tokenizer="bpe").fingerprint


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_tokenizer_is_saved_and_used_as_a_file(tmp_path, kind):
    dataset = Text(written(tmp_path / "t.txt", SOURCE), tokenizer=kind)
    dataset.tokenizer.enable_truncation(5)
    dataset.tokenizer.enable_padding(length=100_000)
    dataset.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Text(tmp_path / "t.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert again._pool.equal(dataset._pool) and again.vocab_size == dataset.vocab_size
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab() == again.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["TemplateProcessing", "ByteLevel"])
def test_the_stored_tokenizer_gives_the_tokens_of_the_dataset(tmp_path, kind):
    """A post-processor adds tokens that the network never saw. What spells one of them is such a token all the same."""
    tokenizer = Text(written(tmp_path / "t.txt", SOURCE), tokenizer="bpe").tokenizer
    end = tokenizer.token_to_id("<|endoftext|>")
    template = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)])
    tokenizer.post_processor = template if kind == "TemplateProcessing" else processors.ByteLevel(trim_offsets=True)
    dataset = Text(tmp_path / "t.txt", tokenizer=str(written(tmp_path / "tokenizer.json", tokenizer.to_str())))
    stored = Tokenizer.from_str(dataset.files()["tokenizer.json"])
    for text in ("def f", "", "one<|endoftext|>two"):
        assert stored.encode(text).ids == dataset.encode(text).tolist()
        assert stored.encode(text).ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert dataset.fingerprint == content_hash(dataset._pool, tokenizer.to_str())  # as of versions that kept it


@pytest.mark.parametrize("kind", ["WhitespaceSplit", "Metaspace", "ByteLevel"])
def test_a_tokenizer_file_that_drops_the_text_is_refused(tmp_path, kind):
    """Without an unknown token, BPE makes nothing of what it does not know. Here these are the last two letters."""
    characters = "▁Ġabcde\n"
    tokenizer = Tokenizer(models.BPE({one: number for number, one in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = getattr(pre_tokenizers, kind)()
    path = str(written(tmp_path / "tokenizer.json", tokenizer.to_str()))
    known = written(tmp_path / "known.txt", "a b ccd ee " * 99)
    assert "not know" not in Text(known, block_size=8, tokenizer=path).describe()
    with pytest.raises(
        TangleNASError, match=r"not know 50.0 % of the characters of the text \('щ', 'x'\.\.\.\), expected at"
    ):
        Text(written(tmp_path / "t.txt", "a щщx " * 99), block_size=8, tokenizer=path)
    with pytest.raises(
        TangleNASError, match=r"% of the characters of the test part \('щ'\.\.\.\), expected at most 2.6 %"
    ):
        Text(known, block_size=8, tokenizer=path, test_root=written(tmp_path / "test.txt", "a щ b " * 99))


CODES, SYLLABLES = "Thus Q1 V2 J3 B4 then W5 X6 " * 99, "한국어 문장은 여기에 있다 그리고 또 있다 " * 50
IN_CONTEXT = {  # options of BPE, a normalizer, a pre-tokenizer, and a text
    "a suffix": ({"end_of_word_suffix": "</w>"}, None, None, CODES),
    "a prefix": ({"continuing_subword_prefix": "##"}, None, None, CODES),
    "composed": ({}, normalizers.NFC(), None, unicodedata.normalize("NFD", SYLLABLES)),
    "a separator": ({}, normalizers.Lowercase(), None, "A cat sat<|END|>the dog sat<|END|>" * 99),
    "a delimiter": ({}, None, pre_tokenizers.CharDelimiterSplit("|"), "AB|BA|CC|ABC|" * 99),
}


@pytest.mark.parametrize("case", IN_CONTEXT)
def test_characters_that_become_tokens_in_their_context_are_known(tmp_path, case):
    """Alone, some characters of each text are no tokens. Others behind them are dropped, and told by name."""
    model, normalizer, pre_tokenizer, text = IN_CONTEXT[case]
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(
        text.split("<|END|>"), trainers.BpeTrainer(vocab_size=60, show_progress=False, **model)
    )
    tokenizer.add_special_tokens(["<|END|>"])  # behind the vocabulary of the model
    path = str(written(tmp_path / "tokenizer.json", tokenizer.to_str()))
    dataset = Text(written(tmp_path / "a.txt", text), block_size=8, tokenizer=path)
    assert "not know" not in dataset.describe()
    strange = written(tmp_path / "b.txt", text + "щ" * (len(text) // 9))
    with pytest.raises(TangleNASError, match=r"not know 10.0 % of the characters of the text \('щ'\.\.\.\)"):
        Text(strange, block_size=8, tokenizer=path)


def test_a_text_that_spells_the_unknown_token_knows_it(tmp_path):
    """The separator of documents is the unknown token of GPT-2's byte pairs, which know every byte."""
    tokenizer = Text(written(tmp_path / "t.txt", SOURCE), tokenizer="bpe").tokenizer
    tokenizer.model.unk_token = "<|endoftext|>"
    path = str(written(tmp_path / "tokenizer.json", tokenizer.to_str()))
    text = written(tmp_path / "a.txt", "def f: x\n<|endoftext|>" * 99)
    dataset = Text(text, block_size=8, tokenizer=path)
    assert (dataset._pool == unknown_token(tokenizer)).sum() > 90 and "not know" not in dataset.describe()


def test_a_test_part_of_another_kind_is_refused(tmp_path):
    text, other = written(tmp_path / "a.txt", "some text. " * 40), written(tmp_path / "b.txt", "ξένο κείμενο " * 40)
    message = r"tokenizer char does not know 84.6 % of the tokens of the test part \(.*'έ'.*most 2.8 %.*'bpe'"
    with pytest.raises(TangleNASError, match=message):
        Text(text, block_size=8, test_root=other)
    assert len(Text(text, block_size=8, test_root=other, tokenizer="bpe", vocab_size=300).test_indices) > 40


WORDS = {"?": 0, "None": 1, "a": 2, "b": 3}
METASPACE = [(f"▁{word}", -1.0) for word in ("None", "a", "b")]
MODELS = {  # each with the number of its unknown token
    "WordLevel": (lambda: models.WordLevel(WORDS, unk_token="?"), 0),
    "WordPiece": (lambda: models.WordPiece(WORDS, unk_token="?"), 0),
    "BPE": (lambda: models.BPE(WORDS, [], unk_token="?", fuse_unk=True), 0),
    "Unigram": (lambda: models.Unigram([*METASPACE, ("?", -9.0)], 3, False), 3),
    "BPE without an unknown token": (lambda: models.BPE(WORDS, []), None),
    "Unigram without an unknown token": (lambda: models.Unigram(METASPACE, None, False), None),
}


def tokenizer_file(folder, kind):
    tokenizer = Tokenizer(MODELS[kind][0]())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if "Unigram" in kind else pre_tokenizers.WhitespaceSplit()
    return written(folder / "tokenizer.json", tokenizer.to_str())


@pytest.mark.parametrize("kind", MODELS)
def test_the_unknown_token_is_that_of_the_model(tmp_path, kind):
    assert unknown_token(Tokenizer.from_file(str(tokenizer_file(tmp_path, kind)))) == MODELS[kind][1]


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_a_tokenizer_file_that_does_not_know_the_text_is_refused(tmp_path, kind):
    """One unknown word in 25 is taken and told; one in 10 is too much. A test part may have 1 % more than the text."""
    path = tokenizer_file(tmp_path, kind)

    def text(every):
        return written(tmp_path / f"{every}.txt", ("a " * (every - 1) + "щука ") * (500 // every) + "a")

    known = Text(text(500), block_size=18, tokenizer=str(path), test_root=text(250))
    told = r"  tokens that the tokenizer does not know: 0\S* % of the text, 0\.\d+ % of the test part"
    assert re.fullmatch(told, known.describe().splitlines()[-1])
    assert "not know" not in Text(written(tmp_path / "a.txt", "a b " * 99 + "a"), 18, str(path)).describe()
    of_text = (
        r"tokenizer \S+tokenizer.json does not know \S+ % of the tokens of the text \(' ?щука'\.\.\.\), expected at "
    )
    with pytest.raises(TangleNASError, match=of_text + r"most 5.0 %. Give a tokenizer.json made for such text"):
        Text(text(10), block_size=18, tokenizer=str(path))
    with pytest.raises(
        TangleNASError, match=r"of the test part \(' ?щука'\.\.\.\), expected at most 2.8 %. Give another"
    ):
        Text(tmp_path / "a.txt", block_size=18, tokenizer=str(path), test_root=text(10))
    both = Text(text(25), block_size=18, tokenizer=str(path), test_root=text(20)).describe()
    assert both.endswith("3.8 % of the text, 4.9 % of the test part")


def test_a_short_test_part_may_have_more_unknown_tokens_by_chance(tmp_path):
    """The tokens of text and test part are drawn alike, 3 % of them unknown. Four times the share is another text."""
    path = tokenizer_file(tmp_path, "WordLevel")

    def text(share, seed, words=3000):
        draw = random.Random(seed)
        return " ".join("щука" if draw.random() < share else draw.choice("ab") for _ in range(words))

    for seed in range(40):
        Text(written(tmp_path / "t.txt", text(0.03, seed)), 16, str(path), test_portion=0.1)
    with pytest.raises(TangleNASError, match=r"of the test part .* expected at most"):
        Text(tmp_path / "t.txt", 16, str(path), test_root=written(tmp_path / "o.txt", text(0.12, 0, 300)))


def test_tokens_behind_the_last_window_are_not_judged(tmp_path):
    text = written(tmp_path / "a.txt", "the quick brown fox jumps over it. " * 60)
    test = written(tmp_path / "test.txt", "the quick brown fox jumps over it. " * 8 + "ξένο κείμενο " * 2)
    dataset = Text(text, block_size=256, test_root=test)
    assert len(dataset.test_indices) == 1 and "not know" not in dataset.describe()


# Files.


def test_a_folder_is_its_text_files_in_order(tmp_path):
    for name, text in (("b.txt", "b" * 50), ("a/2.txt", "2" * 50), ("a/1.txt", "1" * 50), ("c.md", "c" * 50)):
        written(tmp_path / name, text)
    for name in (".hidden.txt", ".git/x.txt"):
        written(tmp_path / name, "x" * 50)
    dataset = Text(tmp_path, block_size=9, test_portion=0.2)
    assert dataset.decode(dataset._pool.flatten()) == "1" * 50 + "2" * 50 + "b" * 50
    other = Text(tmp_path, block_size=3, pattern="*.md")
    assert set(other.decode(other._pool.flatten())) == {"c"}


def test_a_test_part_may_be_a_file_of_its_own(tmp_path):
    text = written(tmp_path / "t.txt", "ab" * 50)
    dataset = Text(text, block_size=9, test_root=written(tmp_path / "test.txt", "ba" * 20))
    assert len(dataset) == 14 and dataset.test_indices.tolist() == [10, 11, 12, 13]
    assert dataset.decode(dataset._pool[10]) == "ba" * 5


def test_equal_texts_have_equal_fingerprints_wherever_they_lie(tmp_path):
    text = "some text. " * 40
    found = {
        name: Text(written(tmp_path / name / "t.txt", content), **options).fingerprint
        for name, content, options in (
            ("here", text, {"block_size": 8}),
            ("there", text, {"block_size": 8}),
            ("longer windows", text, {"block_size": 9}),
            ("other text", text.replace("x", "s", 1), {"block_size": 8}),
            ("other letter", text.replace("x", "y"), {"block_size": 8}),
            ("other tokens", text, {"block_size": 8, "tokenizer": "bpe"}),
            ("equal windows, of which the last are a test part", text, {"block_size": 8, "test_portion": 0.1}),
        )
    }
    assert found["here"] == found["there"]
    assert len(set(found.values())) == 6


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"abc\xff" * 100, {}, r"t.txt is not UTF-8: byte 3 is 0xff. Convert the file \(iconv"),
        ("text\nand more\n".encode("utf-16"), {}, "t.txt is not UTF-8: byte 0 is 0xff"),
        (b"", {}, "t.txt is empty. Put text there"),
        (b" \n\n", {}, "t.txt is empty"),
        (b"abcdefghij" * 7, {"test_portion": 0.1}, "the text has 63 tokens, too few for a window of block_size 64"),
        (
            b"abcdefghij" * 10,
            {"test_portion": 0.1},
            "the test part has 10 tokens, too few for a window of block_size 64",
        ),
        (b"abc" * 100, {"block_size": 0}, "block_size is 0, expected a whole number of at least 1"),
        (b"abc" * 100, {"test_portion": 1}, "test_portion is 1; give a share between 0 and 1"),
        (
            b"abc" * 100,
            {"tokenizer": "word"},
            "tokenizer is 'word'; give 'char', 'bpe', or the path",
        ),
        (b"abc" * 100, {"tokenizer": "{path}"}, "t.txt is no tokenizer.json: .* Give another file"),
        (
            b"abc" * 100,
            {"tokenizer": "bpe", "vocab_size": 256},
            "vocab_size is 256, expected a whole number of at least 257",
        ),
    ],
)
def test_what_cannot_be_is_named(tmp_path, content, options, message):
    path = written(tmp_path / "t.txt", content)
    options = {k: str(path) if v == "{path}" else v for k, v in options.items()}
    with pytest.raises(TangleNASError, match=f"^text: .*{message}"):
        Text(path, **options)


def test_a_missing_path_and_a_folder_without_text_are_named(tmp_path):
    with pytest.raises(TangleNASError, match=r"there is no .*nowhere. Give root="):
        Text(tmp_path / "nowhere")
    written(tmp_path / "a.md", "some")
    with pytest.raises(TangleNASError, match=r"has no text in files \*.txt. Put text there, or give"):
        Text(tmp_path)
    with pytest.raises(TangleNASError, match=r"there is no .*nowhere"):
        Text(written(tmp_path / "t.txt", "some text" * 99), test_root=tmp_path / "nowhere")


# The standard library, and spaces that fit.


def test_the_standard_library_is_text_that_is_always_there():
    dataset = create_dataset("stdlib_text", characters=20_000)
    text = dataset.decode(dataset._pool.flatten())
    assert len(dataset) == 20_000 // 65
    assert "import" in text and "def " in text
    assert dataset.fingerprint == StdlibText(20_000).fingerprint != StdlibText(30_000).fingerprint
    longer = StdlibText(30_000)
    assert longer.decode(longer._pool.flatten()).startswith(text)


def test_none_of_the_standard_library_is_refused():
    for characters in (0, 1e5):
        with pytest.raises(TangleNASError, match=rf"stdlib_text: characters is {characters}, expected a whole number"):
            StdlibText(characters)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.exhaustive
def test_a_space_made_with_the_options_of_the_text_learns_it(tokenizer):
    dataset = StdlibText(60_000, block_size=16, tokenizer=tokenizer)
    assert dataset.space_options() == {"vocab_size": dataset.vocab_size, "block_size": 16}
    space = create_space("gpt_nano", **dataset.space_options())
    view = open_splits(dataset, make_splits(dataset, seed=0), ["weights"])
    optimizer = torch.optim.AdamW(space.parameters(), lr=3e-3)
    losses = []
    for inputs, targets in itertools.islice(Stream(view.weights, 16, seed=0).start(), 60):
        loss = torch.nn.functional.cross_entropy(space(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 1


def test_a_space_for_images_is_told_their_shape():
    assert Digits(image_size=16).space_options() == {"num_classes": 10, "image_size": 16, "in_channels": 1}


# A test text of its own


def test_a_test_text_inside_the_folder_of_the_text_is_not_trained_on(tmp_path):
    text = "".join(random.Random(0).choices("abcdefgh", k=600))
    written(tmp_path / "data/a.txt", text)
    written(tmp_path / "data/test/b.txt", text[::-1])
    apart = Text(tmp_path / "data", block_size=4, test_root=tmp_path / "data/test")
    assert apart.decode(apart._pool[: apart._first_test].flatten()) in text
    assert apart.decode(apart._pool[apart._first_test :].flatten()) in text[::-1]
    for root in (tmp_path / "data/test", tmp_path / "data/test/b.txt"):
        with pytest.raises(TangleNASError, match=r"all text of .* is the test part"):
            Text(root, block_size=4, test_root=tmp_path / "data/test")


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    written(tmp_path / "data/a.txt", "abcab" * 100)
    for link in (os.symlink, os.link):
        link(tmp_path / "data/a.txt", tmp_path / "data/b.txt")
        with pytest.raises(TangleNASError, match=r"b.txt and .*a.txt are one file"):
            Text(tmp_path / "data", block_size=4)
        (tmp_path / "data/b.txt").unlink()


def test_an_option_of_another_tokenizer_or_of_folders_is_refused(tmp_path):
    path = written(tmp_path / "a.txt", "abcab" * 100)
    with pytest.raises(TangleNASError, match=r"vocab_size is 2000, and the tokenizer 'char' .*set tokenizer = 'bpe'"):
        Text(path, vocab_size=2000)
    with pytest.raises(TangleNASError, match=r"root is a file, so pattern '\*.md' would do nothing"):
        Text(path, pattern="*.md")


def test_a_text_tells_what_was_read_and_what_was_passed_over(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.txt", "t.txt", "C.TXT", "n.md", "LICENSE", ".hidden", ".git/o.bin"):
        written(tmp_path / name, "abcab" * 100)
    lines = Text(tmp_path, block_size=8, test_root=tmp_path / "t.txt").describe().splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"  {tmp_path}: 3 files (passed over: ")
    assert {*lines[0].split(": ")[-1].rstrip(")").split(", ")} == {"1 .TXT", "1 .md", "1 without suffix"}
    assert lines[1] == "  1,500 characters, 4 kinds of tokens by char"


def test_a_tokenizer_file_gets_a_text_whole(tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 4000
    words = ["<unk>", *sorted(set(text.split()))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    dataset = Text(written(tmp_path / "a.txt", text), block_size=8, tokenizer=str(tmp_path / "words.json"))
    assert dataset.encode(text).tolist() == tokenizer.encode(text).ids
    lines = (text[:80] + "\n") * 30_000  # longer than one part, which ends at a line break
    assert dataset.encode(lines).tolist() == tokenizer.encode(lines).ids
    assert len(dataset.encode("a" * (2**21 + 1))) == 3  # a line that is longer is cut


def test_options_that_would_do_nothing_or_are_no_numbers_are_refused(tmp_path):
    path = written(tmp_path / "a.txt", "abcab" * 100)
    with pytest.raises(TangleNASError, match=r"test_portion 0.5 would do nothing"):
        Text(path, test_portion=0.5, test_root=path)
    for option, value, expected in (
        ("block_size", "x", "a whole number"),
        ("block_size", True, "a whole number"),
        ("vocab_size", 300.0, "a whole number"),
        ("test_portion", "0.1", "a share between 0 and 1"),
        ("tokenizer", None, "the path of a tokenizer.json"),
    ):
        with pytest.raises(TangleNASError, match=rf"{option} is {value!r}[,;] .*{expected}"):
            Text(path, **{"tokenizer": "bpe", option: value})
    for options in ({"root": None}, {"root": path, "test_root": 3}, {"root": path, "tokenizer": 3}):
        with pytest.raises(TangleNASError, match=r"the path of data is (None|3), expected a text|tokenizer is 3; give"):
            Text(**options)
