"""How the forwards of a network run: in which precision, and compiled or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError, unknown

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """What a matrix product is computed in. Parameters, alphas, masks and losses stay float32.

    Args:
        name: "float32", "bfloat16", or "float16", which needs a GPU: its gradients are scaled to be in its range.

    Raises:
        TangleNASError: There is no such precision, or not on this device.
    """

    def __init__(self, name: str, device: torch.device):
        if name not in PRECISIONS:
            raise unknown("precision", name, PRECISIONS)
        if name == "float16" and device.type != "cuda":
            raise TangleNASError(
                f"precision 'float16' needs a GPU, and the device is {device.type!r}: use 'bfloat16' or 'float32'"
            )
        dtype = PRECISIONS[name]
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        # Without float16 its methods hand on what they get.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def run(self, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The outputs of a forward, in float32."""
        if not self.autocast._enabled:
            return forward(*inputs)
        with self.autocast:
            outputs = forward(*inputs)
        return outputs.float()
