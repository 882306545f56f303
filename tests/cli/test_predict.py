"""`tanglenas predict` and docs/serving.md: a network says the same in every format, and what is known of it is true."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from paths import ROOT
from PIL import ExifTags, Image

from tanglenas_datasets.text import Text
from tanglenas_engine import create_dataset, create_space
from tanglenas_engine.cli import main, predict
from tanglenas_engine.cli._console import read_text
from tanglenas_engine.cli._model import Known, Model
from tanglenas_engine.errors import TangleNASError

pytest.importorskip("onnxruntime", reason="it comes with the extra 'onnx'")
pytest.importorskip("onnxscript", reason="it comes with the extra 'onnx'")

FORMATS = ("timm", "torch", "onnx", "torch-export")
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL | re.MULTILINE)
SNIPPETS = [code for code in BLOCKS if "transformers" not in code]  # that one runs with the tests of transformers
TEXT = "def f(x):\n    return x + 1\n" * 60


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def found(folder: Path, space, dataset, formats) -> Path:
    """A project's folder with a network as retrain leaves it, and its exports."""
    torch.manual_seed(0)
    for parameter in space.parameters():  # outputs that differ from class to class
        torch.nn.init.normal_(parameter, std=0.3)
    architecture = space.sample(torch.Generator().manual_seed(1))
    (folder / "out/discretize").mkdir(parents=True)
    (folder / "out/discretize/architecture.json").write_text(architecture.to_json())
    space.export(space.extract(architecture).eval(), architecture, folder / "out/retrain/model", dataset)
    options = [word for key, value in space.created_with.items() for word in ("-o", f"{key}={value!r}")]
    for name in formats:
        run("export", folder / "out/discretize/architecture.json", "--format", name, "--output", folder / name,
            "--weights", folder / "out/retrain/model/model.safetensors", *options)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A vision transformer for digits, and some of them as files."""
    dataset = create_dataset("digits")
    space = create_space("autoformer_nano", **dataset.space_options(), embed_dim=(8, 16), depth=(2,), head_dim=4)
    folder = found(tmp_path_factory.mktemp("images"), space, dataset, FORMATS)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    # Black on nothing, and lying on its side. The network takes it for another class without either.
    ink = Image.fromarray(255 - np.random.default_rng(9).integers(0, 256, (8, 8), np.uint8))
    Image.merge("LA", (ink.point(lambda _: 0), ink)).save(folder / "digit.png", exif=exif)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A language model for characters, and a text that it continues."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "all.txt").write_text(TEXT)
    (folder / "start.txt").write_text("def f")
    dataset = create_dataset("text", root=str(folder / "all.txt"), block_size=8)
    sizes = dict(layers=(1,), embed_dim=(8, 12), num_heads=(2,))
    return found(folder, create_space("gpt_nano", **dataset.space_options(), **sizes), dataset, FORMATS[1:])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_image_has_the_same_classes_in_every_format(images):
    files = [str(images / f"{number}.png") for number in range(5)]
    said = run("predict", images / "out", *files, "--top", "2")
    assert [run("predict", images / name, *files, "--top", "2") for name in FORMATS] == [said] * len(FORMATS)
    assert run("predict", images / "onnx/model.onnx", *files, "--top", "2") == said

    model = timm.create_model(f"local-dir:{images / 'out/retrain/model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    lines = []
    for file in files:
        with torch.no_grad():
            chances = model(transform(Image.open(file, formats=("PNG",)))[None])[0].softmax(-1)
        lines.append(file)
        for label in chances.topk(2).indices:
            lines.append(f"  {100 * chances[label]:6.2f} %  {model.pretrained_cfg['label_names'][label]}")
    assert said.splitlines() == lines
    assert len({line.split()[-1] for line in lines if line.startswith("  ")}) > 1


def test_what_is_known_is_the_dataset_s_in_every_format(images):
    import onnxruntime

    expected = create_dataset("digits").input_config()
    assert expected["label_names"] == list("0123456789") and expected["input_size"] == [1, 8, 8]
    for name in ("timm", "torch"):
        config = json.loads((images / name / "config.json").read_text())["pretrained_cfg"]
        assert {key: config[key] for key in expected} == expected
    session = onnxruntime.InferenceSession(images / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    stored = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in stored.items()} == expected
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("input", ["batch", 1, 8, 8])]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("output", ["batch", 10])]
    files = {"config.json": ""}
    torch.export.load(images / "torch-export/model.pt2", extra_files=files)
    assert json.loads(files["config.json"]) == expected


def test_an_image_of_16_bits_is_read_as_in_training(images):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray((pixels.astype(np.uint16) << 8) + pixels).save(images / "wide.png")
    Image.fromarray(pixels.astype(np.float32)).save(images / "floating.tif")
    Image.fromarray(pixels.astype(np.int32)).save(images / "whole.tif")
    plain, wide = (run("predict", images / "timm", images / name) for name in ("0.png", "wide.png"))
    assert plain.splitlines()[1:] == wide.splitlines()[1:]
    for name, what in (("floating.tif", "floating-point numbers"), ("whole.tif", "whole numbers of 32 bits")):
        assert what in run("predict", images / "timm", images / name, status=2)


def test_what_a_tokenizer_says_of_padding_and_a_mark_before_a_text_change_nothing(texts):
    from tokenizers import Tokenizer

    how = ["--tokens", "8", "--temperature", "0"]
    said = run("predict", texts / "torch", texts / "start.txt", *how)
    shutil.copytree(texts / "torch", texts / "padded")
    tokenizer = Tokenizer.from_file(str(texts / "padded/tokenizer.json"))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(texts / "padded/tokenizer.json"))
    (texts / "marked.txt").write_text((texts / "start.txt").read_text(), "utf-8-sig")
    assert run("predict", texts / "padded", texts / "start.txt", *how) == said
    assert run("predict", texts / "torch", texts / "marked.txt", *how) == said


@pytest.mark.parametrize("kind", ["Metaspace", "WordPiece", "ByteLevel"])
def test_the_space_before_a_continuation_stays(kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"Metaspace": ["▁on", "▁a", "▁time"], "WordPiece": ["on", "a", "time"], "ByteLevel": ["on", "Ġa", "Ġtime"]}
    vocabulary = {word: number for number, word in enumerate([*words[kind], "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "Metaspace" else pre_tokenizers.Whitespace()
    tokenizer.decoder = getattr(decoders, kind)()
    start = tokenizer.encode("on").ids
    assert predict._text_after(tokenizer, start, [1, 2]) == " a time"
    assert predict._text_after(tokenizer, start, []) == ""


@pytest.mark.exhaustive
def test_a_text_goes_on_alike_in_every_format(texts):
    how = ["--tokens", "30", "--seed", "1"]
    said = run("predict", texts / "out", texts / "start.txt", *how)
    assert said.startswith("def f") and len(said) >= 30 + len("def f")
    for name in FORMATS[1:]:
        assert (texts / name / "tokenizer.json").read_text() == (texts / "out/retrain/model/tokenizer.json").read_text()
        assert run("predict", texts / name, texts / "start.txt", *how) == said
    assert run("predict", texts / "out", texts / "start.txt", "--tokens", "30", "--seed", "2") != said
    (texts / "other.txt").write_text("return x")
    both = run("predict", texts / "out", texts / "start.txt", texts / "other.txt", *how)
    assert said in both and f"==> {texts / 'other.txt'} <==\nreturn x" in both
    greedy = ["--temperature", "0", "--tokens", "9"]
    assert (
        len({run("predict", texts / "out", texts / "start.txt", *greedy, "--seed", str(seed)) for seed in (1, 2)}) == 1
    )
    run("predict", texts / "out", texts / "start.txt", "--temperature", "1e-300", "--tokens", "3")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_language_model_is_exported_for_any_length_up_to_the_block(texts):
    import onnxruntime

    from tanglenas_gpt.network import GPT

    network = GPT.load(texts / "out/retrain/model")
    session = onnxruntime.InferenceSession(texts / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(texts / "torch-export/model.pt2").module()
    assert session.get_inputs()[0].shape == ["batch", "length"]
    for length in range(1, 9):
        ids = torch.randint(network.config.vocab_size, (3, length))
        with torch.no_grad():
            torch.testing.assert_close(program(ids), network(ids))
            (logits,) = session.run(None, {"input": ids.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), network(ids))


@pytest.mark.parametrize("name", ["onnx", "torch-export"])
def test_a_graph_of_one_length_continues_shorter_texts_too(texts, tmp_path, name):
    from tanglenas_engine.cli.export import FORMATS as WAYS
    from tanglenas_engine.cli.export import Export
    from tanglenas_gpt.network import GPT

    dataset = create_dataset("text", root=str(texts / "all.txt"), block_size=8)
    space = create_space("gpt_nano", **dataset.space_options())
    space.dynamic_axes = {}  # as `elasticize` leaves it
    network = GPT.load(texts / "out/retrain/model")
    WAYS[name](Export(space, space.smallest(), {}, network, tmp_path, dataset))
    for prompt in ("d", "def f(x)", "return x + 1"):  # 1, 8 and 12 tokens, where the block has 8
        how = ("--prompt", prompt, "--tokens", "12", "--temperature", "0")
        assert run("predict", tmp_path, *how) == run("predict", texts / "out", *how)


def test_a_graph_of_one_length_that_is_not_causal_refuses_shorter_texts():
    def forward(inputs):
        assert inputs.shape == (1, 8)
        return torch.nn.functional.one_hot(inputs.flip(1), 5).float()  # (1, 8, 5)

    model = Model(Path("graph"), forward, Known(), length=8)
    assert predict._continued(model, [3, *[2] * 7], 8, 1, 0, 0) == [3]
    with pytest.raises(TangleNASError, match=r"graph takes exactly 8 tokens, .* a text of 2 .* at least 8 tokens"):
        predict._continued(model, [2, 2], 8, 1, 0, 0)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda code: re.sub(r"\W+", "-", code)[:40])
@pytest.mark.exhaustive
def test_code_of_the_page_runs(images, texts, snippet, monkeypatch, tmp_path, capsys):
    """Each on its own; the second one of timm goes on from the first."""
    language = "tokenizers" in snippet
    (tmp_path / "exported").mkdir()
    for name in FORMATS[2:] if language else ("timm", "onnx", "torch-export"):
        shutil.copytree((texts if language else images) / name, tmp_path / "exported", dirs_exist_ok=True)
    shutil.copy(images / "digit.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    if not snippet.startswith("import"):
        exec(SNIPPETS[0], names)
    capsys.readouterr()
    exec(snippet, names)
    said = capsys.readouterr().out
    if "digit.png" in snippet:
        assert said.split()[0] == run("predict", "exported", "digit.png", "--top", "1").split()[-1]
    if language:
        (tmp_path / "start.txt").write_text("def ")
        greedy = run("predict", "exported/model.onnx", "start.txt", "--tokens", "50", "--temperature", "0")
        assert said == greedy
    if "maps" in names:
        assert [tuple(one.shape[2:]) for one in names["maps"]] == [(4, 4)] * 2
        assert names["larger"](torch.randn(1, 1, 16, 16)).shape == (1, 10)


def damaged(folder: Path, name: str, content: str) -> Path:
    shutil.copytree(folder, Path("copy"))
    Path("copy", name).write_text(content)
    return Path("copy")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda i, t: ["nowhere", "x.png"], "there is no file or folder nowhere"),
        (lambda i, t: [".", "x.png"], ". holds no network: expected config.json, model.pt2 or model.onnx"),
        (lambda i, t: [i / "digit.png", "x"], "is no network that can be opened: expected a folder"),
        (lambda i, t: [i / "out"], "give images or texts as FILE..., or --prompt TEXT"),
        (lambda i, t: [i / "out", "x.png"], "x.png is no readable image: No such file"),
        (lambda i, t: [i / "out", i], "is a folder: give the images in it, such as"),
        (lambda i, t: [i / "out", t / "start.txt"], "start.txt is no readable image: it is of no kno"),
        (lambda i, t: [i / "out", i / "0.png", "--seed", "0"], "takes images, so --seed would do"),
        (lambda i, t: [i / "out", i / "0.png", "--top", "0"], "0 is not in the range x>=1"),
        (lambda i, t: [t / "out", t / "start.txt", "--top", "1"], "continues texts, so --top would do"),
        (lambda i, t: [t / "out", i / "0.png"], "Expected a text in UTF-8, which"),
        (lambda i, t: [damaged(i / "timm", "config.json", "{"), "x"], "what it says of the network is no"),
        (lambda i, t: [damaged(i / "timm", "config.json", "[]"), "x"], "is [], expected an object"),
        (lambda i, t: [damaged(i / "timm", "config.json", '{"architecture": 3}'), "x"], "timm cannot open"),
        (lambda i, t: [damaged(i / "timm", "model.safetensors", "?"), "x"], "timm cannot open copy"),
        (lambda i, t: [damaged(i / "torch", "config.json", "{}"), "x"], "options the space 'autoformer_nano' was made. "
         "Export the network from the output of its run, and use that: tanglenas export copy/architecture.json "
         "--weights copy/model.safetensors --format torch-export --output exported"),
        (lambda i, t: [damaged(i / "torch", "config.json", '{"options": {"image_size": ""}}'), "x"],
         "cannot be made with its options: TypeError"),
        (lambda i, t: [damaged(i / "torch", "config.json", '{"options": {"dept": 3}}'), "x"], "takes no option 'dept'"),
        (lambda i, t: [damaged(i / "torch", "architecture.json", ""), "x"], "not an architecture file"),
        (lambda i, t: [damaged(i / "torch", "model.safetensors", ""), "x"], "as a safetensors file"),
        (lambda i, t: [damaged(i / "onnx", "model.onnx", "?"), "x"], "onnxruntime cannot open"),
        (lambda i, t: [damaged(i / "torch-export", "model.pt2", "?"), "x"], "torch cannot open"),
        (lambda i, t: [damaged(t / "onnx", "tokenizer.json", "{}"), t / "start.txt"], "tokenizer.json of"),
        (lambda i, t: [damaged(t / "onnx", "empty", ""), "copy/empty"], "copy/empty is empty"),
        (lambda i, t: [damaged(t / "torch", "tokenizer.json", ""), t / "start.txt"], "has no tokenizer"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_in_a_sentence(images, texts, arguments, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reason in run("predict", *arguments(images, texts), status=2)


def test_files_that_cannot_be_read_are_told_and_the_others_have_their_results(images, texts, tmp_path):
    bad = [tmp_path / "gone", tmp_path / "bytes"]
    bad[1].write_bytes(b"\xff")
    for folder, good, more in ((images, "0.png", ()), (texts, "start.txt", ("--tokens", "3"))):
        said = run("predict", folder / "torch", bad[0], folder / good, bad[1], *more, status=2)
        alone = run("predict", folder / "torch", folder / good, *more)
        assert alone in said and all(f"{path}" in said for path in bad) and said.count("Error: ") == 2


def test_tokens_that_a_network_does_not_know_are_counted(texts):
    said = run("predict", texts / "torch", "--prompt", "déf é", "--tokens", "1")
    assert said.startswith("the prompt: 2 of 5 tokens are unknown to the network\n")


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_the_word_none_is_known_and_the_unknown_token_of_each_model_is_counted(texts, tmp_path, kind):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"None": 0, "a": 1, "?": 2}
    made = {
        "WordLevel": lambda: models.WordLevel(words, unk_token="?"),
        "WordPiece": lambda: models.WordPiece(words, unk_token="?"),
        "BPE": lambda: models.BPE({**words, "N": 3, "o": 4, "n": 5, "e": 6, "No": 7, "ne": 8},
                                  [("N", "o"), ("n", "e"), ("No", "ne")]),
        "Unigram": lambda: models.Unigram([(word, -1.0) for word in words], 2, False),
    }  # fmt: skip
    tokenizer = Tokenizer(made[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = shutil.copytree(texts / "torch", tmp_path / "network")
    tokenizer.save(str(folder / "tokenizer.json"))
    said = run("predict", folder, "--prompt", "None a щ ? None", "--tokens", "1")
    unknown = "" if kind == "BPE" else "the prompt: 1 of 5 tokens are unknown to the network\n"  # that one has none
    assert said.partition("None")[0] == unknown


def test_the_export_that_a_folder_needs_is_a_command_for_a_shell(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images / "torch", "my net's")
    (tmp_path / "my net's/config.json").write_text("{}")
    said = run("predict", "my net's", "x", status=2)
    command = shlex.split(said.partition("use that: ")[2].partition("--format")[0])
    files = [f"my net's/{name}" for name in ("architecture.json", "model.safetensors")]
    assert command == ["tanglenas", "export", files[0], "--weights", files[1]]


def test_images_are_opened_as_images_alone(images, tmp_path):
    eps = tmp_path / "0.png"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    assert "it is of no known format" in run("predict", images / "out", eps, status=2)


@pytest.mark.parametrize("name", ["torch", "timm", "onnx"])
@pytest.mark.parametrize("own", [False, True], ids=["nothing known", "a transform of one's own"])
def test_a_network_of_unknown_inputs_says_so(images, tmp_path, name, own):
    shutil.copy(images / "timm/model.safetensors", tmp_path)
    if own:
        config = json.loads((images / "timm/config.json").read_text())
        for key in ("mean", "std", "crop_pct", "interpolation"):
            del config["pretrained_cfg"][key]
        (tmp_path / "config.json").write_text(json.dumps(config))
    created = dict(create_dataset("digits").space_options(), embed_dim=(8, 16), depth=(2,), head_dim=4)
    options = [word for key, value in created.items() for word in ("-o", f"{key}={value!r}")]
    said = run("export", images / "out/discretize/architecture.json", "--weights", tmp_path / "model.safetensors",
               "--format", name, "--output", tmp_path / "exported", *options)  # fmt: skip
    assert "nothing says how" in said and ("create_dataset.eval_transform" in said) is own
    refused = run("predict", tmp_path / "exported", images / "0.png", status=2)
    assert "does not say how its inputs are made" in refused and "create_dataset.eval_transform" in refused


def test_codes_for_a_terminal_are_escaped(images, texts, tmp_path):
    folder = shutil.copytree(images / "torch", tmp_path / "labels")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = ["\x1b[31m"] * 10
    (folder / "config.json").write_text(json.dumps(config))
    assert "\x1b" not in run("predict", folder, images / "0.png")
    (tmp_path / "codes.txt").write_text("def \x1b[31m")
    assert "\x1b" not in run("predict", texts / "out", tmp_path / "codes.txt", "--tokens", "1")


def test_a_text_with_the_ends_of_lines_of_windows_is_read_as_in_training(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfdef a():\r\n    pass\r\n" * 9)
    dataset = Text(path, block_size=4)
    text = read_text(path, "a text")
    assert text == dataset._decoded(path) and "\r" in text
    assert dataset.decode(dataset.encode(text)) == text and "<unk>" not in text
    assert predict._printable("a\r\nb\rc") == "a\nb\\rc"
