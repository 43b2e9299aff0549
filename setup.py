"""Build the native extensions from `native/`: `tsqp_shm._native`, the GPU process's products, and round trips.

Metadata lives in pyproject.toml; this file only says how the C++ is compiled. One source file per instruction
set is compiled with that set's flags, everything else for the machine's baseline, so one wheel runs on every
processor of its architecture and picks its kernels at load (see native/kernels/dispatch.cpp).
"""

import os
import platform
import re
import shutil
import sysconfig
import time
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py

NATIVE = Path("native")

# -ffp-contract=off: a fused multiply-add rounds once where mul and add round twice, and the instruction sets must
# agree bit for bit.
FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
# Warnings are for this project's code: the headers of Python and pybind11 count as the system's.
FLAGS += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

INSTRUCTION_SETS = NATIVE / "instruction_sets.mk"
MACHINE = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
# None: a set of another machine.
ISA_FLAGS = {
    name: flags.split() if machine in ("any", MACHINE) else None
    for machine, name, flags in re.findall(r"^isa\.(\w+)\.(\w+) := (.*)$", INSTRUCTION_SETS.read_text(), re.MULTILINE)
}


def isa_flags(source: Path) -> list[str] | None:
    """What a source file is compiled with beside the common flags; None where it is for another machine."""
    return ISA_FLAGS.get(source.stem.rpartition("_")[2], [])


def sources(*patterns: str) -> list[Path]:
    """Those of native/ that this machine can compile."""
    return sorted(path for pattern in patterns for path in NATIVE.glob(pattern) if isa_flags(path) is not None)


class BuildWithIsaFlags(build_ext):
    """Adds a source file's own instruction-set flags to the compile command that distutils makes for it."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):  # noqa: ANN001, ANN202
            flags = [*extra_postargs, *(isa_flags(Path(src)) or [])]
            return compile_one(obj, src, ext, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()


class BuildFresh(build_py):
    """Empties the folder that becomes the wheel: what an earlier build left there may have been removed since."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if os.environ.get("TSQP_SHM_WERROR") == "1":
    FLAGS.append("-Werror")


def extension(name: str, sources: list[Path]) -> Pybind11Extension:
    return Pybind11Extension(
        name,
        [str(path) for path in sources],
        include_dirs=[str(NATIVE)],
        cxx_std=20,
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        depends=[str(path) for path in (INSTRUCTION_SETS, *NATIVE.rglob("*.h"))],
    )


# What is measured of the field and of pads, without Python's side of it.
FIELD = [
    path
    for path in sources("field/*.cpp", "pads/*.cpp", "kernels/*.cpp", "cpu/*.cpp")
    if not path.name.startswith("bind_")
]
PADS = sources("pads/aes.cpp", "pads/dispatch.cpp", "pads/pads_*.cpp", "cpu/*.cpp")

# What several extensions are made of is compiled once: all have the same flags. Objects of an earlier build may be of
# other headers.
STARTED_S = time.time()
ParallelCompile(
    "NPY_NUM_BUILD_JOBS", default=2, needs_recompile=lambda obj, src: Path(obj).stat().st_mtime < STARTED_S
).install()
setup(
    ext_modules=[
        extension(
            "tsqp_shm._native",
            sources(
                "module.cpp",
                *(
                    f"{part}/*.cpp"
                    for part in ("border", "kernels", "elementary", "attention", "sampler", "field", "pads", "cpu")
                ),
            ),
        ),
        # Beside it and not in it: the TEE process loads neither the GPU process's products nor a benchmark.
        extension("tsqp_shm.gpu._products", sources("products/*.cpp", "cpu/*.cpp")),
        extension("tsqp_shm.bench._round_trips", sources("bench/round_trips.cpp", "border/ring.cpp")),
        extension("tsqp_shm.bench._field_products", [*sources("bench/field_products.cpp", "bench/peak*.cpp"), *FIELD]),
        extension("tsqp_shm.bench._field_checks", [*sources("bench/field_checks.cpp"), *FIELD]),
        extension("tsqp_shm.bench._blinded_checks", [*sources("bench/blinded_checks.cpp"), *FIELD]),
        extension("tsqp_shm.bench._pads", [*sources("bench/pads.cpp"), *PADS]),
    ],
    cmdclass={"build_py": BuildFresh, "build_ext": BuildWithIsaFlags},
)
