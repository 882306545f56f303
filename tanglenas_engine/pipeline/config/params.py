"""params.yaml, which holds what people sweep, and dvc.yaml, which hands it to the stages."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tanglenas_engine.errors import TangleNASError, closest
from tanglenas_engine.runtime.files import read_note

TEMPLATE = re.compile(r"\$\{\s*([^{}\s]+)\s*\}")
"""A value of params.yaml in dvc.yaml, such as `${search.epochs}` or `${seeds[0]}`."""
ONE_COMMAND = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^'"\\;&|()<>\n])*""", re.DOTALL)
"""What a shell reads as one command: no pipe, no end of a line and the like outside quotes."""


def check_params(params: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")) -> None:
    """Check that dvc.yaml uses every key of params.yaml: DVC itself ignores a misspelt one.

    Raises:
        TangleNASError: params.yaml is damaged, or dvc.yaml does not use a key. The message has the closest key that it
            uses.
    """
    if not (params.exists() and pipeline.exists()):
        return
    content = read_params(params)
    try:
        stages = read_note(pipeline).decode("utf-8")
    except (OSError, ValueError) as error:
        raise TangleNASError(
            f"dvc.yaml cannot be read: {' '.join(str(error).split())}. Bring it back with `git checkout dvc.yaml`"
        ) from None
    used = {name.partition("[")[0] for name in TEMPLATE.findall(stages)}
    known = {".".join(key.split(".")[:depth]) for key in used for depth in range(1, key.count(".") + 2)}
    for key in _keys(content):
        if key not in known:
            raise TangleNASError(
                f"params.yaml: nothing in dvc.yaml uses the key {key!r}.{closest(key, known)} "
                "Correct it, or use it as ${" + key + "} in a stage's cmd"
            )


def read_params(params: Path) -> dict[str, Any]:
    """Return the content of a params.yaml.

    Raises:
        TangleNASError: The file cannot be read, or is no mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    advice = "Correct it, or bring it back with `git checkout params.yaml`"
    try:
        content = YAML(typ="safe").load(read_note(params).decode("utf-8"))
    # Impossible bytes and dates raise a ValueError.
    except (YAMLError, OSError, ValueError, RecursionError) as error:
        raise TangleNASError(f"params.yaml cannot be read: {' '.join(str(error).split())}. {advice}") from None
    if not isinstance(content, dict | None):
        raise TangleNASError(
            f"params.yaml holds a {type(content).__name__}, expected a key and a value in every line. {advice}"
        )
    return content or {}


def is_study(params: Mapping[str, Any]) -> bool:
    """Return whether the content of a params.yaml is that of a study, whose stages depend on keys by their names."""
    return {"study", "arms"} <= params.keys()


def cached_outputs(pipeline: str) -> list[str]:
    """Return the outputs that DVC keeps in its cache, as paths from the folder of dvc.yaml.

    Args:
        pipeline: The text of dvc.yaml. A value that DVC fills in is `*` in a path.
    """
    from ruamel.yaml import YAML

    found = []
    for stage in YAML(typ="safe").load(pipeline)["stages"].values():
        stage = stage.get("do", stage)  # of a stage with `foreach`
        for out in (out for group in ("outs", "metrics", "plots") for out in stage.get(group, ())):
            ((name, flags),) = out.items() if isinstance(out, dict) else [(out, {})]
            if flags.get("cache", True):
                found.append(posixpath.normpath(posixpath.join(stage.get("wdir", ""), name)))
    return list(dict.fromkeys(TEMPLATE.sub("*", path) for path in found))


def stage_arguments(
    stage: str, params: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")
) -> list[str] | None:
    """Return the arguments with which `dvc repro` runs a stage; None if dvc.yaml lacks it, or a gin file is missing.

    They follow `-m pipelines.STAGE` in the stage's command, wherever that is: `OMP_NUM_THREADS=1 python`, `srun` or
    `torchrun` may come before it, and a command may be a list.

    Raises:
        TangleNASError: params.yaml is damaged.
    """
    command = stage_command(stage, params, pipeline)
    return None if command is None or command.missing else command.arguments


class StageCommand(NamedTuple):
    """The command of a stage in dvc.yaml, with the values of params.yaml.

    Attributes:
        before: What stands before `-m pipelines.STAGE`.
        arguments: The words after it.
        missing: The gin files among these that are not there.
    """

    before: str
    arguments: list[str]
    missing: list[str]


def stage_command(
    stage: str, params: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")
) -> StageCommand | None:
    """Return the command of a stage; None if dvc.yaml lacks it, or is damaged.

    Raises:
        TangleNASError: params.yaml is damaged.
    """
    if not (params.exists() and pipeline.exists()):
        return None
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    values: Any = read_params(params)

    def value(key: re.Match[str]) -> str:
        found = values
        for name in re.split(r"[.\[\]]+", key[1].rstrip("]")):
            found = found[int(name) if isinstance(found, list) else name]
        return str(found).lower() if isinstance(found, bool) else str(found)

    try:
        written = YAML(typ="safe").load(pipeline.read_text("utf-8"))["stages"][stage]["cmd"]
        command = TEMPLATE.sub(value, "\n".join(written) if isinstance(written, list) else written)
        started = re.search(rf"(?:^|\s)-m\s+pipelines\.{re.escape(stage)}(?=\s|$)", command)
        arguments = _words(command[started.end() :]) if started else []
    except (LookupError, TypeError, ValueError, YAMLError):  # a person changed the file; DVC says what is wrong with it
        return None
    missing = [argument for argument in arguments if argument.endswith(".gin") and not Path(argument).exists()]
    return StageCommand(command[: started.start()], arguments, missing) if started else None


def _words(text: str) -> list[str]:
    """Return the words of the first command in a text, as a shell reads them, without what it redirects.

    Raises:
        ValueError: A quote is not closed.
    """
    text = text.replace("\\\n", " ")
    own = ONE_COMMAND.match(text)
    end = own.end() if own else 0
    if text[end : end + 1] in ("'", '"'):
        raise ValueError("a quote is not closed")
    redirected = text[end : end + 1] in ("<", ">")  # as in `2> errors.log`
    return shlex.split(re.sub(r"\s\d+$", "", text[:end]) if redirected else text[:end])


def swept(params: Path) -> dict[str, Any]:
    """Return the values of params.yaml by the names that `dvc exp run -S` takes, such as `search.epochs`."""
    return parsed(params.read_text("utf-8"))


def parsed(text: str) -> dict[str, Any]:
    """Return the values in the text of a params.yaml, as `swept` does."""
    from ruamel.yaml import YAML

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
        return found

    return flat(YAML(typ="safe").load(text) or {})


def _keys(content: Any, prefix: str = "") -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
