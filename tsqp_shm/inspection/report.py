"""What was found, as JSON and as a table."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from tsqp_shm import _native
from tsqp_shm.arguments import STDOUT, require_writable
from tsqp_shm.config import MAX_THREADS, EngineConfig, Limits
from tsqp_shm.errors import ModelFileError, UnsupportedModel
from tsqp_shm.inspection.findings import (
    Facts,
    describe_checkpoint,
    describe_config,
    describe_network,
    describe_text,
    embedding_bytes,
    read_network,
)
from tsqp_shm.inspection.memory import ModeMemory, memory_of, pad_row_bytes
from tsqp_shm.model.digest import Digests, model_digest
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.modes import MODES
from tsqp_shm.pad_stock import stock_rows
from tsqp_shm.printable import print_json, shown
from tsqp_shm.progress import Progress
from tsqp_shm.roles.resources import available_bytes, lockable_bytes
from tsqp_shm.wrapping import beside

# The settings of a mode, whatever others say.
ConfigOfMode = Callable[[str], EngineConfig]


def inspect(folder: Path, config_of: ConfigOfMode, *, with_digest: bool, json_file: str | None, quiet: bool) -> int:
    """`tsqp-shm inspect`. Returns the exit code: 1 where the model is not followed.

    Raises:
        ConfigError: a setting is not allowed.
        ModelFileError: it is no model folder.
    """
    require_writable("json", json_file)
    found, memory = examine(folder, config_of)
    if with_digest:
        digests = _digests(folder, quiet) if found["refused"] is None else None
        found["digest"], found["linears_digest"] = digests or (None, None)
    if json_file == STDOUT:
        print_json(found)
    else:
        print_table(found, memory, sys.stdout)
        if json_file is not None:
            Path(json_file).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if not _refusals(found) else 1


def _refusals(found: Facts) -> list[str]:
    """Why it cannot be used as it is: of the network, of the tokenizer."""
    parts = (found, found["tokenizer"] or {})
    return [str(part["refused"]) for part in parts if part.get("refused") is not None]


def examine(folder: Path, config_of: ConfigOfMode) -> tuple[Facts, list[ModeMemory]]:
    """Everything but the digest, as plain values; the memory of each mode beside it."""
    found: Facts = {**describe_config(folder), "refused": None, "checkpoint": None, "network": None, "modes": {}}
    network: Network | None = None
    stored_bytes: int | None = None
    memory: list[ModeMemory] = []
    try:
        spec, network = read_network(folder)
        found["network"] = describe_network(spec, network)
        found["checkpoint"] = describe_checkpoint(folder)
        stored_bytes = embedding_bytes(folder, network)
    except (ModelFileError, UnsupportedModel) as error:
        found["refused"] = str(error)
    if network is not None:
        for mode in MODES:
            config = config_of(mode)
            limits = config.limits(spec.max_positions, network.layer_parameters)
            pad_rows = _pad_rows(network, config, limits) if MODES[mode].has_pads else 0
            memory.append(memory_of(network, limits, stored_bytes, pad_rows))
            found["modes"][mode] = {"limits": asdict(limits), **_plain(memory[-1])}
    elif found["checkpoint"] is None:
        found["checkpoint"] = _checkpoint_or_none(folder)
    return {**found, **describe_text(folder)}, memory


def _pad_rows(network: Network, config: EngineConfig, limits: Limits) -> int:
    """As a session on this machine would have them; without a word of the user's that depends on the memory here.

    Raises:
        ConfigError: there is not so much memory.
    """
    return stock_rows(
        config.pad_stock,
        pad_row_bytes(network),
        most_rows=limits.max_model_len,
        free_bytes=available_bytes(),
        lockable_bytes=lockable_bytes() if config.lock_memory else None,
    )


def _checkpoint_or_none(folder: Path) -> Facts | None:
    try:
        return describe_checkpoint(folder)
    except ModelFileError:
        return None


def _plain(memory: ModeMemory) -> dict[str, Any]:
    return {
        "refused": memory.refused,
        "parts": [asdict(part) for part in memory.parts],
        "total_bytes": {where: memory.total(where) for where in memory.places},
    }


def _digests(folder: Path, quiet: bool) -> Digests:
    _, network = read_network(folder)
    _native.set_num_threads(min(MAX_THREADS, len(os.sched_getaffinity(0))))
    with Checkpoint.open(folder) as checkpoint, Progress(quiet) as progress:

        def tell(done: int, total: int) -> None:
            progress.show(f"digest: {done / total:.0%} of the weights")

        return model_digest(ModelFiles(folder), network, checkpoint, tell)


def print_table(found: Facts, memory: list[ModeMemory], out: TextIO) -> None:
    def line(label: str, text: object) -> None:
        # UNTRUSTED: names of the files' making.
        print(beside(f"{label:<14}", shown(str(text), lines=False), out), file=out)

    line("model", found["name"])
    line("family", ", ".join([str(found["family"]), *map(str, found["architectures"])]))
    if found["checkpoint"] is not None:
        line("checkpoint", _checkpoint_words(found["checkpoint"]))
    if found["network"] is not None:
        for label, text in _network_words(found["network"]):
            line(label, text)
    line("tokenizer", _part_words(found["tokenizer"]))
    line("chat template", _part_words(found["chat_template"]))
    line("sampling", _sampling_words(found["sampling"]))
    refusals = _refusals(found)
    line("supported", "yes" if not refusals else f"no: {'; '.join(refusals)}")
    if "digest" in found:
        line("digest", found["digest"] or "none, as the model is refused")
    if found.get("linears_digest"):
        line("its Linears", found["linears_digest"])
    for of_mode in memory:
        _print_memory(of_mode, found["modes"][of_mode.mode]["limits"], out)


def _checkpoint_words(checkpoint: Facts) -> str:
    dtypes = ", ".join(f"{dtype} {size(count)}" for dtype, count in sorted(checkpoint["bytes_by_dtype"].items()))
    return f"{checkpoint['tensors']:,} tensors, {dtypes}"


def _network_words(network: Facts) -> list[tuple[str, str]]:
    tied = "lm_head is the embedding" if network["is_tied"] else "lm_head of its own"
    widths = f"hidden {network['hidden_size']:,}, feed-forward {network['intermediate_size']:,}"
    heads = f"{network['num_heads']} heads of {network['head_dim']}, {network['num_kv_heads']} of keys and values"
    stretched = network["max_positions"] != network["max_position_embeddings"]
    context = f"{network['max_position_embeddings']:,} positions"
    rope = network["rope"]
    neutral = {"factor": 1.0, "original_max_position_embeddings": 0}
    more = "".join(f", {name} {rope[name]:,g}" for name, value in neutral.items() if rope[name] != value)
    return [
        ("parameters", f"{network['parameters']:,}"),
        ("layers", f"{network['layers']}: {widths}, {heads}"),
        ("vocabulary", f"{network['vocab_size']:,}, {tied}"),
        ("biases", ", ".join(network["linears_with_bias"]) or "none"),
        ("context", f"{context}, stretched to {network['max_positions']:,}" if stretched else context),
        ("rope", f"{rope['kind']}, theta {rope['theta']:,g}{more}"),
        ("windows", _windows_words(network["windows"])),
    ]


def _windows_words(windows: list[int | None]) -> str:
    runs = [(window, len(list(same))) for window, same in groupby(windows)]
    if runs == [(None, len(windows))]:
        return "none"
    words = [f"{count} layers {'without' if window is None else f'of {window:,} keys'}" for window, count in runs]
    return ", ".join(words[:6]) + (", ..." if len(words) > 6 else "")


def _part_words(part: Facts | None) -> str:
    if part is None:
        return "none"
    return str(part["file"]) if part["refused"] is None else f"refused: {part['refused']}"


def _sampling_words(sampling: Facts | None) -> str:
    if sampling is None:
        return "the likeliest token, as there is no generation_config.json"
    if sampling["refused"] is not None:
        return f"refused: {sampling['refused']}"
    return ", ".join(f"{name} {value}" for name, value in sampling["fields"].items())


def _print_memory(memory: ModeMemory, limits: Facts, out: TextIO) -> None:
    print(
        f"\n{memory.mode}: memory with {limits['max_model_len']:,} tokens a sequence (--max-model-len), "
        f"{limits['max_num_seqs']:,} sequences (--max-num-seqs), {limits['max_batch_tokens']:,} tokens a step "
        "(--max-batch-tokens), beside the programs themselves",
        file=out,
    )
    if memory.refused is not None:
        print(beside("  refused: ", memory.refused, out), file=out)
    for where in memory.places:
        print(beside(f"  {where:<40}{size(memory.total(where)):>12}", "", out), file=out)
        for part in memory.parts:
            if part.where == where:
                row = beside(f"    {part.what:<38}{size(part.size_bytes):>12}  ", " ".join(part.flags), out)
                print(row.rstrip(), file=out)


def size(size_bytes: int) -> str:
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << scale:
            return f"{size_bytes / (1 << scale):,.1f} {unit}"
    return f"{size_bytes} B"
