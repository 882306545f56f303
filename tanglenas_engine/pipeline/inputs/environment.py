"""Files with the dependencies that DVC does not see: environment.json, out/recipe.json and out/inputs/.

environment.json has the installed packages that results depend on: versions, and a digest of the sources of the library
and of each plugin in use, as a package that is installed for editing keeps its version while its code changes. The
library's digest covers the stages' code in this package. Weights that a search starts from have a digest too, if they
are on this machine, because they are no dependency in dvc.yaml.

out/inputs/STAGE.json has the digests of what one stage reads: gin files, also those that others include, the code
behind an @ with what it imports of the project, the data, and the files of benchmarks and objectives. So a pool that
grew runs `evaluate` again, and no search. Stages of a study have no such file: environment.json has the digests of
their data.

out/recipe.json tells which recipe of the retrain stage a race trains by. Other methods of discretize do not depend on
that recipe, and have an empty one there, so that only a race runs again when the recipe changes.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tanglenas_engine
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import tables
from tanglenas_engine.pipeline.config.params import stage_arguments
from tanglenas_engine.pipeline.config.reader import configured, is_material, referred
from tanglenas_engine.pipeline.files import STAGES
from tanglenas_engine.pipeline.inputs.data_digests import DataDigests, EditionError, data_digests
from tanglenas_engine.pipeline.inputs.own_code import own_code
from tanglenas_engine.pipeline.inputs.pretrained import local_digest
from tanglenas_engine.pipeline.project import project_root
from tanglenas_engine.pipeline.studies.run import STAGES_FILE, arguments_of
from tanglenas_engine.pipeline.studies.run_folder import in_run_folder, read_params
from tanglenas_engine.plugins import Registration, manager
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.fingerprint import code_version, file_digest

RECIPE, INPUTS = Path("out", "recipe.json"), Path("out", "inputs")
UNUSED = "read_architecture."
"""The beginning of the bindings of the retrain stage that no race depends on, though results do."""
KINDS = ("space", "optimizer", "dataset")
LIBRARIES = ("tanglenas", "timm", "torch")


def write_environment(names: Sequence[str]) -> None:
    """Write the versions and the sources for these plugins to `environment.json`: a space, an optimizer, a dataset.

    Several of a kind have commas between them. A fourth name is the source of the weights that the search starts from.
    Write the recipe of a race, too.

    gin files may name an objective anywhere, so all objectives that are installed count. A name that no plugin has
    ends the process with one sentence and the status 2, as a dataset does whose `edition` fails.
    """
    try:
        _write(names)
    except TangleNASError as problem:
        print(f"environment: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def _write(names: Sequence[str]) -> None:
    if len(names) not in (len(KINDS), len(KINDS) + 1):
        raise TangleNASError(f"got the arguments {list(names)}, expected the names of {', '.join(KINDS)}")
    kinds = zip(KINDS, names, strict=False)
    used = [manager().resolve(kind, name) for kind, several in kinds for name in several.split(",")]
    digests = {source: digest for source in names[len(KINDS) :] if (digest := local_digest(source))}
    used += manager().registrations("objective")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions.update((it.distribution, it.version) for it in used)
    modules = {package: importlib.import_module(package) for package in map(_package, used)}
    modules["tanglenas_engine"] = tanglenas_engine
    root = project_root()
    digests_of_data = DataDigests(root / ".tanglenas" / "data-digests.json", root)
    data = _data_of_study(digests_of_data) if STAGES_FILE.exists() else {}
    content = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "versions": dict(sorted(versions.items())),
        "sources": {name: code_version(module) for name, module in sorted(modules.items())},
        **({"weights": digests} if digests else {}),
        **({"data": data} if data else {}),
    }
    write_atomic("environment.json", json.dumps(content, indent=2) + "\n")
    write_atomic(RECIPE, json.dumps(_recipe(digests_of_data), indent=2) + "\n")
    for stage in STAGES:
        text = json.dumps(_inputs(stage, digests_of_data), indent=2, sort_keys=True) + "\n"
        write_atomic(INPUTS / f"{stage}.json", text)
    digests_of_data.save()


def _data_of_study(digests: DataDigests) -> dict[str, Any]:
    """Return the digests of the data of a study, by arm and stage where these have different data."""
    found: dict[str, dict[str, Any]] = {}
    for arm in read_params(Path())["arms"]:
        with suppress(TangleNASError), in_run_folder(arm, "0", Path(".tanglenas", "study")):
            for stage in STAGES:
                found[f"{arm}: {stage}"] = _data_of(arguments_of(stage), digests)
    if not found:
        return {}
    first = next(iter(found.values()))
    return first if all(data == first for data in found.values()) else found


def _data_of(arguments: Sequence[str], digests: DataDigests) -> dict[str, Any]:
    """Return the digests of the data of a stage's config, or nothing where that is wrong: the stage says how."""
    try:
        with configured(arguments):
            return data_digests(digests)
    except EditionError:
        raise
    except TangleNASError:
        return {}


def _inputs(stage: str, digests: DataDigests) -> dict[str, Any]:
    """Return the digests of what a stage reads.

    All files in gin/ count where dvc.yaml does not tell what the stage reads, and where its config is wrong: the stage
    itself says how, or its command makes it right, as `PYTHONPATH=src python -m pipelines.search` may.
    """
    try:
        if (arguments := stage_arguments(stage)) is None:
            return {"files": _all_files()}
        with configured(arguments) as files:
            return {
                "data": data_digests(digests),
                "files": {file: file_digest(file) for file in files},
                "sources": {name: code_version(sys.modules[name]) for name in _behind_references()} | own_code(),
                "tables": tables(),
            }
    except EditionError:
        raise
    except TangleNASError:
        return {"files": _all_files()}


def _all_files() -> dict[str, str]:
    """Return the digest of each file in gin/, by its path."""
    return {path.as_posix(): file_digest(path) for path in sorted(Path("gin").rglob("*")) if path.is_file()}


def _recipe(digests: DataDigests) -> dict[str, Any]:
    """Return the arguments of the retrain stage and the digests of what it reads, if the method is a race."""
    try:
        arguments = stage_arguments("retrain") or []
        if 'discretize.method = "race"' not in (stage_arguments("discretize") or []):
            return {}
    except TangleNASError:  # of a damaged params.yaml, which DVC refuses
        return {}
    alone = [it for it in arguments if not it.startswith(UNUSED) and is_material(it.partition("=")[0].strip())]
    return {"arguments": alone, **_inputs("retrain", digests)}


def _behind_references() -> list[str]:
    """Return the packages behind an @, without those that environment.json has by their versions."""
    return sorted({name.split(".")[0] for name in referred()} - {"torch", "timm", "tanglenas_engine"})


def _package(used: Registration) -> str:
    """Return the top-level package of what a plugin registered, without importing it."""
    module = used.target.partition(":")[0] if isinstance(used.target, str) else used.target.__module__
    return module.split(".")[0]
