"""Every place where a word of the arena or the doorbell enters the TEE process is marked, and there are no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tsqp_shm

PACKAGE = Path(tsqp_shm.__file__).parent
NATIVE = PACKAGE.parent / "native"
MARK = "UNTRUSTED:"
# Native functions that are for private memory, and are made of the same instructions.
PRIVATE = "PRIVATE:"

# Not of the TEE process, or (model) reading files that the TEE process opens itself.
ELSEWHERE = {"gpu", "bench", "model"}
BORDER_UNITS = {"shm", "tee"}
# What gives bytes of the other side to Python: a word, a slot's memory, a record, a message.
READS = re.compile(r"(.*\.)?(load_word|frombuffer|slot_array|reader\.read\w*|os\.p?read|recv\w*)")
# The mapping itself may be handed to native code; these alone make more of it.
HOLDERS = {"shm/arena.py", "shm/slots.py", "shm/posix/memory.py", "shm/posix/transport.py", "shm/local.py"}

# Native code that the arena's memory passes through; of what runs in the TEE process, nothing else may know its layout.
BORDER_HEADERS = {
    f"border/{name}.h" for name in ("layout", "ring", "submissions", "slots", "held_slots", "held_arena", "heartbeat")
}
BORDER_HEADERS |= {"kernels/kernels_arguments.h", "kernels/finite.h"}
BORDER_SOURCES = BORDER_HEADERS | {
    "border/words.h",
    "border/ring.cpp",
    "border/loans.h",
    "border/bind_ring.cpp",
    "border/bind_submissions.cpp",
    "kernels/bind_kernels.cpp",
    "field/held_check.h",
    "field/check.cpp",
    "field/check_impl.h",
}
GPU_SOURCES = {
    f"products/{name}" for name in ("bind_cpu_device.cpp", "cpu_products.cpp", "cpu_products.h", "elements.h")
}
# They take slots too, but of private memory, which a TEE without a GPU process has in the arena's place.
PRIVATE_SOURCES = {"field/held_linear.h", "attention/bind_attention.cpp"}
KERNELS = {
    f"{path.parent.name}/{path.name}"
    for pattern in ("kernels/kernels_*.*", "field/check_*.cpp")
    for path in NATIVE.glob(pattern)
}
# What is not part of the package's extensions.
AROUND = {"tests", "fuzz", "bench"}
NATIVE_READ = re.compile(r"\.load\(|__atomic_load|read_words\(|_mm\d+_\w*loadu?_")


PLACES = (
    "shm/doorbell.py", "shm/liveness.py", "shm/slots.py", "shm/arena.py", "shm/rendezvous.py", "shm/invitation.py",
    "shm/posix/stream.py", "shm/byte_stream.py",
)  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if unit_of(path) not in ELSEWHERE)


def native_name(path: Path) -> tuple[str, ...]:
    return path.relative_to(NATIVE).parts


def border_files() -> list[Path]:
    return sorted(NATIVE / name for name in BORDER_SOURCES | KERNELS)


def unmarked_reads(source: str) -> list[str]:
    """Calls that take something of the other side in, in functions without the mark."""
    lines = source.splitlines()
    found = []
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not READS.fullmatch(ast.unparse(call.func)):
            continue
        around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
        first, last = (around[-1].lineno, around[-1].end_lineno) if around else (call.lineno, call.lineno)
        if not any(MARK in line for line in lines[first - 1 : last]):
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


def uses_of_the_mapping(source: str) -> list[str]:
    """Where the mapping goes anywhere else than into native code."""
    tree = ast.parse(source)
    handed_over = {
        argument
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("_native.")
        for argument in call.args
    }
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "buffer"
        and node not in handed_over
        # Of a file object that is not the arena's: sys.stdin.buffer.
        and not ast.unparse(node).startswith("sys.")
    ]


def unmarked_native_reads(source: str) -> list[str]:
    """Loads in a paragraph, which is what stands between two empty lines, without the mark."""
    found = []
    for paragraph in re.split(r"\n\s*\n", source):
        code = "\n".join(line for line in paragraph.splitlines() if not line.lstrip().startswith("//"))
        if NATIVE_READ.search(code) and MARK not in paragraph and PRIVATE not in paragraph:
            found.append(paragraph.strip())
    return found


@pytest.mark.parametrize("path", [path for path in python_files() if unit_of(path) in BORDER_UNITS], ids=name_of)
def test_what_python_takes_in_is_marked(path):
    assert unmarked_reads(path.read_text()) == []


@pytest.mark.parametrize("path", [path for path in python_files() if name_of(path) not in HOLDERS], ids=name_of)
def test_the_mapping_goes_to_native_code_only(path):
    assert uses_of_the_mapping(path.read_text()) == []


@pytest.mark.parametrize("path", border_files(), ids=lambda path: path.name)
def test_what_native_code_loads_is_marked(path):
    assert unmarked_native_reads(path.read_text()) == []


def test_no_other_native_file_knows_the_arena():
    included = re.compile(r'#include "([\w./]+)"')
    sources = [path for path in (*NATIVE.rglob("*.cpp"), *NATIVE.rglob("*.h")) if native_name(path)[0] not in AROUND]
    knowing = {
        "/".join(native_name(path)) for path in sources if BORDER_HEADERS & set(included.findall(path.read_text()))
    }
    assert knowing >= {"kernels/bind_kernels.cpp"}
    assert knowing - BORDER_SOURCES - GPU_SOURCES - PRIVATE_SOURCES == set()


@pytest.mark.parametrize("path", border_files(), ids=lambda path: path.name)
def test_a_native_place_that_lost_its_mark_is_found(path):
    source = path.read_text()
    has_reads = any(NATIVE_READ.search(line) for line in source.splitlines() if not line.lstrip().startswith("//"))
    assert bool(unmarked_native_reads(source.replace(MARK, ""))) == has_reads


@pytest.mark.parametrize("place", PLACES)
def test_a_python_place_that_lost_its_mark_is_found(place):
    assert unmarked_reads((PACKAGE / place).read_text().replace(MARK, ""))


def test_a_new_place_is_found():
    assert unmarked_reads("def peek(arena):\n    return np.frombuffer(arena.buffer)\n")
    assert uses_of_the_mapping("def peek(arena):\n    return arena.buffer[0]\n")
    assert unmarked_native_reads("auto word = shared.load(std::memory_order_relaxed);")
