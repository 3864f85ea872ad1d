"""The house itself: every sub-package has one door, and imports run downwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torch_worm_optim

PACKAGE = Path(torch_worm_optim.__file__).parent
SUBPACKAGES = ("search", "ticket", "selectors", "shrink", "integrations")
# From the roof to the ground: a module imports from lower floors, or from its own sub-package.
FLOORS = [
    {"integrations", "plot"},
    {"optimizer"},
    {"_state"},
    {"ticket"},
    {"search"},
    {"_binding", "report"},
    {"selectors", "shrink"},
    {"_wrapper", "distributed", "_checks"},
]


def imports(path: Path) -> list[str]:
    """The package's modules that a file imports when it is imported, as dotted names."""
    tree = ast.parse(path.read_text())
    if_typing = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(node) for each in if_typing for node in ast.walk(each)}
    return [
        node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        and id(node) not in skipped
        and (node.module or "").startswith("torch_worm_optim")
    ]


def test_other_packages_use_the_doors():
    """What is not exported by a sub-package's `__init__` is nobody's business outside of it."""
    files = [
        *PACKAGE.rglob("*.py"),
        *(
            path
            for root in ("tests", "benchmarks", "examples")
            for path in Path(root).rglob("*.py")
        ),
    ]
    for path in files:
        for module in imports(path):
            _, *parts = module.split(".")
            if len(parts) > 1 and parts[0] in SUBPACKAGES[:-1]:
                assert path.parent == PACKAGE / parts[0], f"{path} imports {module}"


def test_imports_run_downwards():
    """Nobody imports from a floor above; what is on one floor does not know its neighbours."""
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        for module in imports(path):
            _, *parts = module.split(".")
            if parts and parts[0] != name:
                assert floor_of[parts[0]] > floor_of[name], f"{path} imports {module}"


@pytest.mark.parametrize(
    "part", ["plot.py", *sorted(p.name for p in (PACKAGE / "integrations").glob("*.py"))]
)
def test_plots_and_callbacks_read_public_attributes(part):
    """They use what anybody may use."""
    path = PACKAGE / part if part == "plot.py" else PACKAGE / "integrations" / part
    private = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) != "self"
    ]
    assert private == []
