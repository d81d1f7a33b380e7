"""A module imports only floors below its own, transformers stays upstairs, and triton stays in its own corner."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import hf_kvquant

ROOT = Path(hf_kvquant.__file__).parent
# Floors from the ground up. Where a floor has steps, a module may also use the steps before its own.
FLOORS: tuple[tuple[set[str], ...], ...] = (
    (
        {"_version", "atomic_write", "dtypes", "huge_pages", "scales", "sides", "tables"},
        {"checkpoint_scales", "formats"},
        {"config"},
    ),
    ({"checkpoints", "ops"},),
    (
        {"rotary", "hosts", "interface", "pools", "policy", "query", "reservations", "sharding"},
        {"pages", "static_pages", "stores", "identity", "reading", "risks"},
        {"offload", "exact", "options"},
        {"parts"},
    ),
    (
        {"handle", "report", "saved_header", "shared", "skeleton"},
        {"assigning"},
        {"layer_state"},
        {"layers"},
        {"growing", "fixed"},
        {"hybrid"},
        {"broken"},
        {"sessions"},
        {"cache"},
        {"encoder_decoder", "prefix"},
    ),
    ({"dense"}, {"batching"}, {"attention"}),
    (
        {"generation", "calibration_data", "exporting", "doctor", "inspection", "planning"},
        {"calibration", "evaluation"},
    ),
    ({""},),  # the package itself
    ({"cli"}, {"__main__"}),
)
HEIGHT = {
    name: (floor, step) for floor, steps in enumerate(FLOORS) for step, names in enumerate(steps) for name in names
}
FIRST_FLOOR_WITH_TRANSFORMERS = 3
BELOW_WITH_TRANSFORMERS = {"hosts", "interface", "options", "reading", "risks"}
THIRD_PARTY = {
    "datasets",
    "lm_eval",
    "matplotlib",
    "numpy",
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "packaging",
    "triton",
}


def _modules() -> dict[str, Path]:
    """Dotted name below the package (`ops.reference`, `` for the package itself) -> file."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


MODULES = _modules()


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(module: str) -> set[str]:
    """Absolute names of everything that a module imports anywhere at run time, inside functions too."""
    path = MODULES[module]
    package = ["hf_kvquant", *(module.split(".") if module else [])]
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                # `from . import ops` imports a module, `from .ops import PagedTensor` a name from one.
                candidate = ".".join([*base, alias.name])
                is_module = candidate.removeprefix("hf_kvquant.") in MODULES
                found.add(candidate if is_module else ".".join(base))
        children = node.orelse if _is_for_types_only(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
        waiting.extend(children)
    return found


def _own(names: set[str]) -> set[str]:
    """Those of this package, below it."""
    return {name.removeprefix("hf_kvquant").removeprefix(".") for name in names if name.split(".")[0] == "hf_kvquant"}


def _unit(module: str) -> str:
    """The module or subpackage that has a floor."""
    return module.split(".")[0]


def test_every_module_has_a_floor() -> None:
    assert {_unit(module) for module in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_floors_below(module: str) -> None:
    own = _unit(module)
    for imported in _own(_imports(module)):
        unit = _unit(imported)
        if unit != own:
            assert HEIGHT[unit] < HEIGHT[own], f"{module} imports {imported}"


def test_no_cycles_inside_subpackages() -> None:
    graph = {module: _own(_imports(module)) & set(MODULES) for module in MODULES}
    done: set[str] = set()
    while left := [module for module in graph if module not in done]:
        free = [module for module in left if graph[module] - {module} <= done]
        assert free, f"these import each other: {left}"
        done.update(free)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_from_outside(module: str) -> None:
    outside = {name.split(".")[0] for name in _imports(module)} - {"hf_kvquant"} - set(sys.stdlib_module_names)
    assert outside <= THIRD_PARTY
    if "transformers" in outside:
        assert _unit(module) in BELOW_WITH_TRANSFORMERS or HEIGHT[_unit(module)][0] >= FIRST_FLOOR_WITH_TRANSFORMERS
    if "triton" in outside:
        assert module.startswith("ops.triton")
    if "lm_eval" in outside:
        assert module == "evaluation.harness"
    if "matplotlib" in outside:
        assert module == "evaluation.pictures"


def test_the_reader_of_imports_reads_them() -> None:
    """The rules above would hold of a reader that finds nothing."""
    assert {"hf_kvquant.ops", "hf_kvquant.handle"} <= _imports("layers")
    assert "transformers.cache_utils" in _imports("layer_state")
    assert "hf_kvquant.layers" not in _imports("handle")  # for types only
    assert "hf_kvquant.scales" in _imports("checkpoints.values")
    assert "hf_kvquant.generation" in _imports("")
