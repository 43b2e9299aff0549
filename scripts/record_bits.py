#!/usr/bin/env python3
"""Records the bits of logits and tokens, to hold a change that must not alter them against the commit before.

    scripts/record_bits.py before.json                        # in the old tree
    scripts/record_bits.py after.json --compare before.json   # in the new one

Exit code 1 if a bit differs.

The demo model and the random models of `tests/test_parity.py`, both dtypes, every instruction set of this processor; a
prompt in chunks and a ragged batch of completions, greedy and drawn with a seed. One process for each instruction set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from script_flags import ScriptParser

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DTYPES = ("float32", "bfloat16")
SEED = 7


def record(isa: str) -> dict[str, str]:
    """Hashes by case of one instruction set; TSQP_SHM_ISA has been set to it."""
    from models import fast_start, model_folder
    from test_parity import CASES, MAX_MODEL_LEN

    from tsqp_shm.model.spec import ModelSpec

    found: dict[str, str] = {}
    with fast_start() as start:
        for case in CASES:
            folder = model_folder(case.model)
            for dtype in DTYPES:
                with start.llm(folder, dtype=dtype, **{"max_model_len": MAX_MODEL_LEN, **case.limits}) as llm:
                    found[f"{isa}, {dtype}, {case.name}"] = digest(llm, 257, MAX_MODEL_LEN)
        demo = demo_folder()
        vocab_size = ModelSpec.from_folder(demo).vocab_size
        for dtype in DTYPES:
            with start.llm(demo, dtype=dtype, max_model_len=512, max_batch_tokens=256) as llm:
                found[f"{isa}, {dtype}, demo model"] = digest(llm, vocab_size, 320)
    return found


def digest(llm: Any, vocab_size: int, length: int) -> str:
    """SHA-256 over the logits of one sequence and the tokens of a ragged batch, greedy and drawn."""
    import numpy as np

    from tsqp_shm import SamplingParams

    def ids(count: int, seed: int) -> list[int]:
        return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]

    bits = hashlib.sha256(llm.logits(ids(length, SEED)).tobytes())
    prompts = [ids(count, SEED + count) for count in (1, 5, 64, 131)]
    for params in (
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=0),
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, top_p=0.9, seed=SEED),
    ):
        for output in llm.generate(prompts, params):
            bits.update(np.asarray(output.outputs[0].token_ids, np.int64).tobytes())
    return bits.hexdigest()


def demo_folder() -> Path:
    from tsqp_shm.demo.model import demo_model_folder

    folder: Path = demo_model_folder(lambda line: print(line, file=sys.stderr))
    return folder


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="to write")
    parser.add_argument("--compare", type=Path, metavar="BEFORE.json", help="say which cases differ from these")
    parser.add_argument("--isa", metavar="NAME", help="this instruction set alone (all)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.out.write_text(json.dumps(record(arguments.isa)))
        return 0

    from tsqp_shm import _native

    found: dict[str, str] = {}
    for isa in [arguments.isa] if arguments.isa else _native.instruction_sets():
        began = time.monotonic()
        subprocess.run(
            [sys.executable, __file__, str(arguments.out), "--child", "--isa", isa],
            env={**os.environ, "TSQP_SHM_ISA": isa, "PYTHONPATH": str(ROOT), "TSQP_SHM_RUNTIME_DIR": ""},
            check=True,
        )
        found |= json.loads(arguments.out.read_text())
        print(f"{isa}: {len(found)} cases so far, {time.monotonic() - began:.0f} s", file=sys.stderr)
    arguments.out.write_text(json.dumps(found, indent=1))
    if arguments.compare is None:
        return 0
    before = json.loads(arguments.compare.read_text())
    different = [name for name, bits in found.items() if before.get(name) != bits]
    for name in different:
        print(f"different: {name}")
    print(f"{len(found) - len(different)} of {len(found)} cases have the same bits")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
