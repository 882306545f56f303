"""Processes that train together, for tests.

Each runs `python tests/support/ranks.py CASES FOLDER` with torchrun's environment. CASES names functions of
`ranked.py`; what each returns is saved as FOLDER/CASE-RANK.pt.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def environments(world: int) -> list[dict[str, str]]:
    """Return what torchrun, which takes seconds to start, would tell each of `world` processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def start(cases: list[str], folder: Path, world: int) -> list[subprocess.Popen]:
    """Start `world` processes that run the cases one after the other."""
    return [
        subprocess.Popen(
            [sys.executable, __file__, ",".join(cases), str(folder)],
            env={**os.environ, **told, "TANGLENAS_DEVICE": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for told in environments(world)
    ]


def results(case: str, folder: Path, world: int) -> list:
    """What the ranks returned."""
    return [torch.load(folder / f"{case}-{rank}.pt") for rank in range(world)]


if __name__ == "__main__":
    import ranked

    from tanglenas_engine.runtime import distributed

    torch.set_num_threads(1)
    names, place = sys.argv[1].split(","), Path(sys.argv[2])
    with distributed.process_group():
        for name in names:
            torch.manual_seed(0)
            torch.save(getattr(ranked, name)(), place / f"{name}-{distributed.rank()}.pt")
