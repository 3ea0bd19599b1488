"""The man page is well-formed, names every key, and its examples are right."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conntrackd import config

PAGE = Path(__file__).parents[2] / "man" / "conntrackd.toml.5"


def test_every_key_is_named() -> None:
    text = PAGE.read_text().replace("\\-", "-")
    models = (
        config.Queue,
        config.Rules,
        config.Zone,
        config.Set,
        config.Policy,
        config.OnException,
        config.Reload,
        config.State,
        config.Metrics,
    )
    for model in (*models, config.Limit, config.Rule, config.Config):
        for name, field in model.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", text), f"the man page does not name {field.alias or name}"


def test_the_examples_are_right() -> None:
    blocks = re.findall(r"\.nf\n\.RS\n(.*?)\.RE", PAGE.read_text(), re.DOTALL)
    first, second = (block for block in blocks if "[[rule]]" in block)
    config.parse(first.encode(), "first")
    config.parse((first + second).encode(), "second")


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_groff_has_no_complaint() -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "CONNTRACKD.TOML" in done.stdout
