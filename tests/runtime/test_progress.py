"""What a person sees in a terminal while a stage runs."""

import contextlib
import os
import re
import threading

import pytest

from tanglenas_engine.runtime.progress import ConsoleProgress

pty = pytest.importorskip("pty")


def shown_in_a_terminal(action) -> list[str]:
    """What an action writes to a terminal: every state of its lines, without colours."""
    master, slave = pty.openpty()
    parts = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while part := os.read(master, 4096):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stdout, contextlib.redirect_stdout(stdout):
        action()
    reader.join()
    os.close(master)
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", b"".join(parts).decode()).replace("\r", "\n").splitlines()


def test_the_bar_and_the_time_stay_whole_beside_a_long_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")

    def train() -> None:
        with ConsoleProgress().stage("search", 600, 0) as line:
            line.advance()
            line.epoch(1, 30, "loss 2.296  train 15.8 %  embed_dim=48 depth=3 num_heads=3,3,4 mlp_ratio=3,4,4")

    last = [text for text in shown_in_a_terminal(train) if text.startswith("search")][-1]
    assert re.fullmatch(r"search [━╸╺]{20} \d:\d\d:\d\d eta [\d:-]+ epoch 1/30  loss 2.296 .*…", last), last
    assert len(last) <= 80


def test_what_follows_the_last_candidate_is_not_a_line_each(capsys):
    with ConsoleProgress(every=60).stage("discretize", 2, 0) as line:
        for number in (1, 2, 2, 2):
            line.epoch(number, 2, "best loss 0.394")
    said = [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()]
    assert said == ["discretize 1/2", "discretize 2/2"]


def test_a_line_without_a_summary_has_the_count_and_the_time(capsys):
    with ConsoleProgress().stage("rank correlation", 1, 0) as line:
        line.advance()
        line.epoch(1, 1, "")
    assert re.fullmatch(r"rank correlation 1/1  [\d.]+ s\n", capsys.readouterr().out)
