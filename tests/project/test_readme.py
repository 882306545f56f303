"""The README's code does what the README says."""

import re

import pytest
import torch
from paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block(part: str) -> str:
    (found,) = [code for code in BLOCKS if part in code]
    return found


def test_the_example_space_is_a_search_space():
    names: dict = {}
    exec(block("class Classifier(SearchSpace)"), names)
    space = names["Classifier"]()
    assert space.size == 3 * (3 + 3**2 + 3**3)
    images = space.example_input(4)
    architecture = space.sample(torch.Generator().manual_seed(0))
    expected = space.extract(architecture)(images)
    torch.testing.assert_close(space.relax(space.one_hot(architecture))(images), expected)
    torch.testing.assert_close(space.select(architecture)(images), expected)


def test_the_example_search_finds_an_architecture(capsys):
    names: dict = {}
    exec(block("result = search("), names)
    said = capsys.readouterr().out
    assert str(names["result"].architecture) in said and "Cost(params=" in said
    assert type(names["network"]).__module__.startswith("timm.")


def test_the_pages_it_links_to_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize("command", ["demo", "test", "ui", "help"])
def test_the_make_targets_it_names_exist(command):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
