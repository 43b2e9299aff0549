"""An import may only go down. The table is that of the architecture's layers, held against the code."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import tsqp_shm

PACKAGE = Path(tsqp_shm.__file__).parent
VALUES = {"errors", "config", "_version"}
SHM = {"shm", "_native"}
TRACE = {"trace"}
ROLES = {"tee", "gpu"}
PROCESSES = {"roles"}
FRONT = {"outputs", "llm", "hf", "console"}
AROUND = {"demo", "bench", "top", "sessions", "doctor", "cli"}
EVERYTHING = VALUES | SHM | TRACE | ROLES | PROCESSES | FRONT | AROUND | {"model"}

# What a unit may import of the package, itself apart, and of other people's packages.
ALLOWED = {
    "errors": (set(), set()),
    "_version": (set(), set()),
    "config": ({"errors"}, set()),
    "model": (VALUES, {"numpy", "safetensors", "tokenizers", "jinja2"}),
    "shm": (VALUES | SHM, {"numpy", "posix_ipc", "zmq"}),
    "demo": (VALUES | {"model"}, {"numpy", "gguf", "tokenizers"}),
    "roles": (VALUES | SHM, set()),
    "trace": (VALUES | SHM | {"roles"}, set()),
    "tee": (VALUES | SHM | TRACE | {"model", "roles"}, {"numpy"}),
    "gpu": (VALUES | SHM | TRACE | {"model", "roles"}, {"numpy", "torch"}),
    "outputs": (VALUES | {"tee"}, set()),
    "llm": (VALUES | SHM | TRACE | {"model", "roles", "tee", "outputs"}, {"numpy"}),
    "hf": (VALUES | SHM | TRACE | {"model", "roles", "tee", "llm"}, {"numpy", "torch", "transformers"}),
    "console": (VALUES | {"model", "tee", "llm"}, set()),
    "top": (VALUES | {"shm"}, {"rich"}),
    "bench": (VALUES | SHM | {"model", "tee", "llm", "gpu"}, {"numpy", "torch", "transformers", "matplotlib", "zmq"}),
    "sessions": (VALUES | {"shm"}, set()),
    "doctor": (VALUES | SHM | {"model", "roles", "gpu", "sessions"}, {"numpy", "zmq"}),
    "cli": (EVERYTHING, set()),
    "__main__": ({"cli"}, set()),
    "__init__": ({"_version", "llm"}, set()),
}
# What the modules that every process loads first may import before it is known which role they play.
ALLOWED_AT_ONCE = {"cli": VALUES | PROCESSES, "__init__": {"_version"}, "__main__": {"cli"}}


# The places that choose what joins the two sides; everything else is handed it.
TRANSPORTS = ("tsqp_shm.shm.posix", "tsqp_shm.shm.local")
CHOOSES_A_TRANSPORT = {"llm", "bench", "top", "sessions", "doctor", "cli", "roles/launch.py"}


class Import(NamedTuple):
    module: str
    lazily: bool


def unit_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".pyi").removesuffix(".py")


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
            if node.module == "tsqp_shm":
                found.extend(Import(f"tsqp_shm.{alias.name}", lazily) for alias in node.names)
            else:
                found.append(Import(str(node.module), lazily))
        inside_function = lazily or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            visit(child, inside_function)

    visit(ast.parse(path.read_text()), False)
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def ours(path: Path) -> list[tuple[str, bool]]:
    inside = [item for item in imports_of(path) if item.module.startswith("tsqp_shm.")]
    return [(item.module.split(".")[1], item.lazily) for item in inside]


def module_id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_only_what_lies_below(path):
    unit = unit_of(path)
    assert {name for name, _ in ours(path)} - ALLOWED[unit][0] <= {unit}


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_only_the_packages_of_its_layer(path):
    roots = {item.module.split(".")[0] for item in imports_of(path)}
    foreign = roots - set(sys.stdlib_module_names) - {"tsqp_shm"}
    assert foreign <= ALLOWED[unit_of(path)][1]


@pytest.mark.parametrize("unit", sorted(ALLOWED_AT_ONCE))
def test_reaches_the_roles_only_when_a_command_runs(unit):
    modules = [path for path in MODULES if unit_of(path) == unit]
    at_once = {name for path in modules for name, lazily in ours(path) if not lazily}
    assert at_once - {unit} <= ALLOWED_AT_ONCE[unit]


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_names_no_transport(path):
    named = [item.module for item in imports_of(path) if item.module.startswith(TRANSPORTS)]
    own = ".".join(("tsqp_shm", *path.relative_to(PACKAGE).with_suffix("").parts))
    is_one = own.startswith(TRANSPORTS)
    assert not named or is_one or {unit_of(path), module_id(path)} & CHOOSES_A_TRANSPORT


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_what_a_transport_is_made_of_is_used_there_alone(path):
    foreign = {item.module.split(".")[0] for item in imports_of(path)} & {"posix_ipc", "zmq"}
    assert not foreign or path.parent.name == "posix" or unit_of(path) in {"bench", "doctor"}


def test_the_table_goes_down():
    """Whatever a unit may import may not, in turn, import the unit: the table has no cycle."""
    reachable = {unit: set(allowed) - {unit} for unit, (allowed, _) in ALLOWED.items()}
    for middle in reachable:
        for unit in reachable:
            if middle in reachable[unit]:
                reachable[unit] |= reachable[middle]
    assert not [unit for unit in reachable if unit in reachable[unit]]


def test_the_trusted_process_loads_neither_torch_nor_transformers():
    modules = ["tsqp_shm.llm", "tsqp_shm.console"]
    inside = [path.relative_to(PACKAGE.parent).with_suffix("") for path in (PACKAGE / "tee").rglob("*.py")]
    modules += [".".join(path.parts).removesuffix(".__init__") for path in inside]
    code = f"import sys, {', '.join(modules)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tsqp_shm" in loaded
    assert not {"torch", "transformers", "rich"} & set(loaded)
