"""What SECURITY.md promises of the source: its list of packages is the lock's, and dangerous calls are not made."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "conntrackd").rglob("*.py"))

RUN_FOREIGN_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "code", "xmlrpc"}
MODE_ARGUMENT = {"mkdir": 1, "makedirs": 1, "chmod": 1, "fchmod": 1, "mkfifo": 1, "umask": 0}
OTHERS_WRITE = 0o022


def test_the_list_of_packages_is_the_lock() -> None:
    listed = re.findall(r"^\| ([a-z0-9-]+) \| (\d[\w.]*) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    locked = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements" / "run.lock").read_text(), re.MULTILINE)
    assert listed == [(name.lower(), version) for name, version in locked], "look at what is new, then list it"


def test_every_package_is_pinned_with_its_hashes() -> None:
    for lock in (ROOT / "requirements").glob("*.lock"):
        for entry in re.split(r"\n(?=[\w.-]+==)", lock.read_text())[1:]:
            assert "--hash=sha256:" in entry, f"{lock.name}: {entry}"


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Everything in the source that may be dangerous, with its place."""
    return [
        (f"{source.relative_to(ROOT)}:{node.lineno}", node)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)
    ]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name.split(".")[0] for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").split(".")[0]]
    return []


def test_nothing_is_imported_that_runs_what_it_reads() -> None:
    assert [place for place, node in nodes() if RUN_FOREIGN_CODE & set(imported(node))] == []


def test_no_shell_and_no_text_is_run() -> None:
    found = []
    for place, node in nodes():
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        shell = any(word.arg == "shell" for word in node.keywords)
        if shell or name in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput"):
            found.append(place)
    assert found == []


def modes(node: ast.AST) -> Iterator[int]:
    """The modes of files and directories that a call makes or sets; the reverse for a mask of them."""
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func).rpartition(".")[2]
    given = [word.value for word in node.keywords if word.arg == "mode"]
    at = 2 if ast.unparse(node.func) == "os.open" else MODE_ARGUMENT.get(name, -1)
    if isinstance(node.func, ast.Attribute) and not ast.unparse(node.func).startswith("os.") and at == 1:
        at = 0  # a method of Path
    if 0 <= at < len(node.args):
        given.append(node.args[at])
    for value in given:
        if isinstance(value, ast.Constant) and isinstance(value.value, int):
            yield 0o777 & ~value.value if name == "umask" else value.value


def test_no_file_may_be_written_by_others() -> None:
    found = [(place, oct(mode)) for place, node in nodes() for mode in modes(node)]
    assert found, "nothing sets a mode any more: is this test looking in the right place?"
    # The control socket is the group's, too: it may ask (control.py).
    allowed = [("conntrackd/daemon/control.py", oct(0o660))]
    bad = [
        (place, mode)
        for place, mode in found
        if int(mode, 8) & OTHERS_WRITE and (place.split(":")[0], mode) not in allowed
    ]
    assert bad == []
