"""The JSON Schema says the same as the models, in a form that editors understand."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from conntrackd import config
from conntrackd.configschema import schema

CONFIG = Path(__file__).parents[2] / "config"
EXAMPLES = [CONFIG / "conntrackd.toml", *sorted((CONFIG / "examples").glob("*.toml"))]
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def problems(node: dict[str, Any], value: object, root: dict[str, Any], path: str = "") -> list[str]:
    """A validator for the words of JSON Schema that we use; any other word is a problem."""
    known = {"$ref", "anyOf", "type", "enum", "properties", "required", "additionalProperties", "items", "const"}
    remarks = {"title", "description", "default", "$schema", "$defs", "minLength", "maxLength"}
    limits = {"minimum", "maximum", "minItems", "maxItems", "maxProperties", "propertyNames"}
    assert set(node) <= known | remarks | limits, set(node) - known - remarks - limits
    if "$ref" in node:
        node = root["$defs"][node["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in node:
        tried = [problems(option, value, root, path) for option in node["anyOf"]]
        return [] if any(not found for found in tried) else [f"{path}: fits none"]
    if "type" in node:
        right = isinstance(value, TYPES[node["type"]]) and not (node["type"] == "integer" and isinstance(value, bool))
        if not right:
            return [f"{path}: no {node['type']}"]
    if "enum" in node and value not in node["enum"]:
        return [f"{path}: {value!r}"]
    if isinstance(value, int) and not node.get("minimum", value) <= value <= node.get("maximum", value):
        return [f"{path}: out of range"]
    found = []
    if isinstance(value, dict) and node.get("type") == "object":
        found += [f"{path}: lacks {key}" for key in node.get("required", []) if key not in value]
        for key, entry in value.items():
            inside = node.get("properties", {}).get(key, node.get("additionalProperties", False))
            found += [f"{path}.{key}: unknown"] if inside is False else problems(inside, entry, root, f"{path}.{key}")
    if isinstance(value, list):
        for index, entry in enumerate(value):
            found += problems(node["items"], entry, root, f"{path}[{index}]")
    return found


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_fit(file: Path) -> None:
    made = schema()
    assert problems(made, tomllib.loads(file.read_text()), made) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "version = 3",
        "version = 1\nfoo = 1",
        'version = 1\n[policy]\ndefault = "deny"',
        'version = 1\n[[rule]]\nname = "r"',
        'version = 1\n[[rule]]\nname = "r"\naction = "drop"\nport = true',
        'version = 1\n[[rule]]\nname = "r"\naction = "drop"\nstate = ["new", "old"]',
        'version = 1\n[conntrack]\nudp_timout = "5s"',
        'version = 1\n[[rule]]\nname = "r"\naction = "accept"\ntimeouts = { tcp_loose = 1 }',
        "version = 1\n[queue]\nmax_length = 0",
    ],
)
def test_mistakes_do_not_fit(text: str) -> None:
    made = schema()
    assert problems(made, tomllib.loads(text), made) != []


def test_every_key_is_in_it() -> None:
    made = schema()
    for model in (
        config.Queue,
        config.Rules,
        config.Zone,
        config.Set,
        config.Policy,
        config.OnException,
        config.Metrics,
        config.Rule,
    ):
        keys = {field.alias or name for name, field in model.model_fields.items()}
        assert set(made["$defs"][model.__name__]["properties"]) == keys
        assert made["$defs"][model.__name__]["additionalProperties"] is False
    assert set(made["$defs"]["Conntrack"]["properties"]) == set(config.Conntrack.model_fields)


def test_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "conntrackd", "schema"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == schema()
    assert done.stderr == ""
