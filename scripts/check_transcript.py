#!/usr/bin/env python3
"""Checks a session that was recorded by `--evidence FILE.json --transcript FILE`, and shares nothing with the package
but the words of docs/evidence.md: numpy, and arithmetic of its own.

    python scripts/check_transcript.py MODEL FILE.json FILE

It quantises the model's weights itself, holds their digest against the evidence's, multiplies every row of the
transcript again, exactly, and holds the rows that each request had against the evidence's counts. Exit code 0: all
agrees; 1: what does not is said.
"""

import hashlib
import json
import struct
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

P = 2**31 - 1
BEGIN, PRODUCT, END = 1, 2, 3
ROWS_AT_ONCE = 1024


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model in float32, by its name without the `model.` before it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = np.memmap(path, np.uint8, "r")
        begin = 8 + struct.unpack("<Q", content[:8].tobytes())[0]
        entries = json.loads(content[8:begin].tobytes())
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            first, last = (begin + offset for offset in entry["data_offsets"])
            stored = content[first:last]
            if entry["dtype"] == "BF16":
                values = (stored.view("<u2").astype("<u4") << 16).view("<f4")
            else:
                values = stored.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry["dtype"]]).astype("<f4")
            found[name.removeprefix("model.")] = values.reshape(entry["shape"])
    return found


def quantised_linears(folder: Path) -> tuple[list[np.ndarray], str]:
    """Each Linear as int8 [outputs, inputs], in the network's order, and the digest of them all."""
    layers, tensors = json.loads((folder / "config.json").read_text())["num_hidden_layers"], read_tensors(folder)
    digest = hashlib.sha256(b"tsqp-shm linears digest 1\n")

    def add(name: str, array: np.ndarray) -> None:
        digest.update(f"tensor {name} {array.dtype.name} {'x'.join(map(str, array.shape))}\n".encode())
        digest.update(np.ascontiguousarray(array).data)

    def linear(*names: str) -> np.ndarray:
        parts = []
        for name in names:
            weight, full = tensors[f"{name}.weight"], name if name == "lm_head" else f"model.{name}"
            scales = np.abs(weight).max(axis=1) / np.float32(127)
            scales[scales == 0] = 1
            parts.append(np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8))
            add(f"{full}.weight", parts[-1])
            add(f"{full}.weight.scales", scales)
            if f"{name}.bias" in tensors:
                add(f"{full}.bias", tensors[f"{name}.bias"])
        return np.concatenate(parts)

    linears = []
    for layer in range(layers):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        linears.append(linear(*(f"{attention}.{part}_proj" for part in "qkv")))
        linears.append(linear(f"{attention}.o_proj"))
        linears.append(linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        linears.append(linear(f"{mlp}.down_proj"))
    # Where it has no matrix of its own, it is the embedding once more.
    linears.append(linear("lm_head" if "lm_head.weight" in tensors else "embed_tokens"))
    return linears, f"sha256:{digest.hexdigest()}"


class Product(NamedTuple):
    """Of pass `number`: m [rows, inputs] and y [rows, outputs] of a Linear."""

    number: int
    linear: int
    m: np.ndarray
    y: np.ndarray


class Pass(NamedTuple):
    """Its parts [N, 5]: request, completion, position, rows, wanted rows; and whether all its checks have held."""

    parts: np.ndarray
    has_ended: bool


def read_records(words: np.ndarray, linears: list[np.ndarray]) -> tuple[list[Pass], list[Product]]:
    passes: list[Pass] = []
    products = []
    at = 0

    def take(count: int) -> np.ndarray:
        nonlocal at
        at += count
        if at > len(words):
            raise ValueError("it ends within a record")
        return words[at - count : at]

    while at < len(words):
        kind = take(1)[0]
        if kind == BEGIN:
            passes.append(Pass(take(5 * int(take(1)[0])).reshape(-1, 5), False))
        elif kind == PRODUCT:
            linear, _, rows = (int(word) for word in take(3))
            outputs, inputs = linears[linear].shape
            m = take(rows * inputs).reshape(rows, inputs)
            products.append(Product(len(passes) - 1, linear, m, take(rows * outputs).reshape(rows, outputs)))
        elif kind == END:
            passes[-1] = Pass(passes[-1].parts, True)
        else:
            raise ValueError(f"word {at - 1:,} begins no record")
    return passes, products


def false_rows(weight: np.ndarray, m: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which rows of y are not m W mod p, or hold a word that is none of the field's."""
    wide, found = weight.T.astype(np.float64), []
    for first in range(0, len(m), ROWS_AT_ONCE):
        sent, came = m[first : first + ROWS_AT_ONCE], y[first : first + ROWS_AT_ONCE]
        # By halves of a word every sum is a whole number below 2^53, and float64 has it exactly in any order.
        low, high = ((half.astype(np.float64) @ wide).astype(np.int64) for half in (sent & 0xFFFF, sent >> 16))
        found.append(((low + (high % P << 16)) % P != came).any(axis=1) | (sent >= P).any(axis=1))
    return np.concatenate(found)


def check(folder: Path, evidence: dict, transcript: bytes) -> tuple[list[str], int]:
    """Returns what does not agree, and how many rows were multiplied."""
    linears, digest = quantised_linears(folder)
    if digest != evidence["session"]["linears_digest"]:
        return [f"the Linears' digest is {digest}, the evidence has {evidence['session']['linears_digest']}"], 0
    head, _, body = transcript.partition(b"\n")
    operations = [(linear["layer"], linear["role"]) for linear in json.loads(head)["linears"]]
    try:
        passes, products = read_records(np.frombuffer(body, "<u4"), linears)
    except ValueError as error:
        return [f"the transcript is damaged: {error}"], 0

    problems = []
    for linear, weight in enumerate(linears):
        of_linear = [product for product in products if product.linear == linear]
        if not of_linear:
            continue
        false = false_rows(weight, *(np.concatenate([getattr(each, name) for each in of_linear]) for name in "my"))
        of_row = np.repeat([product.number for product in of_linear], [len(product.m) for product in of_linear])
        layer, operation = operations[linear]
        is_told = {"error": "IntegrityError", "layer": layer, "operation": operation} in evidence["session"]["failures"]
        for number in sorted(set(of_row[false].tolist())):
            # A false product ends the session: nothing comes out of its pass, and the evidence says where it lay.
            if passes[number].has_ended or not is_told:
                problems.append(f"pass {number + 1}: a product is false: {operation}, layer {layer}")

    counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    rows_of = Counter({(product.number, product.linear): 0 for product in products})
    for product in products:
        rows_of[product.number, product.linear] += len(product.m)
    for number, (parts, has_ended) in enumerate(passes):
        if not has_ended:
            continue
        expected = [int(parts[:, 3].sum())] * (len(linears) - 1) + [int(parts[:, 4].sum())]
        if [rows_of[number, linear] for linear in range(len(linears))] != expected:
            problems.append(f"pass {number + 1}: not every row went through every Linear once")
        for request, completion, _, rows, wanted in parts.tolist():
            counts[request, completion].update(passes=1, rows=rows, wanted_rows=wanted)
    told = {(each["request"], part["index"]): part for each in evidence["requests"] for part in each["completions"]}
    # Request 0 is of logits that were asked for without one.
    for request, completion in sorted({*counts, *told} - {(0, 0)}):
        found, said = counts[request, completion], told.get((request, completion), {})
        found["products"] = found["rows"] * (len(linears) - 1) + found["wanted_rows"]
        found["products_checked"] = found["products"]
        names = ("passes", "rows", "wanted_rows", "products", "products_checked")
        if any(said.get(name) != found[name] for name in names):
            problems.append(f"request {request}, completion {completion}: the evidence counts otherwise")
    return problems, sum(rows_of.values())


def main() -> int:
    folder, evidence, transcript = map(Path, sys.argv[1:])
    problems, num_rows = check(folder, json.loads(evidence.read_text()), transcript.read_bytes())
    print("\n".join(problems) or f"all agrees: {num_rows:,} rows of products")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
