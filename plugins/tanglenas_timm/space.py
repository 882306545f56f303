"""A base of spaces whose largest network is one of timm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg, save_for_hf
from torch import Tensor, nn

from tanglenas_engine import Architecture, Described, SearchSpace


class TimmSpace(SearchSpace):
    """A space of image classifiers that has the parameter names of a network of timm.

    A subclass says how timm builds the standalone network of an architecture: `model` and `arguments`.

    Attributes:
        model: The name under which timm knows standalone networks.
        first_conv: The name of the convolution that reads the image.
        fixed_size: Whether networks read images of one size only, so that timm has to be told the size.
        image_size: Pixels of a side of an image.
        settings: Arguments of the standalone network that all architectures share, `num_classes` and `in_chans` among
            them.
    """

    model: str
    first_conv: str
    fixed_size = False
    image_size: int
    settings: dict[str, Any]

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        """Return the arguments of the standalone network for an architecture, as JSON can hold them."""
        raise NotImplementedError

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.settings["in_chans"], self.image_size, self.image_size)

    def source(self, folder: Path) -> nn.Module | None:
        """Build timm's network of a folder with timm's config.json, for images of this space's size."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if "architecture" not in config:
            return None
        classes = self.settings["num_classes"]
        size = {"img_size": self.image_size} if self.fixed_size else {}
        overlay: dict[str, Any] = {}
        if (index := folder / "model.safetensors.index.json").is_file():  # timm reads one of several files
            files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            weights = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
            overlay["pretrained_cfg_overlay"] = {"source": "", "state_dict": weights}
        network: nn.Module = timm.create_model(
            f"local-dir:{folder}", pretrained=True, num_classes=classes, **size, **overlay
        )
        if config.get("num_classes") != classes:
            network.get_classifier().load_state_dict(self.get_submodule(self.output_layer).state_dict())
        return network

    def export(
        self, network: nn.Module, architecture: Architecture, folder: Path, dataset: Described | None = None
    ) -> None:
        """Write a folder that `timm.create_model("local-dir:...", pretrained=True)` loads.

        `timm.data.create_transform` then makes inputs as the dataset does, and `pretrained_cfg["label_names"]` names
        the classes. The `config.json` leaves out what the dataset does not say of its inputs, and without a dataset all
        of it; timm has ImageNet's values then. What timm has no name for stands beside `pretrained_cfg`.
        """
        said = dataset.input_config() if dataset else {}
        fields = PretrainedCfg.__dataclass_fields__  # timm refuses a pretrained_cfg with any other
        known = {name: value for name, value in said.items() if name in fields}
        network.pretrained_cfg = {
            "input_size": (self.settings["in_chans"], self.image_size, self.image_size),
            **known,
            "architecture": self.model,
            "num_classes": self.settings["num_classes"],
            **({"fixed_input_size": True} if self.fixed_size else {}),
            "first_conv": self.first_conv,
            "classifier": self.output_layer,
        }
        save_for_hf(network, folder, model_args=self.arguments(architecture), safe_serialization=True)
        path = Path(folder, "config.json")
        config = json.loads(path.read_text("utf-8"))
        for name in {"mean", "std", "crop_pct", "interpolation"} - known.keys():  # timm writes those of ImageNet
            config["pretrained_cfg"].pop(name, None)
        config |= {name: value for name, value in said.items() if name not in fields}
        path.write_text(json.dumps(config, indent=2), "utf-8")
