"""The engine's side of tracking: the protocol, and the tracker that costs nothing."""

import inspect
import subprocess
import sys

from tanglenas_engine.runtime.tracking import NullTracker, Tracker


def methods(kind: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(item) for name, item in vars(kind).items() if inspect.isfunction(item)}


def test_the_null_tracker_takes_every_call_of_the_protocol() -> None:
    protocol = {name: signature for name, signature in methods(Tracker).items() if not name.startswith("_")}
    assert set(protocol) == {"log_params", "log_metrics", "log_artifact", "log_text", "set_tags"}
    assert methods(NullTracker) == protocol


def test_the_null_tracker_looks_at_nothing_it_is_given() -> None:
    tracker: Tracker = NullTracker()
    unread = object()
    tracker.log_params(unread)  # type: ignore[arg-type]
    tracker.log_metrics(unread, step=0)  # type: ignore[arg-type]
    tracker.log_artifact("missing/file")


def test_tracking_in_the_engine_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, tanglenas_engine.runtime.tracking\n"
        "print([name for name in ('torch', 'mlflow', 'numpy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
