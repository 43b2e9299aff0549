#!/usr/bin/env python
"""Kills one process of a session at a chosen step or at a random moment, and looks at what is left.

Every case is a real `tsqp-shm launch` (or, with --apart, the two roles as in two terminals) whose processes are forked
from one that has imported everything, instead of executed: a case takes half a second and not three. The doomed process
gets SIGKILL. Then the survivor must say who died, every process must end, and neither arena, socket nor session folder
may be left; the next case begins the same session.

    scripts/kill_roles.py --steps           each role at each step of a session
    scripts/kill_roles.py --moments 1000    a role or launch, at random moments
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: its threads must not spin on the cores of the others.
os.environ.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"})
sys.path.insert(0, str(Path(__file__).parent))

from forked_roles import Ending, Moment, run_session
from script_flags import ScriptParser, positive

from tsqp_shm.bench.shapes import write_shape
from tsqp_shm.bench.tables import print_columns
from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec

# Functions, by role, that a process is killed before or after; then the records that it sends.
STEPS = {
    "tee": ("Session.begin", "Session.create_memory", "Arena.publish", "Session.end"),
    "gpu": ("PosixTransport.join", "Arena.attach", "load_weights", "make_products", "Lifeline.ready"),
}
NEW_TOKENS = 24
FLAGS = ["--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--max-model-len", "64", "--max-batch-tokens", "64", "-q"]
# The demo model's vocabulary, so that its tokenizer fits; everything else is small.
SHAPE = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 0,
}  # fmt: skip
NETWORK = Network.of(ModelSpec.from_config(SHAPE))
MLP, LM_HEAD = NETWORK.layers[0].mlp, NETWORK.lm_head
# Each operation's first record: opcode, and of LINEAR the Linear.
RECORDS: tuple[tuple[str, int | None], ...] = (
    *((opcode, None) for opcode in ("READY", "EMBED", "QKV", "SCORES", "CONTEXT")),
    *(("LINEAR", linear.index) for linear in (MLP.gate_up, MLP.down, LM_HEAD)),
    ("STOP", None),
)
# What a role says that has waited for one that was never there.
NEVER_MET = ("no TEE process began", "waiting for READY; the peer's last heartbeat: never seen")


@dataclass
class Row:
    """One case.

    Attributes:
        kind: "normal", "told" (the survivor named the dead), "silent" (launch is dead, and nobody has to tell), "too
            late" (the session had ended well), "never met" (without a launch: killed before the other knew of it, which
            then waited in vain), "for the next" (something is left that the next start has to sweep) or "wrong".
        reported_s, ended_s: from the kill to the survivor's word, and to the end of the last process.
        found: what was wrong.
    """

    victim: str
    moment: str
    kind: str
    exit_code: int
    reported_s: float | None
    ended_s: float | None
    found: list[str]


def write_model(folder: Path) -> Path:
    """A small random model with the demo model's tokenizer."""
    folder.mkdir()
    write_shape(folder, SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model_folder() / name).read_bytes())
    return folder


def steps(quick: bool) -> Iterator[Moment]:
    for victim, functions in STEPS.items():
        for step in functions:
            yield Moment(victim, step=step)
        for opcode, target in RECORDS:
            for after in (False, True):
                if not (quick and after):
                    yield Moment(victim, step=opcode, target=target, after=after)
        yield Moment(victim, step="EMBED", count=NEW_TOKENS // 2)


def moments(number: int, draw: random.Random, session_s: float) -> Iterator[Moment]:
    for _ in range(number):
        victim = draw.choice(["tee", "gpu", "tee", "gpu", "launch"])
        yield Moment(victim, after_s=draw.uniform(0, session_s))


def judge(moment: Moment, ending: Ending, normal: Ending) -> Row:
    """What a case has come to: everything that is against the rules is named."""
    found = [f"alive: {role}" for role in ending.alive]
    codes = ending.codes
    reported_s = ended_s = None
    kind = "wrong"
    if ending.killed_s is None:
        kind = "normal" if moment.victim == "" else "too late"
        if set(codes.values()) != {0} or ending.stdout != normal.stdout:
            found.append(f"not killed, and yet {codes}: {ending.stderr!r}")
    else:
        ended_s = ending.ended_s - ending.killed_s
        survivors = {role: code for role, code in codes.items() if role != moment.victim}
        said = f"the {moment.victim} process died ("
        if moment.victim == "launch" or (set(survivors.values()) == {0} and ending.stdout == normal.stdout):
            # Nobody is left to tell, or the session had ended well before.
            kind = "silent" if moment.victim == "launch" else "too late"
        elif set(survivors.values()) == {3} and said in ending.stderr and ending.told_s is not None:
            kind = "told"
            reported_s = ending.told_s - ending.killed_s
        elif len(codes) > 1 and any(line in ending.stderr for line in NEVER_MET):
            kind = "never met"
        else:
            found.append(f"survivors {survivors}: {ending.stderr!r}")
        if "Traceback" in ending.stderr:
            found.append(ending.stderr)
    if ending.left and (moment.victim == "launch" or (len(codes) > 1 and kind == "too late")):
        # Nobody is left to sweep behind the last process: the next start does.
        kind = "for the next"
    else:
        found += [f"left: {path}" for path in ending.left]
    return Row(
        victim=moment.victim,
        moment=str(moment),
        kind="wrong" if found else kind,
        exit_code=next(iter(codes.values())),
        reported_s=reported_s,
        ended_s=ended_s,
        found=found,
    )


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def print_table(rows: list[Row]) -> None:
    cells = []
    for victim in sorted({row.victim for row in rows}):
        own = [row for row in rows if row.victim == victim]
        kinds = [row.kind for row in own]
        cells.append([victim, f"{len(own)}", *(f"{kinds.count(kind)}" for kind in ("told", "too late", "wrong"))])
        for times in ([row.reported_s for row in own], [row.ended_s for row in own]):
            known = [value for value in times if value is not None]
            cells[-1] += [f"{percentile(known, share):.2f}" if known else "-" for share in (0.5, 1.0)]
    titles = ["killed", "cases", "told", "too late", "wrong", "told p50 s", "told max s", "ended p50 s", "ended max s"]
    print_columns(titles, cells)


def parse_arguments() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--steps", action="store_true", help="each role at each step")
    parser.add_argument("--moments", type=positive, metavar="N", default=0, help="so many random moments")
    parser.add_argument("--quick", action="store_true", help="before each record only, and not after it")
    parser.add_argument("--apart", action="store_true", help="no launch: the survivor has the heartbeat alone")
    parser.add_argument(
        "--limit-s", type=float, metavar="S", default=3600.0, help="begin no case later than this (3600)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the moments (a new one)")
    parser.add_argument("--json", metavar="FILE", help="also write every case")
    arguments = parser.parse_args()
    if not arguments.steps and not arguments.moments:
        parser.error("nothing to kill: give --steps, --moments N, or both")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 32)
    draw = random.Random(seed)
    until = time.monotonic() + arguments.limit_s
    rows: list[Row] = []
    session = f"kill{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="tsqp-kill") as folder:
        model = write_model(Path(folder) / "model")

        def run(moment: Moment) -> Ending:
            return run_session(model, session, FLAGS, moment, apart=arguments.apart)

        normal = run(Moment(""))
        rows.append(judge(Moment(""), normal, normal))
        plan = list(steps(arguments.quick)) if arguments.steps else []
        plan += moments(arguments.moments, draw, normal.ended_s - normal.began_s)
        for number, moment in enumerate(plan, 1):
            if time.monotonic() > until or (arguments.apart and moment.victim == "launch"):
                continue
            if sys.stderr.isatty():
                print(f"\r\033[K{number}/{len(plan)} {moment}", end="", file=sys.stderr, flush=True)
            rows.append(judge(moment, run(moment), normal))
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        rows.append(judge(Moment(""), run(Moment("")), normal))
    killed = [row for row in rows if row.victim]
    wrong = [row for row in rows if row.kind == "wrong"]
    print_table(killed)
    for row in wrong:
        print(f"{row.moment}: {'; '.join(row.found)}", file=sys.stderr)
    if arguments.json:
        document: dict[str, Any] = {"seed": seed, "apart": arguments.apart, "rows": [asdict(row) for row in rows]}
        Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
