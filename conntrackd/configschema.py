"""The JSON Schema of the configuration: what an editor needs to complete and to complain while one types."""

from typing import Any, Final

from conntrackd.config import Config, Conntrack, Timeouts

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Make the schema of a whole configuration."""
    made = _bare(Config.model_json_schema(by_alias=True, mode="validation"))
    definitions = made["$defs"]
    # Sysctls are checked as models of their own.
    for model in (Conntrack, Timeouts):
        definitions[model.__name__] = _bare(model.model_json_schema(by_alias=True, mode="validation"))
    made["properties"]["conntrack"] = {"$ref": "#/$defs/Conntrack"}
    definitions["Rule"]["properties"]["timeouts"] = {"$ref": "#/$defs/Timeouts"}
    return {"$schema": DRAFT, "title": "conntrackd.toml"} | made


def _bare(table: dict[str, Any]) -> dict[str, Any]:
    """Leave out titles, which are names of models, and defaults that are not in the form in which they are written."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("properties", "$defs"):
            found[key] = {name: _bare(entry) for name, entry in value.items()}
        elif key == "title" or (key == "default" and isinstance(value, list | dict)):
            continue
        elif isinstance(value, dict):
            found[key] = _bare(value)
        elif isinstance(value, list):
            found[key] = [_bare(entry) if isinstance(entry, dict) else entry for entry in value]
        else:
            found[key] = value
    return found
