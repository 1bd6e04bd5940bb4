"""Rules of this repository, which a user's own edits may break: run by .ci/run as `pytest tests/house.py`."""

import ast
from pathlib import Path

# From the top to the bottom: a file imports only files below it.
ALLOWED = {
    "train": {"augment", "checkpoint", "config", "evaluate", "model", "optim", "utils"},
    "evaluate": {"checkpoint", "config", "data", "model", "utils"},
    "augment": {"data", "utils"},
    "checkpoint": {"utils"},
    "data": {"utils"},
    "optim": set(),
    "model": set(),
    "config": set(),
    "utils": set(),
}
ARROWS = 16  # at most
LINES = 250  # at most, in a file


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, by their whole names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_go_one_way() -> None:
    files = {path.stem: path for path in Path().glob("*.py")}
    assert files.keys() == ALLOWED.keys(), "each file has its place in the table"
    arrows, names = 0, list(ALLOWED)
    for name, path in files.items():
        found = imported(path)
        ours = found & ALLOWED.keys()
        assert ours <= ALLOWED[name], f"{name}.py imports what it should not"
        assert all(names.index(other) > names.index(name) for other in ours), f"{name}.py imports upwards"
        assert not any(module.split(".")[0] in ("tools", "tests") for module in found), name
        arrows += len(ours)
    assert arrows <= ARROWS


def test_no_file_is_long() -> None:
    files = (*Path().glob("*.py"), *Path("tools").glob("*.py"))
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > LINES} == {}


def test_tests_import_helpers_only() -> None:
    names = {path.stem for path in Path("tests").glob("*.py")} - {"__init__"}
    for path in Path("tests").glob("*.py"):
        parts = {part for module in imported(path) for part in module.split(".")[:2]}
        assert names & parts <= {"helpers", "soak"}, path
