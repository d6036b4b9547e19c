"""Who imports whom: the table of docs/design.md, and what a fast command may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("catalogs", "costmodel", "planner", "kernels", "executors", "cli")
TRACKED = {*ROOMS, "torch", "triton"}
SLOW = ("torch", "scipy", "networkx", "pulp", "rich", "numpy", "highspy", "matplotlib")


def allowed_by_the_design() -> dict[str, set[str]]:
    """What each room may import, read from the table of rooms in docs/design.md."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    allowed: dict[str, set[str]] = {}
    for room in ROOMS:
        row = re.search(rf"^\| `{room}/` \|.*\|([^|]*)\|$", design, re.MULTILINE)
        assert row is not None, f"docs/design.md has no row for {room}"
        words = set(re.findall(r"\w+", row[1]))
        if "all" in words:
            words |= set(ROOMS[: ROOMS.index(room)]) | {"torch", "triton"}
        allowed[room] = words & TRACKED | {room}
    return allowed


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Room, torch or triton named by each import below `tree`, in a file of that package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            found = rest[0] if first == "forerun" and rest else first
            if found in TRACKED:
                yield found


def top_level(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported (not those under TYPE_CHECKING)."""
    body = [
        node
        for node in tree.body
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return ast.Module(body=body, type_ignores=[])


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def package_of(path: Path) -> tuple[str, ...]:
    return ("forerun", *path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_allows(room: str) -> None:
    allowed = allowed_by_the_design()[room]
    assert sources(room)
    for path in sources(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        beyond = set(imports(tree, package_of(path))) - allowed
        assert not beyond, f"{path.relative_to(ROOT)} imports {', '.join(sorted(beyond))}"


def test_the_vocabulary_imports_no_room_and_no_torch() -> None:
    paths = sorted((ROOT / "src" / "forerun").glob("*.py"))
    assert paths
    for path in paths:
        tree = top_level(ast.parse(path.read_text(encoding="utf-8")))
        expected = {"cli"} if path.name == "__main__.py" else set[str]()
        assert set(imports(tree, ("forerun",))) == expected, path.name


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_rooms_are_imported_under_the_package(room: str) -> None:
    for path in sources(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            bare = {name.split(".")[0] for name in names} & set(ROOMS)
            assert not bare, f"{path.relative_to(ROOT)}: import forerun.{'/'.join(bare)} instead"


def loaded_by(arguments: list[str]) -> set[str]:
    """The slow packages that are loaded when a command has run in a process of its own."""
    program = (
        "import sys\n"
        "from forerun.cli.main import main\n"
        f"sys.argv = ['forerun', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        f"print('loaded', code, *(name for name in {SLOW!r} if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "FORERUN_DATA": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    _, code, *names = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    return set(names)


@pytest.mark.parametrize("command", ["", "plan", "run", "demo"])
def test_help_loads_nothing_slow(command: str) -> None:
    assert loaded_by([*command.split(), "--help"]) == set()


JOB = "--model tiny-1m --gpus 2xcpu --seq-len 64 --global-batch 4".split()


@pytest.mark.parametrize(
    "arguments",
    [["plan", *JOB, "--json"], ["predict", *JOB, "--json"], ["catalog", "models", "--json"]],
    ids=["plan", "predict", "catalog"],
)
def test_planning_needs_no_torch(arguments: list[str]) -> None:
    assert "torch" not in loaded_by(arguments)
