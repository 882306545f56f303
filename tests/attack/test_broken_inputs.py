"""Files and options that no run can use end in one sentence, and never in a traceback."""

import json
import os

import gin
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tanglenas_datasets.tokenizer_file import read_tokenizer
from tanglenas_engine import Dataset, SearchSpace, elastic
from tanglenas_engine.data import Splits, TensorSamples
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import files
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.reader import configure
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_objectives.latency_table import LatencyTable

# Tokenizers.


def bpe() -> dict:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return json.loads(tokenizer.to_str())


def changed(**parts) -> str:
    content = bpe()
    for name, value in parts.items():
        content[name] = {**content["model"], **value} if name == "model" else value
    return json.dumps(content)


TOKENIZERS = {
    "a panic": (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "is no tokenizer.json"),
    "dropout": (changed(model={"dropout": 0.1}), "has a dropout of 0.1"),
    "a missing merge": (changed(model={"merges": [["a", "z"]]}), "is no tokenizer.json: .*out of vocabulary"),
    "a gap": (changed(model={"vocab": {"a": 0, "b": 7}, "merges": []}), "2 tokens with numbers up to 7"),
    "no unknown token": (
        changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
        "cannot encode the text: WordLevel error: Missing",
    ),
    "a bad pattern": (
        changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "is no tokenizer.json: Oniguruma",
    ),
    "not JSON": ("{", "is no tokenizer.json"),
    "a list": ("[]", "is no tokenizer.json"),
    "nothing": ("", "is no tokenizer.json"),
    "deep": ("[" * 100_000, "is no tokenizer.json"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_one_sentence(tmp_path, case):
    content, message = TOKENIZERS[case]
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TangleNASError, match=message) as caught:
        read_tokenizer("text", str(tmp_path / "tokenizer.json"), "ab ba")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\xef\xbb\xbf" + changed().encode()])
def test_a_tokenizer_is_read_as_utf8_with_or_without_a_mark(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    if content[0] == 0xFF:
        with pytest.raises(TangleNASError, match=r"is no tokenizer\.json: 'utf-8' codec"):
            read_tokenizer("text", str(tmp_path / "tokenizer.json"), "ab")
    else:
        assert read_tokenizer("text", str(tmp_path / "tokenizer.json"), "ab").get_vocab_size() == 3


# Splits.


@pytest.mark.parametrize("missing", ["weights", "architecture", "validation", "test"])
def test_splits_with_an_empty_part_are_refused(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    letters = {"weights": "w", "architecture": "a", "validation": "v", "test": "t"}
    assignment = "".join(letter for name, letter in letters.items() if name != missing) * 3
    write_atomic(files.SPLITS, Splits("digits", "f" * 64, 0, assignment).to_json())
    with pytest.raises(TangleNASError, match=f"the split '{missing}' has no sample"):
        files.read_splits()


def test_splits_and_latency_tables_with_a_key_twice_are_refused(tmp_path):
    text = Splits("digits", "f" * 64, 0, "wavt").to_json()
    with pytest.raises(TangleNASError, match="this is no splits file: the key 'seed' is there twice"):
        Splits.from_json(text.replace('"seed": 0', '"seed": 0, "seed": 1'))
    path = tmp_path / "table.json"
    path.write_text('{"format": 1, "unit": "milliseconds", "tables": {"a": [1.0], "a": [2.0]}}')
    with pytest.raises(TangleNASError, match=r"is no latency table \(the key 'a' is there twice\): expected the JSON"):
        LatencyTable.load(path)


# Names that are not UTF-8.


@pytest.mark.skipif(os.name == "nt", reason="names there are UTF-16")
def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_atomic(tmp_path / "names.txt", f"class {name}\n")
    assert (tmp_path / "names.txt").read_text("utf-8") == "class caf\\udce9\n"
    write_atomic(tmp_path / "names.txt", "café\n")
    assert (tmp_path / "names.txt").read_bytes() == "café\n".encode()


# Data that cannot be normalised.


class Points(Dataset):
    """Twenty images of one pixel."""

    name, fingerprint = "points", "f" * 64
    num_classes, image_size, in_channels, class_names = 2, 1, 1, ("a", "b")

    def __init__(self, value=1.0, std=(1.0,)):
        self.images = torch.full((20, 1, 1, 1), value)
        self.labels = torch.arange(20) % 2
        self.mean, self.std = (0.0,), std

    def subset(self, indices, *, train):
        return TensorSamples(self.images[indices], self.labels[indices])


class Plain(SearchSpace):
    def __init__(self, **options):
        super().__init__()
        self.head = elastic.Linear(1, self.choice("width", (2, 3)))

    def forward(self, x):
        return self.head(x.flatten(1))

    def example_input(self, batch):
        return torch.randn(batch, 1, 1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_refused_before_the_search(value):
    check_fit(Plain(), Points().subset(torch.arange(4), train=False))
    with pytest.raises(TangleNASError, match=r"1 of 1 numbers in the first batch of the data are not finite"):
        check_fit(Plain(), Points(value).subset(torch.arange(4), train=False))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_a_standard_deviation_that_nothing_can_be_divided_by_is_refused(monkeypatch, std):
    monkeypatch.setattr(configurables, "create_dataset", lambda name: Points(std=(1.0, std)))
    try:
        configure(["SEED = 0", "DATASET = 'digits'", "SPACE = 'toy_conv_macro'"])
        with pytest.raises(TangleNASError, match=r"the dataset 'points' has the standard deviation .* \(std\)"):
            configurables.create()
    finally:
        gin.clear_config()
