"""The man pages are well-formed, name every key, command and option, and their examples are right."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conntrackd import config
from conntrackd.cli.main import build_parser
from conntrackd.filter import WORDS
from tests import manpages

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


def test_every_command_and_option_is_as_the_command_line_has_it() -> None:
    for page in manpages.COMMANDS_OF:
        assert (manpages.PAGES / page).read_text() == manpages.written(page), f"`make man` writes {page} anew"


def test_every_word_of_the_filter_language_is_named() -> None:
    text = (manpages.PAGES / "conntrackd-flows.1").read_text().replace("\\-", "-")
    for word in WORDS:
        assert re.search(rf"\b{word}\b", text), f"the man page does not name {word}"


@pytest.mark.parametrize("page", manpages.COMMANDS_OF)
def test_the_examples_are_commands_that_there_are(page: str) -> None:
    examples = (manpages.PAGES / page).read_text().partition(".SH EXAMPLES")[2].partition(".SH DESCRIPTION")[0]
    lines = re.findall(r"^(?:source <\()?(conntrackd .*?)(?:\)| \|.*)?$", examples.replace("\\-", "-"), re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)[1:]
        build_parser(words).parse_args(words)


@pytest.mark.skipif(shutil.which("man") is None, reason="needs man")
@pytest.mark.parametrize("page", sorted(each.name for each in manpages.PAGES.iterdir()))
def test_man_has_no_complaint(page: str) -> None:
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", str(manpages.PAGES / page)]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    assert page.rpartition(".")[0].upper() in done.stdout


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
@pytest.mark.parametrize("page", manpages.COMMANDS_OF)
def test_mandoc_has_no_complaint(page: str) -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", str(manpages.PAGES / page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_groff_has_no_complaint() -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "CONNTRACKD.TOML" in done.stdout
