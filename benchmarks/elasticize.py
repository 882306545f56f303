"""Search spaces made of the networks of timm and transformers: what becomes a choice, and whether all of it is exact.

    python -m benchmarks.elasticize run benchmarks/results/elasticize.jsonl
    python -m benchmarks.elasticize run elasticize.jsonl --only resnet18 --only vit_tiny_patch16_224
    python -m benchmarks.elasticize table benchmarks/results/elasticize.jsonl

Weights are random. Images are small where the architecture allows it. Results are lines of a file, so a study goes on
where it was cut off. A row says of a space: its choices, the share of the parameters that became elastic, the number of
architectures, the largest error of two architectures against the networks extracted for them, and whether their costs
are those that torch counts in these networks.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from tanglenas_engine import SearchSpace, elasticize
from tanglenas_engine.spaces.products import count_products

NAMES = """
    resnet18 resnet50 seresnet50 resnext50_32x4d regnetx_002 regnety_002 densenet121 vgg11_bn repvgg_a0 res2net50_14w_8s
    dla34 cspdarknet53 selecsls42b hrnet_w18_small resnext26ts botnet26t_256 nfnet_f0 inception_v3
    mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mnasnet_small lcnet_050 tinynet_e rexnet_100
    ghostnet_050 efficientnet_b0 efficientnetv2_rw_t hardcorenas_a
    convnext_atto convnextv2_atto inception_next_atto edgenext_xx_small fastvit_t8 starnet_s1 poolformer_s12
    vit_tiny_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
    cait_xxs24_224 swin_tiny_patch4_window7_224 xcit_nano_12_p16_224 twins_svt_small pvt_v2_b0 coat_lite_tiny levit_128s
    mobilevit_xxs mixer_s32_224 resmlp_12_224 gmixer_12_224
""".split()
"""Architectures of timm."""


def transformers_models() -> dict[str, Callable[[], nn.Module]]:
    """Return small models of transformers by name; none without the library."""
    try:
        import transformers as hf
    except ImportError:
        return {}
    small: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
    words = dict(vocab_size=50)
    # Dropouts draw other numbers for other sizes, so that outputs in train mode could not be compared.
    no = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return {
        "hf bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**small, **words, **no)),
        "hf distilbert": lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                dim=64,
                n_layers=3,
                n_heads=4,
                hidden_dim=128,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
                **words,
            )
        ),
        "hf gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=64,
                n_layer=3,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **words,
            )
        ),
        "hf llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small, **words, num_key_value_heads=2)),
        "hf vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**small, image_size=32, patch_size=8)),
        "hf convnext": lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 3, 2], image_size=64)
        ),
        "hf resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[2, 2, 3, 2])
        ),
    }


def built(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and a batch of inputs for it, of the smallest of a few sizes that it takes."""
    if name in (models := transformers_models()):
        model = models[name]()
        size = getattr(model.config, "image_size", 64)
        return model, torch.randint(50, (2, 12)) if hasattr(model.config, "vocab_size") else torch.randn(
            2, 3, size, size
        )
    import timm

    failure: Exception | None = None
    for size in (64, 128, 224, 256):
        # Dropouts draw other numbers for other sizes, so that outputs in train mode could not be compared.
        for options in ({"img_size": size, "drop_path_rate": 0.0}, {"drop_path_rate": 0.0}, {"img_size": size}, {}):
            try:
                model = timm.create_model(name, num_classes=10, drop_rate=0.0, **options)
                x = torch.randn(2, 3, size, size)
                with torch.no_grad():
                    model.eval()(x)
                return model.train(), x
            except Exception as error:  # it takes another size, or no argument of that name
                failure = error
    assert failure is not None
    raise failure


def measured(name: str) -> dict[str, Any]:
    """Return the row of a model."""
    torch.manual_seed(0)
    model, x = built(name)
    row: dict[str, Any] = {"model": name, "input": list(x.shape[1:])}
    start = time.perf_counter()
    try:
        space = elasticize(model, x)
    except Exception as error:
        return {**row, "refused": f"{type(error).__name__}: {error}"[:300]}
    row["seconds"] = time.perf_counter() - start
    row |= {"choices": len(space.choices), "share": space.report.share, "architectures": float(f"{space.size:.2e}")}
    with torch.no_grad():
        expected = model.eval()(x)
        expected = getattr(expected, "logits", expected)
        row["largest"] = float((space.eval()(x) - expected).abs().max())
    row["eval"], row["train"], row["cost"] = _corners(space)
    reasons: dict[str, int] = {}
    for part in space.report.fixed:
        if "of the output" not in part.reason and "kernel" not in part.reason:
            reasons[part.reason] = reasons.get(part.reason, 0) + 1
    return {**row, "fixed": reasons}


@torch.no_grad()
def _corners(space: SearchSpace) -> tuple[float, float, bool]:
    """Return the largest relative errors in evaluation and in train mode, and whether costs are exact."""
    space, exact = space.double(), True
    errors: dict[bool, list[Tensor]] = {True: [], False: []}
    x = space.example_input(3)
    x = x.double() if x.is_floating_point() else x
    for parameter in space.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    saved = {key: tensor.clone() for key, tensor in space.state_dict().items()}
    for architecture in (space.smallest(), space.sample(torch.Generator().manual_seed(0))):
        for training in (False, True):
            for path in ("slices", "exact", "gated"):
                space.load_state_dict(saved)
                network = space.train(training).extract(architecture)
                if path == "slices":
                    space.select(architecture)
                else:
                    space.relaxation = path
                    space.relax(space.one_hot(architecture))
                outputs = []
                for one in (network, space):
                    torch.manual_seed(1)  # equal numbers for dropouts of whole layers
                    outputs.append(one(x))
                errors[training].append((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp_min(1e-6))
        network = space.release().eval().extract(architecture)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cost = space.cost(architecture)
        one = space.example_input(1)
        exact &= cost.params == sum(p.numel() for p in network.parameters())
        exact &= cost.macs == count_products(network, one)
    return float(torch.stack(errors[False]).max()), float(torch.stack(errors[True]).max()), exact


@click.group()
def main() -> None:
    """Make search spaces of the networks of timm and transformers."""


@main.command()
@click.argument("results", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--only", multiple=True, help="A model; may be repeated. By default all that are not in the file.")
@click.option("--threads", default=1, show_default=True)
def run(results: Path, only: tuple[str, ...], threads: int) -> None:
    """Measure models and append a line for each."""
    torch.set_num_threads(threads)
    done = {json.loads(line)["model"] for line in results.read_text().splitlines()} if results.exists() else set()
    for name in only or [name for name in (*NAMES, *transformers_models()) if name not in done]:
        try:
            row = measured(name)
        except Exception as error:
            row = {"model": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        click.echo(json.dumps(row))


@main.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def table(results: Path) -> None:
    """Print the results as a table; of several lines of a model, the last one."""
    rows = {row["model"]: row for row in map(json.loads, results.read_text().splitlines())}
    click.echo(
        "| model | input | choices | elastic | architectures | eval | train | cost | seconds | what stays, and why |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        if "choices" not in row:
            click.echo(f"| {name} | | | | | | | | | {row.get('refused') or row['failed']} |")
            continue
        reasons = sorted(row["fixed"].items(), key=lambda pair: -pair[1])[:3]
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons)
        cost = "exact" if row["cost"] else "differs"
        cells = [
            name, "x".join(map(str, row["input"])), row["choices"], f"{row['share']:.0%}",
            f"{row['architectures']:.0e}", f"{row['eval']:.0e}", f"{row['train']:.0e}", cost,
            f"{row['seconds']:.0f}", why,
        ]  # fmt: skip
        click.echo("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
