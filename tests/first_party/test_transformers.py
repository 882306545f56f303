"""Language models start from transformers' own networks, and end as folders that transformers loads alone."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from paths import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from tanglenas_engine import create_dataset, create_space, load_pretrained
from tanglenas_engine.cli import main
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.weights import OtherWeightsError
from tanglenas_llama.network import Llama

transformers = pytest.importorskip("transformers", reason="transformers is an extra: pip install 'tanglenas[hf]'")

SHAPE = dict(layers=(1, 2), embed_dim=(16, 32), num_kv_heads=(1, 2), group=2, mlp_width=(24, 48), vocab_size=13)
BLOCK = 32
GPT_2 = dict(layers=(1, 2), embed_dim=(16, 32), num_heads=(2, 4), vocab_size=13, block_size=BLOCK)


def llama_of_transformers(**changes):
    """The largest network of `llama()`, with random weights."""
    shape = dict(
        vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes}))
    return randomised(network)


def gpt_2_of_transformers(**changes):
    shape = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=13, n_positions=BLOCK)
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})))


def randomised(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network.eval()


def llama(**options):
    return create_space("llama_nano", **{**SHAPE, "block_size": BLOCK, **options}).eval()


def ids(batch=3):
    return torch.randint(13, (batch, BLOCK))


# In.


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_computes_the_bits_of_transformers(tied):
    theirs, space = llama_of_transformers(tie_word_embeddings=tied), llama(tied=tied)
    assert [name for name, _ in space.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    space.load_state_dict(theirs.state_dict())
    x = ids()
    with torch.no_grad():
        assert torch.equal(space(x), theirs(x).logits)
        assert torch.equal(space.extract(space.largest())(x), theirs(x).logits)


def test_gpt_2_computes_what_transformers_does():
    """To rounding: transformers' Conv1D adds the bias in another operation."""
    theirs = gpt_2_of_transformers()
    space = create_space("gpt2", **GPT_2).eval()
    space.load_state_dict({**space.state_dict(), **space.converted(theirs.state_dict())})
    x = ids()
    torch.testing.assert_close(space(x), theirs(x).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_search_starts_from_a_folder_of_transformers(tmp_path, shards):
    theirs, space = llama_of_transformers(), llama()
    theirs.save_pretrained(tmp_path, max_shard_size=f"{60 // shards}KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    assert "outputs equal" in load_pretrained(space, tmp_path)[-1]
    x = ids()
    assert torch.equal(space(x), theirs(x).logits)


def test_weights_of_shorter_texts_are_warned_of(tmp_path):
    llama_of_transformers(max_position_embeddings=BLOCK // 2).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"max_position_embeddings {BLOCK // 2}, .* block_size {BLOCK}: .*positions"):
        assert "outputs equal" in load_pretrained(llama(), tmp_path)[-1]


def test_gpt_2_starts_from_a_folder_of_transformers(tmp_path):
    gpt_2_of_transformers().save_pretrained(tmp_path)
    assert "outputs equal" in load_pretrained(create_space("gpt2", **GPT_2), tmp_path)[-1]


def test_files_without_a_head_and_with_frequencies_are_read(tmp_path):
    """The head is the embedding where a file has none, also for a space whose head is one of its own."""
    theirs = llama_of_transformers()
    state = {name: tensor.clone() for name, tensor in theirs.model.state_dict().items()}
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "body.safetensors")
    x = ids()
    for tied in (True, False):
        space = llama(tied=tied)
        load_pretrained(space, tmp_path / "body.safetensors")
        assert torch.equal(space(x), theirs(x).logits)


def test_half_precision_is_told(tmp_path):
    llama_of_transformers().bfloat16().save_pretrained(tmp_path)
    first, last = load_pretrained(llama(), tmp_path)
    assert "bfloat16 were converted" in first and "outputs equal" in last


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"set create_space\.rope_theta = 500000\.0"),
        ({"rms_norm_eps": 1e-6}, r"norm_eps 1e-06, and the space has 1e-05: set create_space\.norm_eps"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, r"head_dim 4, and the space has 8"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and a Llama here has 'silu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'linear', and a Llama here has 'default'",
        ),
        ({"attention_bias": True}, r"the space has no model\.layers\.0\.self_attn\.[qkvo]_proj\.bias and 7 more"),
        ({"num_hidden_layers": 3}, r"the space has no model\.layers\.2\.\S+ and 8 more"),
        ({"tie_word_embeddings": False}, r"another one than the embedding.*set create_space\.tied = False"),
    ],
)
def test_another_llama_is_refused_with_the_option_that_differs(tmp_path, changes, message):
    llama_of_transformers(**changes).save_pretrained(tmp_path)
    with pytest.raises(TangleNASError, match=message):
        load_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation_function": "gelu"}, r"activation_function 'gelu'.*'tanh': set create_space\.gelu = 'none'"),
        ({"n_head": 8}, r"n_head 8, and the largest num_heads of the space is 4: give create_space\.num_heads"),
        (
            {"layer_norm_epsilon": 1e-3},
            r"says layer_norm_epsilon 0\.001, and this space always has 1e-05: choose other w",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights False, and this space always has True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "_by_inverse_layer_idx True, and this space always has False"),
    ],
)
def test_another_gpt_2_is_refused(tmp_path, changes, message):
    gpt_2_of_transformers(**changes).save_pretrained(tmp_path)
    with pytest.raises(TangleNASError, match=message):
        load_pretrained(create_space("gpt2", **GPT_2), tmp_path)


def test_a_network_of_another_type_with_the_same_names_is_compared(tmp_path):
    """A Mistral is a Llama where its window is as long as the text."""
    shape = dict(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True)  # fmt: skip
    network = randomised(transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=None)))
    network.save_pretrained(tmp_path)
    assert "outputs equal" in load_pretrained(llama(), tmp_path)[-1]
    network.config.sliding_window = 4
    network.config.save_pretrained(tmp_path)
    with pytest.raises(OtherWeightsError, match="the outputs of the largest of 'llama_nano' differ"):
        load_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.model."])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_of_a_wrapper_are_compared_without_its_prefix(tmp_path, kind, prefix):
    """transformers does not know such names: it would warn, and compute with newly initialised weights."""
    space = llama() if kind == "llama" else create_space("gpt2", **GPT_2)
    theirs = llama_of_transformers() if kind == "llama" else gpt_2_of_transformers()
    theirs.save_pretrained(tmp_path)
    state = {prefix + name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    first, last = load_pretrained(space, tmp_path)
    assert f"all names begin with {prefix!r}" in first and f"outputs equal those of the network in {tmp_path}" in last


def test_without_transformers_the_folder_is_compared_with_this_project_s_llama(tmp_path, monkeypatch):
    theirs = llama_of_transformers()
    theirs.save_pretrained(tmp_path)
    x = ids()
    expected = theirs(x).logits
    monkeypatch.setitem(sys.modules, "transformers", None)
    space = llama()
    assert "outputs equal" in load_pretrained(space, tmp_path)[-1]
    assert torch.equal(Llama.load(tmp_path)(x), expected) and torch.equal(space(x), expected)


# Out.

EXPORTS = {
    "llama": ("llama_nano", dict(tied=False)),
    "llama_alike": ("llama_nano", dict(per_layer=False)),
    "llama_odd_heads": ("llama_nano", dict(per_layer=False, embed_dim=(20,), head_dim=8, num_kv_heads=(3,), group=1)),
    "gpt": ("gpt_nano", dict(embed_dim=(16, 32))),
    "gpt_alike": ("gpt_nano", dict(per_layer=False, heads="partition", embed_dim=(16, 32), bias=True)),
}
STOCK = {"llama_alike": "LlamaForCausalLM", "gpt_alike": "GPT2LMHeadModel"}


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that returns the folder of a network as retrain leaves it, its export, and what is expected of it."""
    home = tmp_path_factory.mktemp("language")
    (home / "all.txt").write_text("def f(x):\n    return x + 1\n" * 60)
    (home / "start.txt").write_text("def f")
    dataset = create_dataset("text", root=str(home / "all.txt"), block_size=BLOCK)

    @functools.cache
    def export_once(name: str) -> Path:
        preset, options = EXPORTS[name]
        options = {**dataset.space_options(), **options}
        torch.manual_seed(0)
        space = randomised(create_space(preset, **options))
        architecture, folder = space.sample(torch.Generator().manual_seed(1)), home / name
        network = space.extract(architecture).eval()
        space.export(network, architecture, folder / "model", dataset)
        (folder / "architecture.json").write_text(architecture.to_json())
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value!r}")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
            said = run("export", folder / "architecture.json", "--weights", folder / "model/model.safetensors",
                       "--format", "transformers", "--output", folder / "exported", *words)  # fmt: skip
        (folder / "said.txt").write_text(said)
        x = space.example_input(2)
        torch.save({"inputs": x, "outputs": network(x).detach()}, folder / "expected.pt")
        return folder

    return export_once


@pytest.mark.parametrize("name", EXPORTS)
def test_layers_that_are_alike_are_a_network_of_transformers_own(exported, name):
    config = json.loads((exported(name) / "exported/config.json").read_text())
    code = [path.name for path in (exported(name) / "exported").glob("*.py")]
    said = (exported(name) / "said.txt").read_text()
    if name in STOCK:
        assert config["architectures"] == [STOCK[name]] and not code and "trust_remote_code" not in said
    else:
        assert config["auto_map"]["AutoModelForCausalLM"].startswith(code[0].removesuffix(".py"))
        assert f"layers differ, so {code[0]}" in said
    assert "largest difference from the network: " in said


@pytest.mark.exhaustive
def test_transformers_alone_loads_and_continues_them(exported):
    """In a process without this project: equal logits, a cache that changes nothing, and the text's tokens."""
    code = f"""
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("tanglenas"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in {[str(exported(name)) for name in EXPORTS]!r}:
    trust = not folder.endswith("alike")
    model = AutoModelForCausalLM.from_pretrained(folder + "/exported", trust_remote_code=trust).eval()
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["inputs"]).logits, expected["outputs"])
    tokenizer = AutoTokenizer.from_pretrained(folder + "/exported", trust_remote_code=trust)
    start = tokenizer("def f", return_tensors="pt").input_ids
    written = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=3, do_sample=False)
    again = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=3, do_sample=False,
                           use_cache=False)
    assert torch.equal(written, again)
    print(repr(tokenizer.decode(written[0])))
"""
    home = exported("llama").parent
    environment = {"PATH": "", "HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    greedy = ("--prompt", "def f", "--tokens", "3", "--temperature", "0")
    said = [run("predict", exported(name) / "model", *greedy) for name in EXPORTS]
    assert [eval(line) + "\n" for line in done.stdout.splitlines()] == said


def test_code_of_the_page_runs(exported, monkeypatch, capsys):
    page = (ROOT / "docs/serving.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(from transformers .*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(exported("gpt"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(Path.cwd() / "modules"))
    exec(code, {})
    arguments = ("--prompt", "def ", "--tokens", "20", "--temperature", "0")
    printed = capsys.readouterr().out
    assert printed.startswith("def ") and printed.replace(" ", "") == run("predict", ".", *arguments).replace(" ", "")


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.slow
def test_predict_continues_alike_from_the_run_and_from_the_export(exported, name):
    how = ["--tokens", "20", "--seed", "3"]
    said = run("predict", exported(name) / "model", "--prompt", "def f", *how)
    assert run("predict", exported(name) / "exported", "--prompt", "def f", *how) == said
    assert run("predict", exported(name) / "exported", exported(name).parent / "start.txt", *how) == said


def test_predict_continues_with_a_network_of_transformers(exported, tmp_path):
    """Such as a downloaded one: without what this project writes into the config."""
    folder = shutil.copytree(exported("llama_alike") / "exported", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    for key in ("space", "options", "pretrained_cfg"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "architecture.json").unlink()
    arguments = ("--prompt", "def f", "--tokens", "20")
    assert run("predict", folder, *arguments) == run("predict", exported("llama_alike") / "model", *arguments)
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    assert "transformers cannot open" in run("predict", folder, *arguments, status=2)


def test_an_export_gives_a_prompt_the_tokens_of_the_training(exported, tmp_path):
    """Of a run of an earlier version too, which left a post-processor in the tokenizer. Training adds no tokens."""
    folder = shutil.copytree(exported("llama_alike"), tmp_path / "run")
    tokenizer = Tokenizer.from_file(str(folder / "model/tokenizer.json"))
    tokenizer.add_special_tokens(["d"])  # one that the vocabulary has
    plain = {text: tokenizer.encode(text).ids for text in ("ef f", "def f")}
    tokenizer.post_processor = processors.TemplateProcessing("d $A", special_tokens=[("d", tokenizer.token_to_id("d"))])
    tokenizer.save(str(folder / "model/tokenizer.json"))
    words = [word for key, value in json.loads((folder / "model/config.json").read_text())["options"].items()
             for word in ("-o", f"{key}={value!r}")]  # fmt: skip
    run("export", folder / "architecture.json", "--weights", folder / "model/model.safetensors",
        "--format", "transformers", "--output", folder / "again", *words)  # fmt: skip
    read = transformers.AutoTokenizer.from_pretrained(folder / "again")
    assert {text: read(text)["input_ids"] for text in plain} == plain


def test_a_search_starts_again_from_what_was_exported(exported, tmp_path):
    space = llama(per_layer=False)
    randomised(space)
    folder = tmp_path / "model"
    space.export(space.extract(space.largest()), space.largest(), folder)
    assert "outputs equal" in load_pretrained(llama(), folder)[-1]
    other = llama(embed_dim=(36,), head_dim=8)  # no class of transformers holds it
    other.export(other.extract(other.largest()), other.largest(), folder)
    assert "outputs equal" in load_pretrained(llama(embed_dim=(36,), head_dim=8), folder)[-1]


def test_predict_runs_no_code_of_a_folder(exported, tmp_path):
    folder = shutil.copytree(exported("llama") / "exported", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    del config["options"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_tanglenas_llama.py").write_text("raise SystemExit('it ran')")
    said = run("predict", folder, "--prompt", "def f", status=2)
    assert "transformers cannot open" in said and "it ran" not in said


@pytest.mark.parametrize(
    "space, reason",
    [("toy_conv_macro", "has no form in transformers"), ("llama_nano", r"pip install 'tanglenas[hf]'")],
)
def test_what_cannot_be_exported_is_told(exported, tmp_path, monkeypatch, space, reason):
    monkeypatch.setitem(sys.modules, "transformers", None)
    made = create_space(space)
    architecture = made.smallest()
    made.export(made.extract(architecture), architecture, tmp_path)
    arguments = ("--weights", tmp_path / "model.safetensors", "--format", "transformers", "--output", tmp_path / "out")
    assert reason in run("export", tmp_path / "architecture.json", *arguments, status=2)
    assert not (tmp_path / "out").exists()


def test_plugins_import_transformers_only_where_it_is_needed():
    """Importing it takes seconds. The modules that folders bring to transformers are read as text here."""
    for path in (ROOT / "plugins").rglob("*.py"):
        at_import = re.findall(r"^(?:from|import) transformers", path.read_text("utf-8"), re.MULTILINE)
        assert not at_import or path.name.startswith("modeling_"), path


def test_weights_of_the_file_are_those_of_the_network(exported):
    """A head that is the embedding is stored once."""
    folder = exported("llama_alike")
    assert "lm_head.weight" not in load_file(folder / "exported/model.safetensors")
    assert "lm_head.weight" in load_file(exported("llama") / "exported/model.safetensors")
