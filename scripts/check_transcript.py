#!/usr/bin/env python3
"""Checks a session of `--evidence FILE.json --transcript FILE`, and shares
nothing with the package but the words of docs/evidence.md: numpy, and
arithmetic of its own.

    scripts/check_transcript.py MODEL FILE.json FILE

It quantises the model's weights itself, holds the digests of model and Linears
against the evidence's, multiplies every row of the transcript again, exactly,
and holds which rows each request had, in which passes, against the evidence.
Exit code 0: all agrees; 1: what does not is said, or that there was nothing to
check.
"""

import argparse
import hashlib
import json
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

P = 2**31 - 1
VECTORS = 2
COUNTS = ["passes", "rows", "wanted_rows", "products", "products_checked", "products_in_tee"]
ROLES = ["qkv", "o", "gate_up", "down"]
BEGIN, PRODUCT, END, KEPT = 1, 2, 3, 4
MODES = ["verified", "blinded"]
# Beside weights, what decides a model's answers, in the order of its digest.
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
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


def add_tensor(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"tensor {name} {array.dtype.name} {'x'.join(map(str, array.shape))}\n".encode())
    digest.update(np.ascontiguousarray(array).data)


def quantised_linears(layers: int, tensors: dict[str, np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Each Linear as int8 [outputs, inputs], in the network's order, and the digest of them all."""
    digest = hashlib.sha256(b"tsqp-shm linears digest 1\n")

    def linear(*names: str) -> np.ndarray:
        parts = []
        for name in names:
            weight, full = tensors[f"{name}.weight"], name if name == "lm_head" else f"model.{name}"
            scales = np.abs(weight).max(axis=1) / np.float32(127)
            scales[scales == 0] = 1
            parts.append(np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8))
            add_tensor(digest, f"{full}.weight", parts[-1])
            add_tensor(digest, f"{full}.weight.scales", scales)
            if f"{name}.bias" in tensors:
                add_tensor(digest, f"{full}.bias", tensors[f"{name}.bias"])
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


def model_digest(folder: Path, layers: int, tensors: dict[str, np.ndarray], linears_digest: str) -> str:
    digest = hashlib.sha256(b"tsqp-shm model digest 2\n")
    for name in FILES:
        path = folder / name
        of_file = (
            f"file {name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.exists() else f"none {name}"
        )
        digest.update(f"{of_file}\n".encode())
    norms = [f"layers.{layer}.{norm}_layernorm" for layer in range(layers) for norm in ("input", "post_attention")]
    for name in ("embed_tokens", *norms, "norm"):
        add_tensor(digest, f"model.{name}.weight", tensors[f"{name}.weight"])
    digest.update(f"linears {linears_digest}\n".encode())
    return f"sha256:{digest.hexdigest()}"


class Product(NamedTuple):
    """Of pass `number`: m [rows, inputs] and y [rows, outputs] of a Linear, from a row of the pass on; None where the
    TEE has computed it itself."""

    number: int
    linear: int
    first_row: int
    rows: int
    m: np.ndarray | None = None
    y: np.ndarray | None = None


class Pass(NamedTuple):
    """Its parts [N, 5]: request, completion, position, rows, wanted rows; and whether all its checks have held."""

    parts: np.ndarray
    has_ended: bool


def read_records(words: np.ndarray, linears: list[np.ndarray]) -> tuple[list[Pass], list[Product]]:
    """Raises:
    ValueError: they are no transcript of these Linears.
    """
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
        kind = int(take(1)[0])
        if kind in (PRODUCT, END, KEPT) and (not passes or passes[-1].has_ended):
            raise ValueError(f"word {at - 1:,} begins a record that belongs to no pass")
        if kind == BEGIN:
            passes.append(Pass(take(5 * int(take(1)[0])).reshape(-1, 5), False))
        elif kind in (PRODUCT, KEPT):
            linear, first_row, rows = (int(word) for word in take(3))
            if linear >= len(linears) or rows == 0:
                raise ValueError(f"word {at - 3:,} names rows of no Linear")
            product = Product(len(passes) - 1, linear, first_row, rows)
            if kind == PRODUCT:
                m, y = (take(rows * width).reshape(rows, width) for width in reversed(linears[linear].shape))
                product = product._replace(m=m, y=y)
            products.append(product)
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


def false_products(linears: list[np.ndarray], products: list[Product]) -> list[Product]:
    """In their order."""
    found = []
    for linear, weight in enumerate(linears):
        numbers = [n for n, product in enumerate(products) if product.linear == linear and product.m is not None]
        if numbers:
            m, y = (np.concatenate([getattr(products[number], name) for number in numbers]) for name in "my")
            of_row = np.repeat(numbers, [products[number].rows for number in numbers])
            found += np.unique(of_row[false_rows(weight, m, y)]).tolist()
    return [products[number] for number in sorted(found)]


def falsehoods(evidence: dict, operations: list[tuple], passes: list[Pass], false: list[Product]) -> Iterator[str]:
    """A false product ends the session: nothing comes out of its pass, no other follows, and the evidence says where
    the first one lay."""
    told = [failure for failure in evidence["session"]["failures"] if failure["error"] == "IntegrityError"]
    for number in sorted({product.number for product in false}):
        first = next(product for product in false if product.number == number)
        layer, operation = operations[first.linear]
        is_last = number == len(passes) - 1 and not passes[number].has_ended
        if not is_last or {"error": "IntegrityError", "layer": layer, "operation": operation} not in told:
            yield f"pass {number + 1}: a product is false: {operation}, layer {layer}"
    if told and not false:
        yield "the evidence tells of a false product, and the transcript has none"


def untiled(passes: list[Pass], products: list[Product], num_linears: int) -> Iterator[str]:
    """Every row goes through every Linear once, of a pass that broke off once at most. Of lm_head the wanted rows do,
    in pieces of one size but for the last."""
    runs_of: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for product in products:
        runs_of[product.number, product.linear].append((product.first_row, product.rows))
    for number, (parts, has_ended) in enumerate(passes):
        most, most_wanted = int(parts[:, 3].sum()), int(parts[:, 4].sum())
        agrees = bool((parts[:, 3] > 0).all() and (parts[:, 4] <= parts[:, 3]).all())
        for linear in range(num_linears - 1):
            end = 0
            for first, rows in sorted(runs_of[number, linear]):
                agrees &= first == end if has_ended else first >= end
                end = first + rows
            agrees &= end == most if has_ended else end <= most
        pieces = runs_of[number, num_linears - 1]
        sizes = [rows for _, rows in pieces]
        agrees &= all(first == 0 for first, _ in pieces) and all(rows == sizes[0] for rows in sizes[:-1])
        agrees &= not sizes or sizes[-1] <= sizes[0]
        agrees &= sum(sizes) == most_wanted if has_ended else sum(sizes) <= most_wanted
        if not agrees:
            yield f"pass {number + 1}: not every row went through every Linear once"


def kept_rows(passes: list[Pass], products: list[Product], num_linears: int) -> list[Counter[int]]:
    """Of each pass, by its parts' numbers, how many rows of products the TEE has computed itself."""
    found: list[Counter[int]] = [Counter() for _ in passes]
    wanted: Counter[int] = Counter()
    for product in products:
        column, first = 3, product.first_row
        if product.linear == num_linears - 1:
            column, first = 4, wanted[product.number]
            wanted[product.number] += product.rows
        begin = 0
        for part, rows in enumerate(passes[product.number].parts[:, column].tolist() if product.m is None else []):
            found[product.number][part] += max(0, min(begin + rows, first + product.rows) - max(begin, first))
            begin += rows
    return found


def records_of(evidence: dict) -> dict[tuple[int, int], tuple[dict, dict]]:
    """Of each completion, by the number of its request and its own, that of the request and its own."""
    records = evidence["requests"]
    return {(record["request"], part["index"]): (record, part) for record in records for part in record["completions"]}


def count(
    passes: list[Pass], kept: list[Counter[int]], num_linears: int, evidence: dict
) -> tuple[dict[tuple[int, int], Counter[str]], list[str]]:
    """What each completion had in the passes that ended, and in which pass it did not go on where it was: from 0, or
    from what the cache held of an earlier request, which had put as much there by then."""
    told = records_of(evidence)
    cached = {each: part["cached_tokens"] for each, (_, part) in told.items()}
    source = {each: (part["cached_from"], 0) for each, (_, part) in told.items()}
    counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    problems = []
    for number, (parts, has_ended) in enumerate(passes):
        for part, (request, completion, position, rows, wanted) in enumerate(parts.tolist()):
            # Request 0 is of logits that were asked for without one, of any number of sequences.
            if request == 0:
                continue
            of_it = counts[request, completion]
            # One that broke off has put nothing into the caches, and is computed again.
            found = cached.get((request, completion), 0)
            if position != found + of_it["rows"]:
                problems.append(f"pass {number + 1}: request {request}, completion {completion} is at another position")
            if found and not of_it["rows"]:
                earlier = source[request, completion]
                if earlier[0] == request or cached.get(earlier, 0) + counts.get(earlier, Counter())["rows"] < found:
                    problems.append(f"pass {number + 1}: request {request} goes on from what no cache held")
            if has_ended:
                products = rows * (num_linears - 1) + wanted
                of_it.update(passes=1, rows=rows, wanted_rows=wanted, products=products)
                of_it.update(products_checked=products - kept[number][part], products_in_tee=kept[number][part])
    return counts, problems


def miscounted(evidence: dict, counts: dict[tuple[int, int], Counter[str]]) -> Iterator[str]:
    """Which completions have other counts in the evidence, or counts that are not those of such an answer."""
    records, told = evidence["requests"], records_of(evidence)
    for request, completion in sorted({*counts, *told}):
        found = counts.get((request, completion), Counter())
        record, part = told.get((request, completion), (None, {}))
        name = f"request {request}, completion {completion}"
        if any(part.get(each) != found[each] for each in COUNTS):
            yield f"{name}: the evidence counts otherwise"
        elif record is not None and not has_rows_of_answer(record, part):
            yield f"{name}: such a prompt with such an answer has other rows"
    for record in records:
        if sorted(part["index"] for part in record["completions"]) != list(range(record["params"]["n"])):
            yield f"request {record['request']}: its completions are not those that were asked for"
    if len({record["request"] for record in records}) != len(records):
        yield "two requests have one number"


def has_rows_of_answer(record: dict, part: dict) -> bool:
    prompt, answer, rows = record["prompt_tokens"], part["answer_tokens"], part["rows"]
    # The last token of an answer does not go through the layers, nor what lay in the cache of an earlier request.
    least = prompt + answer - 1 - part["cached_tokens"]
    if not 0 <= part["cached_tokens"] < prompt:
        return False
    if part["finish_reason"] not in ("stop", "length"):
        # The pass may have been the last one of which nothing was taken any more.
        return (answer == 0 or least <= rows) and rows <= least + 1 and answer <= part["wanted_rows"]
    scored = prompt - 1 if record["params"]["prompt_logprobs"] is not None and part["index"] == 0 else 0
    is_full = answer == part["max_tokens"]
    has_ending = is_full if part["finish_reason"] == "length" else 0 < answer <= part["max_tokens"]
    return has_ending and (rows, part["wanted_rows"]) == (least, scored + answer)


def check(folder: Path, evidence: dict, transcript: bytes) -> tuple[list[str], int]:
    """Returns what does not agree, and how many rows were multiplied."""
    layers, tensors = json.loads((folder / "config.json").read_text())["num_hidden_layers"], read_tensors(folder)
    linears, digest = quantised_linears(layers, tensors)
    expected = {
        "schema": "tsqp-shm evidence 1",
        "mode": evidence["session"]["mode"] if evidence["session"]["mode"] in MODES else " or ".join(MODES),
        "field": P,
        "vectors": VECTORS,
        "linears_digest": digest,
        "model_digest": model_digest(folder, layers, tensors, digest),
    }
    said = {"schema": evidence["schema"], **evidence["session"]}
    differing = [name for name in expected if said.get(name) != expected[name]]
    if differing:
        return [f"{name} of the evidence is {said.get(name)}, and not {expected[name]}" for name in differing], 0
    operations = [(layer, role) for layer in range(layers) for role in ROLES] + [(None, "lm_head")]
    named = [
        {"layer": layer, "role": role, "inputs": linear.shape[1], "outputs": linear.shape[0]}
        for (layer, role), linear in zip(operations, linears, strict=True)
    ]
    head, _, body = transcript.partition(b"\n")
    try:
        if json.loads(head) != {"schema": "tsqp-shm transcript 1", "linears": named}:
            raise ValueError("its first line is none of this model")
        passes, products = read_records(np.frombuffer(body, "<u4"), linears)
    except ValueError as error:
        return [f"the transcript is damaged: {error}"], 0
    problems = []
    if all(product.m is None for product in products):
        problems.append("there was nothing to check: the transcript has no product")
    problems += falsehoods(evidence, operations, passes, false_products(linears, products))
    problems += untiled(passes, products, len(linears))
    counts, misplaced = count(passes, kept_rows(passes, products, len(linears)), len(linears), evidence)
    problems += [*misplaced, *miscounted(evidence, counts)]
    return problems, sum(product.rows for product in products if product.m is not None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # A wrong one is one line.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see {parser.prog} --help\n")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder of the model that the session had")
    parser.add_argument("evidence", type=Path, metavar="FILE.json", help="what its --evidence has written")
    parser.add_argument("transcript", type=Path, metavar="FILE", help="what its --transcript has written")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        evidence, transcript = json.loads(arguments.evidence.read_text()), arguments.transcript.read_bytes()
        problems, num_rows = check(arguments.model, evidence, transcript)
    except OSError as error:
        problems, num_rows = [f"{error.filename}: {error.strerror}"], 0
    except (KeyError, TypeError, ValueError) as error:
        problems, num_rows = [f"this is no evidence: {type(error).__name__}: {error}"], 0
    print("\n".join(problems) or f"all agrees: {num_rows:,} rows of products")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
