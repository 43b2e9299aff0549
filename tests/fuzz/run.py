"""Fuzzes the border, coverage-guided, every target for its share of the time; `scripts/fuzz` is its command line.

Targets in Python run under atheris, native ones under the libFuzzer that atheris carries, built by g++ with ASan and
UBSan. A finding is kept in build/fuzz/, with the command that runs it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import border

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from script_flags import ScriptParser

from tsqp_shm.shm.posix.objects import arena_name, unlink_dead

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NATIVE = ROOT / "native" / "fuzz"
CORPUS = HERE / "corpus"
OUT = ROOT / "build" / "fuzz"
BORDER = ("completion", "submission", "header", "invitation")
PROGRAMS = ("ring", "submissions", "slots")
NAMES = (*BORDER, *PROGRAMS, "kernels")
# More than an input can need that finds a way nobody else found, and a bound on the time of one.
MAX_INPUT_BYTES = {"invitation": 2048}
INPUT_TIMEOUT_S = 10


class Target(NamedTuple):
    command: list[str]
    environment: dict[str, str]


def targets() -> dict[str, Target]:
    """Name, and how to run it."""
    found = {name: Target([sys.executable, str(HERE / "instrumented.py"), name], {}) for name in BORDER}
    for name in PROGRAMS:
        found[name] = Target([str(NATIVE / "build" / name)], {})
    # ASan has to be there before Python is, and libstdc++ before ASan looks for what it wraps.
    preload = " ".join(_compiler_file(name) for name in ("libasan.so", "libstdc++.so"))
    found["kernels"] = Target(
        [sys.executable, str(HERE / "kernels.py")],
        {
            "LD_PRELOAD": preload,
            "PYTHONPATH": f"{NATIVE / 'build'}:{os.environ.get('PYTHONPATH', '')}",
            # Every block of Python's from malloc, which ASan watches. Python itself leaks at its end.
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0",
        },
    )
    return found


def _parse() -> argparse.Namespace:
    parser = ScriptParser(__doc__.partition("\n")[0], prog="scripts/fuzz")
    parser.add_argument("--seconds", type=int, default=600, metavar="N", help="for all targets together (600)")
    parser.add_argument("--keep", action="store_true", help="put inputs that reach something new into the corpus")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one target on this input alone")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(NAMES)}; all of them without one")
    arguments = parser.parse_args()
    for name in arguments.targets:
        if name not in NAMES:
            parser.error(f"TARGET: got {name!r}, expected {', '.join(NAMES)}")
    if arguments.seconds < 1:
        parser.error(f"--seconds: got {arguments.seconds}, expected 1 or more")
    if arguments.replay and len(arguments.targets) != 1:
        parser.error("--replay: expected the TARGET that the file is for, and no other")
    return arguments


def main() -> int:
    arguments = _parse()
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: skipped: atheris is not installed; there is one for x86-64", file=sys.stderr)
        return 0
    names = arguments.targets or NAMES
    _build()
    every = targets()
    if arguments.replay:
        return _run(every[names[0]], [str(arguments.replay)], None)
    share_s = max(1, arguments.seconds // len(names))
    failed = []
    for name in names:
        summary, is_clean = fuzz(name, every[name], share_s)
        print(f"fuzz: {name}: {summary}", file=sys.stderr, flush=True)
        if not is_clean:
            failed.append(name)
        elif arguments.keep:
            _keep(name, every[name])
    return 1 if failed else 0


def fuzz(name: str, target: Target, seconds: int) -> tuple[str, bool]:
    """Runs one target on the committed corpus, then on what it makes of it.

    Returns:
        One line, and whether nothing was found.
    """
    found = OUT / name
    found.mkdir(parents=True, exist_ok=True)
    for seed, content in border.seeds().get(name, {}).items():
        (found / seed).write_bytes(content)
    log = OUT / f"{name}.log"
    started = time.monotonic()
    with log.open("wb") as output:
        code = _run(
            target,
            [
                f"-max_total_time={seconds}",
                f"-timeout={INPUT_TIMEOUT_S}",
                f"-max_len={MAX_INPUT_BYTES.get(name, 1024)}",
                f"-artifact_prefix={OUT / name}-",
                "-print_final_stats=1",
                str(found),
                str(CORPUS / name),
            ],
            output,
        )
    text = log.read_text(errors="replace")
    if code:
        artifact = re.search(r"Test unit written to (\S+)", text)
        again = f"; again with: scripts/fuzz --replay {os.path.relpath(artifact[1])} {name}" if artifact else ""
        print(text[-3000:], file=sys.stderr)
        return f"FAILED with exit code {code}; its output is in {log}{again}", False
    runs = re.search(r"number_of_executed_units: (\d+)", text)
    features = re.findall(r"\bft: (\d+)", text)
    return (
        f"{int(runs[1]) if runs else 0:,} inputs, {features[-1] if features else 0} features, "
        f"{time.monotonic() - started:.0f} s",
        True,
    )


def _run(target: Target, arguments: list[str], output: object) -> int:
    environment = {**os.environ, "TSQP_SHM_FUZZ_SESSION": f"fuzz-{os.getpid()}", **target.environment}
    try:
        return subprocess.run(
            [*target.command, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT
        ).returncode  # type: ignore[call-overload]
    finally:
        # A target that is killed by a finding leaves its arena.
        unlink_dead(arena_name(f"fuzz-{os.getpid()}"))


def _keep(name: str, target: Target) -> None:
    """Puts into the committed corpus the fewest inputs that reach what all of them reach."""
    with tempfile.TemporaryDirectory() as merged:
        _run(target, ["-merge=1", merged, str(CORPUS / name), str(OUT / name)], subprocess.DEVNULL)
        for path in CORPUS.joinpath(name).iterdir():
            path.unlink()
        for path in Path(merged).iterdir():
            shutil.copy(path, CORPUS / name / path.name[:12])


def _build() -> None:
    make = ["make", "--no-print-directory", "-s", "-C", str(NATIVE), "-j", str(os.cpu_count())]
    subprocess.run([*make, f"PYTHON={sys.executable}"], check=True)


def _compiler_file(name: str) -> str:
    compiler = os.environ.get("CXX", "g++").split()
    return subprocess.run(
        [*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
