"""A training that a race runs in any process: its losses follow from digests, and it notes every call in a folder."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tanglenas_engine.derivation.jobs import Trained
from tanglenas_engine.errors import DivergedError, TangleNASError


def loss_of(digest: str, epochs: int) -> float:
    """Return the loss of a network after a training."""
    return int(digest[:8], 16) / 2**32 + 1 / epochs


@dataclass(frozen=True)
class Noted:
    """A training that takes a processor second for an epoch, as it says, and half of that on the wall.

    Attributes:
        folder: Has an empty file for every call, `DIGEST-EPOCHS-NUMBER`.
        bad: What comes instead of a loss, by digest: "nan", "inf", "-inf", "raise", "late" after 3 epochs, "stop" once,
            "kill" once, "full" once, as if the disk were, or "lose", as if the worker were lost each time.
    """

    folder: Path
    epochs: int = 9
    identity: str = "recipe"
    bad: tuple[tuple[str, str], ...] = ()

    def __call__(self, architecture, epochs):
        digest = architecture.digest
        before = len(list(self.folder.glob(f"{digest}-{epochs}-*")))
        (self.folder / f"{digest}-{epochs}-{before}").touch()
        match dict(self.bad).get(digest):
            case "nan" | "inf" | "-inf" as loss:
                return Trained(float(loss), 0.0, epochs)
            case "late" if epochs > 3:
                raise DivergedError("training diverged")
            case "raise":
                raise DivergedError("training diverged")
            case "full" if before == 0:
                raise TangleNASError("cannot write state.pt: No space left on device.")
            case "stop" if len(list(self.folder.glob(f"{digest}-*"))) == 1:
                raise KeyboardInterrupt
            case "kill" if before == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            case "lose":
                raise BrokenProcessPool("A worker was terminated. Memory?")
        return Trained(loss_of(digest, epochs), 50.0, epochs, wall=epochs / 2)

    def calls(self) -> list[tuple[str, int]]:
        """Return the digests and epochs of all calls."""
        parts = (path.name.split("-") for path in self.folder.iterdir())
        return sorted((digest, int(epochs)) for digest, epochs, _ in parts)
