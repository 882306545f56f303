"""`tanglenas show`: every choice of an architecture, and what it costs."""

import os
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import ALL, tiny

from tanglenas_engine import Architecture, create_space
from tanglenas_engine.cli import main
from tanglenas_engine.cli.show import layers
from tanglenas_engine.pipeline.config import configurables  # noqa: F401  # registers what operative.gin names


@pytest.fixture
def show(tmp_path):
    """Write an architecture, call the command and return what it printed."""

    def call(architecture: Architecture, *options: str) -> str:
        (tmp_path / "architecture.json").write_text(architecture.to_json())
        result = CliRunner().invoke(main, ["show", str(tmp_path / "architecture.json"), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


def test_an_architecture_is_shown_with_its_choices_and_exact_costs(show):
    space = create_space("autoformer_nano")
    architecture = space.architecture(embed_dim=48, depth=2, num_heads=[2, 3], mlp_ratio=[4, 2])
    lines = [line.split() for line in show(architecture).splitlines()]
    assert lines[0][:2] == ["autoformer_nano", architecture.digest]
    cost = space.cost(architecture)
    assert ["params", f"{cost.params:,}"] == next(line for line in lines if line[:1] == ["params"])[:2]
    assert ["multiply-accumulates", f"{cost.flops:,}"] in [line[:2] for line in lines]
    assert ["embed_dim", "48", "32", "48", "64"] in lines
    assert lines[-3:] == [["layer", "num_heads", "mlp_ratio"], ["1", "2", "4"], ["2", "3", "2"]]


@pytest.mark.parametrize("name", ALL)
def test_every_option_in_use_is_in_the_table_once(name):
    space = tiny(name)
    architecture = space.sample(torch.Generator().manual_seed(3))
    columns, rows = layers(space, architecture)
    for choice in space.choices.values():
        if choice.layered:
            column = [row[columns.index(choice.name)] for row in rows]
            assert [cell for cell in column if cell != "-"] == list(map(str, architecture.choices[choice.name]))
    assert len({row[0] for row in rows}) == len(rows)


def test_options_of_the_space_change_what_it_costs(show):
    small, large = create_space("autoformer_nano"), create_space("autoformer_nano", image_size=28)
    architecture = small.smallest()
    params = f"{large.cost(architecture).params:,}"
    assert params != f"{small.cost(architecture).params:,}"
    assert params in show(architecture, "-o", "image_size=28")


def test_the_stage_that_wrote_the_file_says_which_options_the_space_had(show, tmp_path):
    (tmp_path / "operative.gin").write_text(
        "SPACE = 'autoformer_nano'\nDATASET = 'digits'\nSEED = 0\n"
        "create_dataset.image_size = 16\ncreate_space.relative_position = True\ndiscretize.batch_size = 256\n"
    )
    space = create_space("autoformer_nano", image_size=16, relative_position=True)
    params = f"{space.cost(space.smallest()).params:,}"
    assert params in show(space.smallest())
    assert params not in show(space.smallest(), "-o", "image_size=8")


def test_options_that_a_person_gives_replace_those_of_the_stage_one_by_one(show, tmp_path):
    (tmp_path / "operative.gin").write_text(
        "SPACE = 'autoformer_nano'\nDATASET = 'digits'\ncreate_space.relative_position = True\n"
        "create_dataset.image_size = 16\n"
    )
    smallest = create_space("autoformer_nano").smallest()
    assert show(smallest, "-o", "image_size=16") == show(smallest, "-o", "relaxation=paper") == show(smallest)


def test_an_architecture_is_shown_without_the_data_once_the_stage_has_written_its_sizes(show, tmp_path):
    (tmp_path / "operative.gin").write_text(
        "SPACE = 'gpt_nano'\nDATASET = 'text'\ncreate_dataset.root = 'gone.txt'\n"
        "create_space.vocab_size = 23\ncreate_space.block_size = 32\n"
    )
    space = create_space("gpt_nano", vocab_size=23, block_size=32)
    assert f"{space.cost(space.smallest()).params:,}" in show(space.smallest())


def test_a_config_of_an_earlier_version_binds_one_size_and_leaves_the_others_to_the_data(show, tmp_path):
    (tmp_path / "operative.gin").write_text(
        "SPACE = 'autoformer_nano'\nDATASET = 'digits'\ncreate_dataset.image_size = 16\ncreate_space.num_classes = 12\n"
    )
    space = create_space("autoformer_nano", image_size=16, num_classes=12)
    assert f"{space.cost(space.smallest()).params:,}" in show(space.smallest())


def test_options_that_a_person_gives_stand_in_for_missing_data(show, tmp_path):
    (tmp_path / "operative.gin").write_text("SPACE = 'gpt_nano'\nDATASET = 'text'\ncreate_dataset.root = 'gone.txt'\n")
    space = create_space("gpt_nano", vocab_size=23, block_size=32)
    shown = show(space.smallest(), "-o", "vocab_size=23", "-o", "block_size=32")
    assert f"{space.cost(space.smallest()).params:,}" in shown
    result = CliRunner().invoke(main, ["show", str(tmp_path / "architecture.json"), "-o", "vocab_size=23"])
    assert result.exit_code == 2 and "gone.txt" in result.stderr and "Copy ARCH into another folder" in result.stderr


def test_a_config_of_another_space_says_nothing_of_an_architecture(show, tmp_path):
    space = create_space("gpt_nano", block_size=32)
    alone = show(space.smallest(), "-o", "block_size=32")
    (tmp_path / "operative.gin").write_text(
        "SPACE = 'autoformer_nano'\nDATASET = 'digits'\ncreate_space.drop_path = 0.1\n"
    )
    assert show(space.smallest(), "-o", "block_size=32") == alone


@pytest.mark.parametrize("here", ["project", "elsewhere"])
def test_a_config_that_names_functions_and_data_of_the_project_is_read(tmp_path, monkeypatch, here):
    """Also from a folder with a module and data of the same names, which are none of the run's."""
    for kind in ("project/pictures/a", "project/pictures/b", "elsewhere/pictures/a"):
        (tmp_path / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / kind / f"{number}.png")
    project = tmp_path / "project"
    (project / "dvc.yaml").touch()
    module = f"my_transforms_of_show_{here}"
    (project / f"{module}.py").write_text("def train(image):\n    return image\n")
    (project / "out").mkdir()
    (project / "out" / "operative.gin").write_text(
        "SPACE = 'autoformer_nano'\nDATASET = 'image_folder'\nSEED = 0\ncreate_dataset.root = 'pictures'\n"
        f"create_dataset.image_size = 16\ncreate_dataset.train_transform = @{module}.train\n"
        "create_dataset.eval_transform = @torchvision.transforms.v2.ToImage()\n"
    )
    space = create_space("autoformer_nano", image_size=16, in_channels=3, num_classes=2)
    (project / "out" / "architecture.json").write_text(space.smallest().to_json())
    monkeypatch.chdir(tmp_path / here)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = CliRunner().invoke(main, ["show", "../project/out/architecture.json"])
    assert f"{space.cost(space.smallest()).params:,}" in result.stdout, result.output
    assert Path.cwd() == tmp_path / here and "DVC_ROOT" not in os.environ


@pytest.mark.slow
def test_the_figure_is_a_png(show, tmp_path):
    show(create_space("autoformer_nano").smallest(), "--figure", str(tmp_path / "drawn.png"))
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


EMPTY = '{"format": 1, "space": "autoformer_nano", "choices": {}}'


@pytest.mark.parametrize(
    "content, options, message",
    [
        ("{}", [], "expected an object with 'format', 'space' and 'choices'"),
        ('{"format": 1, "space": "autoformr_nano", "choices": {}}', [], "Did you mean 'autoformer_nano'?"),
        (EMPTY, [], "also needs: embed_dim"),
        (EMPTY, ["-o", "image_size"], "NAME=VALUE"),
        (
            '{"format": 1, "space": "autoformer_nano", "choices": {}}',
            ["-o", "imag_size=8"],
            "Did you mean 'image_size'",
        ),
        (b"\xff", [], "cannot read"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_sentence(tmp_path, content, options, message):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(main, ["show", str(tmp_path / "a.json"), *options])
    assert result.exit_code == 2 and message in result.stderr


def test_an_operative_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.json").write_text(create_space("autoformer_nano").smallest().to_json())
    (tmp_path / "operative.gin").write_text("DATASET = 'digits\n")
    result = CliRunner().invoke(main, ["show", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "operative.gin cannot be read" in result.stderr
