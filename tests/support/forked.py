"""Processes that start in a moment: forks of a server that has imported what takes seconds."""

import functools
import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from paths import ROOT

PLUGINS = [path.name for path in (ROOT / "plugins").glob("tanglenas_*")]


@functools.cache
def server() -> ForkServerContext:
    """Forks processes that have everything imported. They share a hash seed, which is not that of this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kills", "sklearn.datasets", "timm", "matplotlib.pyplot", "mlflow", *PLUGINS])
    return context


class Forked:
    """A process that runs some code with arguments.

    Args:
        folder: Its current folder; by default that of this process.
        environment: All of its variables; by default those of this process.

    Attributes:
        stdout: What the code prints, to stderr too.
        returncode: The exit status, negative for a signal; None while the process may run.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        context = server()
        reads, writes = (context.Pipe(duplex=False) for _ in range(2))
        place = str(folder or Path.cwd()), dict(environment or os.environ)
        given = (code, [str(argument) for argument in arguments], *place, reads[0], writes[1])
        self._process = context.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid
        self._stdin, self.stdout = reads[1], os.fdopen(os.dup(writes[0].fileno()))
        for end in (reads[0], *writes):
            end.close()
        self.returncode: int | None = None

    def kill(self) -> None:
        self._process.kill()

    def let_go(self) -> None:
        """End what the code reads from stdin."""
        self._stdin.close()

    def wait(self) -> None:
        self._process.join(timeout=300)
        self.returncode = self._process.exitcode
        if self.returncode is None:
            self.kill()
            raise AssertionError("the process does not end")

    def finished(self, status: int = 0) -> str:
        """Return what the code printed, which must fit a pipe; its exit status must be `status`."""
        self.let_go()
        with self:
            self.wait()
            said = self.stdout.read()
        assert self.returncode == status, said
        return said

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self.wait()
        self.stdout.close()


def _run(
    code: str, arguments: list[str], folder: str, environment: dict[str, str], stdin: Connection, stdout: Connection
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for end, number in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(end.fileno(), number)
    stdin.close()
    stdout.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
