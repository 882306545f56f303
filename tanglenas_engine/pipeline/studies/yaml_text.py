"""YAML that people read and change."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

LINE = 90
"""The letters of the longest list that is written in one line."""


def yaml_text(content: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, in its own order, with "null" for None, and short lists and empty groups in a line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """The representer of ruamel.yaml, which would leave None out."""

    def null(representer: Any, value: None) -> Any:
        return representer.represent_scalar("tag:yaml.org,2002:null", "null")

    Representer.add_representer(type(None), null)

    def styled(value: Any) -> Any:
        if isinstance(value, Mapping):
            mapping = CommentedMap({name: styled(part) for name, part in value.items()})
            if not value:
                mapping.fa.set_flow_style()
            return mapping
        if isinstance(value, list | tuple):
            listed = CommentedSeq(styled(part) for part in value)
            short = sum(len(str(part)) + 2 for part in value) <= LINE
            if short and not any(isinstance(part, Mapping | list | tuple) for part in value):
                listed.fa.set_flow_style()
            return listed
        return value

    yaml, text = YAML(), io.StringIO()
    yaml.Representer, yaml.width = Representer, 10**6
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(styled(content), text)
    return text.getvalue()
