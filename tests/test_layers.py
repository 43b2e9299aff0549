"""An import may only go down. The table of docs/architecture.md says where that is, and is held against the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import tsqp_shm

PACKAGE = Path(tsqp_shm.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"
# The start of the table's first row.
HEAD = "| layer | unit | may import | packages |"
# What the modules that every process loads first may import before it is known which role they play.
ALLOWED_AT_ONCE = {
    "cli": {"errors", "config", "modes", "printable", "wrapping", "_version", "roles"},
    "__init__": {"_version"},
    "__main__": {"cli"},
}


class Row(NamedTuple):
    """What a unit may import of this package, itself apart, and of other people's packages."""

    layer: int
    units: set[str]
    packages: set[str]


@cache
def table() -> dict[str, Row]:
    """Rows by unit; a number in "may import", or a range of them, is every unit of these layers."""
    lines = DOCUMENT.read_text().split(HEAD, 1)[1].splitlines()[2:]
    cells = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    layer_of = {unit: int(layer) for layer, units, _, _ in cells for unit in names_in(units)}

    def allowed(cell: str) -> set[str]:
        found = names_in(cell)
        for first, last in re.findall(r"(?<![`\w])(\d)(?: to (\d))?", cell):
            found |= {unit for unit, layer in layer_of.items() if int(first) <= layer <= int(last or first)}
        return found

    return {
        unit: Row(int(layer), allowed(may_import), names_in(packages))
        for layer, units, may_import, packages in cells
        for unit in names_in(units)
    }


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", cell))


class Import(NamedTuple):
    module: str
    lazily: bool


def unit_of(module: str) -> str:
    """The unit that a module of the package belongs to, the longest name of the table that fits."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in table()), parts[0])


def module_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).with_suffix("")
    return ".".join(inside.parts[:-1] if inside.name == "__init__" and len(inside.parts) > 1 else inside.parts)


def imports_of(path: Path) -> list[Import]:
    """Every import that runs, with "from tsqp_shm import x" spelled out, and whether a function has to run first."""
    found: list[Import] = []

    def visit(node: ast.AST, lazily: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # "from package import module" imports the module, "from module import name" what the module is.
            found.extend(Import(name if is_module(name) else str(node.module), lazily) for name in names)
        inside_function = lazily or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            visit(child, inside_function)

    visit(ast.parse(path.read_text()), False)
    return found


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of this package."""
    place = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("tsqp_shm.") and any(
        found.exists() for found in (place, place.with_suffix(".py"), place.with_suffix(".pyi"))
    )


MODULES = sorted(PACKAGE.rglob("*.py"))


def ours(path: Path) -> list[tuple[str, bool]]:
    """The units that a module imports."""
    inside = [item for item in imports_of(path) if item.module.startswith("tsqp_shm.")]
    return [(unit_of(item.module.removeprefix("tsqp_shm.")), item.lazily) for item in inside]


def module_id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_only_what_lies_below(path):
    unit = unit_of(module_of(path))
    assert unit in table(), f"docs/architecture.md has no row for {unit}"
    assert {name for name, _ in ours(path)} - table()[unit].units <= {unit}


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_only_the_packages_of_its_row(path):
    roots = {item.module.split(".")[0] for item in imports_of(path)}
    foreign = roots - set(sys.stdlib_module_names) - {"tsqp_shm"}
    assert foreign <= table()[unit_of(module_of(path))].packages


@pytest.mark.parametrize("unit", sorted(ALLOWED_AT_ONCE))
def test_reaches_the_roles_only_when_a_command_runs(unit):
    modules = [path for path in MODULES if unit_of(module_of(path)) == unit]
    at_once = {name for path in modules for name, lazily in ours(path) if not lazily}
    assert at_once - {unit} <= ALLOWED_AT_ONCE[unit]


def test_every_row_is_of_something_that_is_there():
    units = {unit_of(module_of(path)) for path in MODULES} | {"_native"}
    assert set(table()) == units


def test_the_table_goes_down():
    """No unit may import one of a layer above, and what it may import may not, in turn, import the unit."""
    rows = table()
    assert not [(unit, below) for unit, row in rows.items() for below in row.units if rows[below].layer > row.layer]
    reachable = {unit: set(row.units) - {unit} for unit, row in rows.items()}
    for middle in reachable:
        for unit in reachable:
            if middle in reachable[unit]:
                reachable[unit] |= reachable[middle]
    assert not [unit for unit in reachable if unit in reachable[unit]]


def test_the_roles_name_no_transport_and_never_each_other():
    assert not {"shm.posix", "gpu"} & table()["tee"].units
    assert not {"shm.posix", "tee"} & table()["gpu"].units
    imported = {f"tsqp_shm.{module_of(path)}": {item.module for item in imports_of(path)} for path in MODULES}
    # What waits for a TEE is a transport.
    transports = {module for module, below in imported.items() if "tsqp_shm.shm.rendezvous" in below}
    assert "tsqp_shm.shm.local" in transports
    for path in MODULES:
        if unit_of(module_of(path)) in ("tee", "gpu"):
            assert not transports & imported[f"tsqp_shm.{module_of(path)}"]


def test_the_trusted_process_loads_neither_torch_nor_transformers():
    modules = ["tsqp_shm.llm"]
    for unit in ("tee", "console"):
        modules += [f"tsqp_shm.{module_of(path)}" for path in (PACKAGE / unit).rglob("*.py")]
    code = f"import sys, {', '.join(modules)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tsqp_shm" in loaded
    assert not {"torch", "transformers", "rich"} & set(loaded)
