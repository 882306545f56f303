"""Put into a wheel what `tanglenas init` and `tanglenas new-plugin` lay out, which lies beside the packages here.

An editable installation takes them from the repository: hatchling's own `force-include` would copy them there, too.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PIPELINE = (".dvcignore", "dvc.yaml", "gin", "params.yaml", "pipelines")


class Templates(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            folder = "tanglenas_engine/template"
            build_data["force_include"].update({name: f"{folder}/pipeline/{name}" for name in PIPELINE})
            build_data["force_include"]["examples/tanglenas-example"] = f"{folder}/plugin"
