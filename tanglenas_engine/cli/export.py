"""`tanglenas export`: the network found, in a format that others load; each is compared with the network itself."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tanglenas_engine.errors import TangleNASError

from ._space import read, space_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from tanglenas_engine.spaces.architecture import Architecture
    from tanglenas_engine.spaces.space import SearchSpace

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output: other runtimes sum in another order."""


@dataclass
class Export:
    """A network to export, and the folder to export it to."""

    space: SearchSpace
    architecture: Architecture
    options: dict[str, Any]
    network: nn.Module
    folder: Path


Forward = Callable[["Tensor"], "Tensor"]
Format = Callable[[Export], tuple[Forward, str]]
"""Writes files, and gives the function that they hold, read again, with the code by which others read them."""


@click.command(short_help="Write the network found in a format that others load.")
@click.argument("file", metavar="ARCH", type=click.Path(path_type=Path))
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), required=True,
              help="The network's model.safetensors, or the supernet's supernet.safetensors.")  # fmt: skip
@click.option("--format", "name", type=click.Choice(["timm", "torch", "onnx", "torch-export"]), required=True)
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), required=True)
@space_options
def command(file: Path, weights: Path, name: str, output: Path, options: tuple[str, ...]) -> None:
    """Write the network of the file ARCH with its weights into DIR, and compare what was written with the network.

    \b
    timm          a folder for timm.create_model("local-dir:DIR")
    torch         architecture.json and model.safetensors, for this project
    onnx          model.onnx, for any runtime; needs the extra: pip install 'tanglenas[onnx]'
    torch-export  model.pt2, for torch alone
    """
    import torch

    space, architecture, made_with = read(file, options)
    network = _network(space, architecture, weights).eval()
    torch.manual_seed(0)
    inputs = space.example_input(3)  # another batch size than the traced one
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, torch.no_grad():
        folder = Path(scratch, "export")
        folder.mkdir()
        forward, code = FORMATS[name](Export(space, architecture, made_with, network, folder))
        expected, got = network(inputs), forward(inputs)
        difference, largest = float((expected - got).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE * largest:
            raise TangleNASError(
                f"the export as {name} is wrong: it differs from the network by up to {difference:.3g}, where outputs "
                f"go up to {largest:.3g}. Nothing was written; another format may do"
            )
        written = [output / path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        shutil.copytree(folder, output, dirs_exist_ok=True)
    for path in written:
        click.echo(f"{path}  {path.stat().st_size:,} bytes")
    click.echo(f"largest difference from the network: {difference:.3g} (outputs go up to {largest:.3g})\n")
    click.echo(code.replace("DIR", output.as_posix()))


def _network(space: SearchSpace, architecture: Architecture, weights: Path) -> nn.Module:
    """Return the network with its weights, cut from the supernet's if need be."""
    from tanglenas_engine.runtime.weights import OtherWeightsError, load_into

    network = space.standalone(architecture)
    try:
        prefix = load_into(network, weights)
    except OtherWeightsError:
        try:
            prefix = load_into(space, weights)
        except OtherWeightsError as error:
            raise TangleNASError(
                f"{weights} holds the weights of another network than the one of this architecture of {space.name!r}, "
                f"and of another supernet {str(error)[str(error).index('(') :]}. Give the file that retrain wrote for "
                "it, or set the space's options with -o"
            ) from None
        network = space.extract(architecture)
    if prefix:
        click.echo(f"{weights}: all names begin with {prefix!r}, which was left out", err=True)
    return network


def _timm(export: Export) -> tuple[Forward, str]:
    export.space.export(export.network, export.architecture, export.folder)
    config = export.folder / "config.json"
    architecture = json.loads(config.read_text("utf-8")).get("architecture") if config.exists() else None
    if architecture is None:
        raise TangleNASError(f"the space {export.space.name!r} has no form in timm. Choose torch-export, onnx or torch")
    import timm  # only this format needs it

    home = timm.models.model_entrypoint(architecture).__module__
    registered = "" if home.startswith("timm.") else f"import {home}  # tells timm about {architecture}\n"
    code = f'import timm\n{registered}\nmodel = timm.create_model("local-dir:DIR", pretrained=True).eval()'
    return timm.create_model(f"local-dir:{export.folder}", pretrained=True).eval(), code


def _torch(export: Export) -> tuple[Forward, str]:
    from tanglenas_engine.runtime.files import write_atomic
    from tanglenas_engine.runtime.weights import load_weights, save_weights
    from tanglenas_engine.spaces.architecture import Architecture

    write_atomic(export.folder / "architecture.json", export.architecture.to_json())
    save_weights(export.folder / "model.safetensors", export.network.state_dict(), {"space": export.space.name})
    options = "".join(f", {name}={value!r}" for name, value in export.options.items())
    code = f"""\
from pathlib import Path
from safetensors.torch import load_file
from tanglenas_engine import Architecture, create_space

space = create_space({export.space.name!r}{options})
model = space.standalone(Architecture.from_json(Path("DIR/architecture.json").read_text())).eval()
model.load_state_dict(load_file("DIR/model.safetensors"))"""
    read_again = Architecture.from_json((export.folder / "architecture.json").read_text("utf-8"))
    network = export.space.standalone(read_again).eval()
    network.load_state_dict(load_weights(export.folder / "model.safetensors"))
    return network, code


def _torch_export(export: Export) -> tuple[Forward, str]:
    import torch

    path = export.folder / "model.pt2"
    with _quiet():
        torch.export.save(_traced(export), path)
        model = torch.export.load(path).module()
    return model, 'import torch\n\nmodel = torch.export.load("DIR/model.pt2").module()'


def _onnx(export: Export) -> tuple[Forward, str]:
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise TangleNASError(f"ONNX needs more than is installed ({error}): pip install 'tanglenas[onnx]'") from None
    path = export.folder / "model.onnx"
    with _quiet():
        program = torch.onnx.export(
            _traced(export), input_names=["input"], output_names=["output"], dynamo=True, verbose=False
        )
        assert program is not None
        program.save(path, external_data=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])

    code = """\
import onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx", providers=["CPUExecutionProvider"])
# outputs = session.run(None, {"input": inputs})[0], where inputs is a numpy array"""
    return forward, code


def _traced(export: Export) -> Any:
    """Trace the network as a graph that takes any batch size."""
    import torch

    shapes = ({0: torch.export.Dim("batch")},)
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


FORMATS: dict[str, Format] = {"timm": _timm, "torch": _torch, "onnx": _onnx, "torch-export": _torch_export}
