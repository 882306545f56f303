"""`tanglenas export`: the network found, in a format that others load; each is compared with the network itself."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tanglenas_engine.errors import TangleNASError, shown

from ._console import read_text
from ._model import CONFIG, OWN_TRANSFORM, TEXTS, TOKENIZER, Known, known_beside, sizes_beside, transformers_model
from ._space import parsed, read, read_architecture, space_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from tanglenas_engine.data import Dataset, Described
    from tanglenas_engine.spaces.architecture import Architecture
    from tanglenas_engine.spaces.space import SearchSpace

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output: other runtimes sum in another order."""
ARCHITECTURE, SPLITS = "architecture.json", "splits.json"
WRITTEN = (
    ARCHITECTURE, CONFIG, TOKENIZER, "tokenizer_config.json", "modeling_tanglenas_*.py",
    "model.safetensors", "model.pt2", "model.onnx",
)  # fmt: skip
"""The files that formats write. One that another export left would be read as a part of this one."""
STATISTICS = 8
"""Batches that set the statistics of batch norms, as many as `retrain.mode = "inherit"` takes by default."""


@dataclass
class Export:
    """A network to export, and the folder to export it to."""

    space: SearchSpace
    architecture: Architecture
    options: dict[str, Any]
    network: nn.Module
    folder: Path
    known: Described | None


Forward = Callable[["Tensor"], "Tensor"]
Format = Callable[[Export], tuple[Forward, str]]
"""Writes files, and gives the function that they hold, read again, with the code by which others read them."""


@click.command(short_help="Write the network found in a format that others load.")
@click.argument("file", metavar="ARCH", type=click.Path(path_type=Path))
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), required=True,
              help="The network's model.safetensors, or the supernet's supernet.safetensors.")  # fmt: skip
@click.option(
    "--format", "name", type=click.Choice(["timm", "transformers", "torch", "onnx", "torch-export"]), required=True
)
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), required=True)
@space_options
def command(file: Path, weights: Path, name: str, output: Path, options: tuple[str, ...]) -> None:
    """Write the network of the file ARCH with its weights into DIR, and compare what was written with the network.

    \b
    timm          a folder for timm.create_model("local-dir:DIR")
    transformers  a folder for AutoModelForCausalLM.from_pretrained("DIR"); needs the extra: pip install 'tanglenas[hf]'
    torch         architecture.json, config.json and model.safetensors, for this project
    onnx          model.onnx, for any runtime; needs the extra: pip install 'tanglenas[onnx]'
    torch-export  model.pt2, for torch alone

    The names of classes, and mean, standard deviation and size of inputs, are stored with it; the tokenizer of a text
    lies beside it. They are those beside the weights, or else those of the dataset of the run if its sizes are those
    of the network. The sizes of the network are those beside the weights, too, or else those of the stage that wrote
    ARCH.
    """
    import torch

    space, architecture, made_with, config = read(file, options, sizes_beside(weights))
    dataset, trouble = _dataset(config, made_with, parsed(options))
    network = _network(space, architecture, weights, config, dataset, trouble).eval()
    known: Described | None = known_beside(weights) or dataset
    torch.manual_seed(0)
    batches = [space.example_input(3)]  # another batch size than the traced one
    if isinstance(known, Known) and "input_size" in known.config:  # a person may give another size of images
        known = replace(known, config={**known.config, "input_size": [*batches[0].shape[1:]]})
    batches += [batches[0].narrow(axis, 0, (most + 1) // 2).clone() for axis, (_, most) in space.dynamic_axes.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, torch.no_grad():
        folder = Path(scratch, "export")
        folder.mkdir()
        forward, code = FORMATS[name](Export(space, architecture, made_with, network, folder, known))
        pairs = [(network(inputs), forward(inputs)) for inputs in batches]
        # torch's maximum of values with a NaN is NaN, where Python's may be any of them.
        difference = float(torch.stack([(expected - got).abs().max() for expected, got in pairs]).max())
        largest = float(torch.stack([expected.abs().max() for expected, _ in pairs]).max())
        if not difference <= TOLERANCE * largest:
            raise TangleNASError(
                f"the export as {name} is wrong: it differs from the network by up to {difference:.3g}, where outputs "
                f"go up to {largest:.3g}. Nothing was written; another format may do"
            )
        _refuse_others(folder, output)
        written = [output / path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        shutil.copytree(folder, output, dirs_exist_ok=True)
    for path in written:
        click.echo(f"{path}  {path.stat().st_size:,} bytes")
    click.echo(f"largest difference from the network: {difference:.3g} (outputs go up to {largest:.3g})\n")
    click.echo(code.replace("DIR", output.as_posix()))
    if known is None:
        click.echo(
            f"{weights.parent} has no config.json, and {trouble or f'no run is known that made {file}'}: the network "
            "has no names of classes, and nothing says how its inputs are made",
            err=True,
        )
    elif not ("block_size" in (said := known.input_config()) or {"mean", "std"} <= said.keys()):
        click.echo(f"nothing says how the inputs of the network are made. {OWN_TRANSFORM}", err=True)


def _dataset(config: Path | None, made_with: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Dataset | None, str]:
    """Return the dataset of the run, or None and why it is not that of the network, where a run is known.

    Args:
        made_with: The options of the space of the network.
        given: Those of them that a person gave.
    """
    if config is None:
        return None, ""
    from ..pipeline import finished_runs

    try:
        dataset = finished_runs.dataset_of(config)
    except TangleNASError as error:
        return None, f"the dataset of the run cannot be opened ({shown(error)})"
    for name, size in dataset.space_options().items():
        own = made_with.get(name, size)
        # A run may have room for more tokens than its text has, as recipes that round vocab_size up.
        room = name in TEXTS and name not in given and own > size
        if own != size and not room:
            return None, f"the dataset of the run has the {name} {size}, the network {shown(own)}"
    return dataset, ""


def _refuse_others(folder: Path, output: Path) -> None:
    """Refuse an output folder with files of another export, which `predict` and others would take for this one's.

    Files of equal names are written anew, so a network may be exported again in the same format.
    """
    names = sorted({path.name for pattern in WRITTEN for path in output.glob(pattern)})
    if others := [name for name in names if not (folder / name).exists()]:
        raise TangleNASError(
            f"{output} has {', '.join(others)} of another network or format, which would be read in place of what is "
            "exported now or as a part of it. Nothing was written: give a new folder as --output, or delete these files"
        )


def _network(
    space: SearchSpace,
    architecture: Architecture,
    weights: Path,
    config: Path | None,
    dataset: Dataset | None,
    trouble: str,
) -> nn.Module:
    """Return the network with its own weights, or with those that it inherits from the supernet."""
    from tanglenas_engine.pipeline.files import trained_divisor
    from tanglenas_engine.runtime.weights import OtherWeightsError, load_into, weights_metadata

    metadata, own = weights_metadata(weights), space.standalone(architecture)
    # Names and shapes do not tell the supernet's weights from those of its largest network. Only search, which wrote
    # the supernet's, says by which optimizer they were trained.
    for network in (space,) if "optimizer" in metadata else (own, space):
        try:
            prefix = load_into(network, weights, space.converted)  # other sizes of images, too, as evaluate
            break
        except OtherWeightsError as error:
            reason = str(error)[str(error).index("(") :]
    else:
        raise TangleNASError(
            f"{weights} holds the weights of another network than the one of this architecture of {space.name!r}, "
            f"and of another supernet {reason}. Give the file that retrain wrote for it, or as ARCH the "
            "pareto/DIGEST.json that retrain.pick took, or set the space's options with -o"
        )
    if prefix:
        click.echo(f"{weights}: all names begin with {prefix!r}, which was left out", err=True)
    if network is space:
        space.superposition.trained_divisor = trained_divisor(space, weights)
        if space.untrained:
            raise TangleNASError(
                f"{weights} holds the supernet's weights, but {space.untrained}: its outputs are chance. Give the file "
                "that retrain wrote"
            )
        return _recalibrated(space.extract(architecture).eval(), weights, config, dataset, trouble)
    _check_architecture(space, architecture, weights, metadata)
    return own


def _recalibrated(
    network: nn.Module, weights: Path, config: Path | None, dataset: Dataset | None, trouble: str
) -> nn.Module:
    """Return the network with statistics of batch norms of its own, as `retrain.mode = "inherit"` sets them.

    Those of the supernet are of many architectures.

    Raises:
        TangleNASError: The network needs statistics, and the data of the run are not known.
    """
    import torch

    from tanglenas_engine.data import Splits, open_splits
    from tanglenas_engine.pipeline.project import in_project_of
    from tanglenas_engine.training.measure import recalibrate, running_statistics, statistics_inputs

    if not running_statistics(network):
        return network
    path = weights.with_name(SPLITS)
    if config is None or dataset is None or not path.is_file():
        needs = (
            f"give the supernet.safetensors of the run, which lies beside its {SPLITS}"
            if dataset is not None
            else f"bring them back ({trouble})"
            if trouble
            else "give the architecture.json of the run, which lies beside its operative.gin"
        )
        raise TangleNASError(
            f"{weights} holds the supernet's weights. Its batch norms have statistics of many architectures, with "
            f"which this network computes something else. To measure its own on the data of the run, {needs}. Or set "
            "retrain.mode=inherit, run `dvc repro`, and export the weights that retrain writes"
        )
    splits = Splits.from_json(read_text(path, "the splits that search writes"))
    with in_project_of(config):
        samples = open_splits(dataset, splits, ("training",)).plain("training")
        recalibrate(network, statistics_inputs(network, samples, STATISTICS, splits.seed, torch.device("cpu")))
    click.echo(f"{weights}: the statistics of batch norms were set anew, on training data of the run", err=True)
    return network


def _check_architecture(
    space: SearchSpace, architecture: Architecture, weights: Path, metadata: Mapping[str, str]
) -> None:
    """Refuse the weights of another architecture, whose tensors may have equal names and shapes.

    The weights' metadata has the digest of their architecture, or else the architecture.json beside them is theirs.
    """
    digest, told_by, beside = metadata.get("architecture"), weights, weights.with_name(ARCHITECTURE)
    if digest is None and beside.is_file():
        other, told_by = read_architecture(beside), beside
        digest = (space.architecture_of(space.assignment_of(other)) if other.space == space.name else other).digest
    if digest not in (None, architecture.digest):
        raise TangleNASError(
            f"{weights} holds the weights of another architecture than ARCH: {told_by} says {digest}, and ARCH is "
            f"{architecture.digest}. Give the file that retrain wrote for ARCH, or the architecture.json beside it as "
            "ARCH"
        )


def _name_in_timm(export: Export) -> str | None:
    """Write the space's own form of the network, and return the name of its architecture in timm, if it has one."""
    export.space.export(export.network, export.architecture, export.folder, export.known)
    config = export.folder / "config.json"
    name: str | None = json.loads(config.read_text("utf-8")).get("architecture") if config.exists() else None
    return name


def _timm(export: Export) -> tuple[Forward, str]:
    architecture = _name_in_timm(export)
    if architecture is None:
        own = "" if export.space.to_transformers(export.network) is None else "transformers, "
        raise TangleNASError(
            f"the space {export.space.name!r} has no form in timm. Choose {own}torch-export, onnx or torch"
        )
    import timm  # only this format needs it

    home = timm.models.model_entrypoint(architecture).__module__
    registered = "" if home.startswith("timm.") else f"import {home}  # tells timm about {architecture}\n"
    code = f'import timm\n{registered}\nmodel = timm.create_model("local-dir:DIR", pretrained=True).eval()'
    return timm.create_model(f"local-dir:{export.folder}", pretrained=True).eval(), code


def _transformers(export: Export) -> tuple[Forward, str]:
    from safetensors.torch import save_file

    from tanglenas_engine.spaces.space import SearchSpace

    form = export.space.to_transformers(export.network)
    if form is None:
        own = "" if _name_in_timm(export) is None else "timm, "
        raise TangleNASError(
            f"the space {export.space.name!r} has no form in transformers. Choose {own}torch-export, onnx or torch"
        )
    AutoModelForCausalLM = transformers_model()
    weights, config, code = form
    SearchSpace.export(export.space, export.network, export.architecture, export.folder, export.known)
    path = export.folder / CONFIG
    path.write_text(json.dumps({**config, **json.loads(path.read_text("utf-8"))}, indent=2) + "\n", "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()},
              export.folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    for name, text in code.items():
        (export.folder / name).write_text(text, encoding="utf-8")
    if (export.folder / TOKENIZER).is_file():
        # Without this, transformers builds the tokenizer of the type of the model, and ignores parts of the file.
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": _known(export).get("block_size")}
        (export.folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    trust = ", trust_remote_code=True" if code else ""
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(export.folder, trust_remote_code=bool(code)).eval()
    needs = f"  # layers differ, so {', '.join(code)} in DIR runs" if code else ""
    text = f"""\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR"{trust}).eval(){needs}"""
    return lambda inputs: model(inputs).logits, text


def _torch(export: Export) -> tuple[Forward, str]:
    from tanglenas_engine.runtime.weights import load_weights
    from tanglenas_engine.spaces.architecture import Architecture
    from tanglenas_engine.spaces.space import SearchSpace

    for name, value in export.options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise TangleNASError(
                f"the space {export.space.name!r} was made with the option {name}={value!r}, which no file of this "
                "format can hold, and without which nobody can make the network. Choose torch-export or onnx"
            ) from None
    SearchSpace.export(export.space, export.network, export.architecture, export.folder, export.known)
    options = "".join(f", {name}={value!r}" for name, value in export.options.items())
    code = f"""\
from pathlib import Path
from safetensors.torch import load_file
from tanglenas_engine import Architecture, create_space

space = create_space({export.space.name!r}{options})
model = space.standalone(Architecture.from_json(Path("DIR/architecture.json").read_text())).eval()
model.load_state_dict(load_file("DIR/model.safetensors"))"""
    read_again = Architecture.from_json((export.folder / ARCHITECTURE).read_text("utf-8"))
    network = export.space.standalone(read_again).eval()
    network.load_state_dict(load_weights(export.folder / "model.safetensors"))
    return network, code


def _torch_export(export: Export) -> tuple[Forward, str]:
    import torch

    path = export.folder / "model.pt2"
    _write_files(export)
    with _quiet():
        torch.export.save(_traced(export), path, extra_files={CONFIG: json.dumps(_known(export), indent=2)})
        model = torch.export.load(path).module()
    code = """\
import torch

about = {"config.json": ""}  # becomes what is known of the network, as JSON
model = torch.export.load("DIR/model.pt2", extra_files=about).module()"""
    return model, code


def _onnx(export: Export) -> tuple[Forward, str]:
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise TangleNASError(f"ONNX needs more than is installed ({error}): pip install 'tanglenas[onnx]'") from None
    path = export.folder / "model.onnx"
    _write_files(export)
    with _quiet():
        program = torch.onnx.export(
            _traced(export),
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: "batch", **{axis: name for axis, (name, _) in export.space.dynamic_axes.items()}},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in _known(export).items()})
        program.save(path, external_data=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])

    code = """\
import onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx", providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map  # what is known of the network, each value as JSON
# outputs = session.run(None, {"input": inputs})[0], where inputs is a numpy array"""
    return forward, code


def _known(export: Export) -> dict[str, Any]:
    return export.known.input_config() if export.known else {}


def _write_files(export: Export) -> None:
    """Write the files that inputs are made with, such as a tokenizer, beside a network."""
    for name, text in (export.known.files() if export.known else {}).items():
        (export.folder / name).write_text(text, encoding="utf-8")


def _traced(export: Export) -> Any:
    """Trace the network as a graph that takes any batch size, and any length of the axes that may vary."""
    import torch

    axes = {axis: torch.export.Dim(name, min=1, max=most) for axis, (name, most) in export.space.dynamic_axes.items()}
    shapes = ({0: torch.export.Dim("batch"), **axes},)
    try:
        program = torch.export.export(export.network, (export.space.example_input(2),), dynamic_shapes=shapes)
    except Exception as error:  # tracing may raise anything
        reason = " ".join(str(error).split())[:300]
        raise TangleNASError(f"torch cannot trace this network ({reason}). Choose the format timm or torch") from None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it has paths of this machine
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' messages about themselves. What they wrote is checked instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


FORMATS: dict[str, Format] = {
    "timm": _timm,
    "transformers": _transformers,
    "torch": _torch,
    "onnx": _onnx,
    "torch-export": _torch_export,
}
