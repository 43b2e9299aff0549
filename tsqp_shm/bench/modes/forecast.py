"""What a pass takes in each mode on a machine that is not at hand: sums and quotients, nothing measured.

A token of decode, everything one after the other:

    tee-only   weights / memory, or their multiplications / cores, + attention + rows to integers and back
    verified   weights / the GPU's memory, or two digits' multiplications / the GPU, + a round trip a Linear
               + 4 bytes a word over the bus + attention + checks of the words
    blinded    as verified with four digits, + draws, masks and unmasking of the words;
               without stock no faster than pads are made, on the cores that do the rest too

A prompt goes through in blocks, so that the slowest of GPU, bus and cores decides.

What it leaves out: norms, activation, embedding, sampling, Python; the copies of a driver; that published peaks are
seldom reached. So it is a bound from below for times, more so for the modes with a GPU process.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from tsqp_shm.model.network import Network

# As `native/field/check.cpp` shares out rows among threads: so many at once, and results of a row in such pieces.
_TASK_ROWS = 4
_TASK_WORDS = 8192
_WORD_BYTES = 4
_CACHE_BYTES = 2
# An activation in clear has two digits nearly always, a blinded one has four.
_CLEAR_DIGITS = 2
_BLINDED_DIGITS = 4


@dataclass(frozen=True)
class ModelShape:
    """Attributes:
    linears: of the layers, (inputs, outputs) and how often.
    lm_head: (inputs, outputs), of wanted rows only.
    kv_width: keys and values of a position, in all layers.
    q_width: of all layers' queries.
    """

    name: str
    linears: tuple[tuple[tuple[int, int], int], ...]
    lm_head: tuple[int, int]
    kv_width: int
    q_width: int

    @classmethod
    def of(cls, name: str, network: Network) -> ModelShape:
        sizes = Counter((linear.inputs, linear.outputs) for layer in network.layers for linear in layer.linears)
        attention = [layer.attention for layer in network.layers]
        return cls(
            name,
            tuple(sizes.items()),
            (network.lm_head.inputs, network.lm_head.outputs),
            sum(2 * each.kv_width for each in attention),
            sum(each.q_width for each in attention),
        )

    @property
    def weights(self) -> int:
        """Bytes of the Linears in int8."""
        return sum(count * inputs * outputs for (inputs, outputs), count in self.linears) + math.prod(self.lm_head)

    @property
    def num_linears(self) -> int:
        return sum(count for _, count in self.linears) + 1


@dataclass(frozen=True)
class Costs:
    """What the TEE's own work takes of one core.

    Units: nanoseconds a word of m or y, two vectors; multiplications and operations a second.

    Attributes:
        check_ns: a row's words to integers, checked, and made floats, where there are several rows.
        lone_check_ns: the same where there is one row.
        pad_ns: a pad's words drawn, subtracted and taken away again.
        digit_macs_per_s: of one int8 digit, many rows.
        pad_macs_per_s: of a pad with a weight, which are four digits.
        attention_flops_per_s: over many rows.
        splits_rows: whether all cores share one row's words; where not, as `native/field/check.cpp` does it.
    """

    check_ns: float
    lone_check_ns: float
    pad_ns: float
    digit_macs_per_s: float
    pad_macs_per_s: float
    attention_flops_per_s: float
    splits_rows: bool = False


@dataclass(frozen=True)
class Machine:
    """Units: bytes, multiplications (one int8 with one int8) and seconds.

    Attributes:
        cores: of the TEE's machine.
        digit_macs_per_s: of one core, where it is not as `Costs` has it.
        gpu: its name.
        round_trip_s: a submission and its completion, beside the work itself.
        tee_cores: what the TEE process computes with beside a GPU process; None: all.
        gpu_cores: of the TEE's machine, what a GPU process without a device of its own takes while it works.
    """

    name: str
    cores: int
    memory_bytes_per_s: float
    gpu: str
    gpu_bytes: float
    gpu_bytes_per_s: float
    gpu_macs_per_s: float
    bus_bytes_per_s: float
    round_trip_s: float
    digit_macs_per_s: float | None = None
    tee_cores: int | None = None
    gpu_cores: int = 0

    def costs(self, measured: Costs) -> Costs:
        """Of its cores: what was measured, but for multiplications where these are others'."""
        if self.digit_macs_per_s is None:
            return measured
        faster = self.digit_macs_per_s / measured.digit_macs_per_s
        return Costs(
            **{
                **vars(measured),
                "digit_macs_per_s": self.digit_macs_per_s,
                "pad_macs_per_s": measured.pad_macs_per_s * faster,
            }
        )


@dataclass(frozen=True)
class Work:
    """One pass: a prompt of so many rows, or a row of each sequence at so many positions."""

    rows: int
    context: int = 0

    @property
    def is_prompt(self) -> bool:
        return self.context == 0

    @property
    def head_rows(self) -> int:
        return 1 if self.is_prompt else self.rows

    def multiplications(self, shape: ModelShape) -> float:
        """Of activations with weights."""
        of_layers = sum(count * inputs * outputs for (inputs, outputs), count in shape.linears)
        return self.rows * of_layers + self.head_rows * math.prod(shape.lm_head)

    def words(self, shape: ModelShape) -> float:
        """Of all m and y."""
        of_layers = sum(count * sum(sizes) for sizes, count in shape.linears)
        return self.rows * of_layers + self.head_rows * sum(shape.lm_head)

    def attention_operations(self, shape: ModelShape) -> float:
        """Of a prompt: scores and context, a multiplication and an addition each, for every pair of a row and a key
        that it sees."""
        return 4 * shape.q_width * self.rows * (self.rows + 1) / 2


class Forecast(NamedTuple):
    """Seconds that a pass takes; infinite where the model does not fit the GPU.

    Attributes:
        stocked: blinded, with a pad in stock for every row.
        sustained: blinded, with pads made meanwhile and none before.
    """

    tee_only: float
    verified: float
    stocked: float
    sustained: float


def forecast(shape: ModelShape, machine: Machine, measured: Costs, work: Work) -> Forecast:
    """What a pass takes in each mode."""
    costs = machine.costs(measured)
    tee_cores = machine.tee_cores or machine.cores
    check_ns = costs.lone_check_ns if work.rows == 1 else costs.check_ns

    def rows_s(ns: float, cores: int) -> float:
        return ns * 1e-9 * _words_a_core(shape, work, cores, splits_rows=costs.splits_rows)

    multiplied_s = _CLEAR_DIGITS * work.multiplications(shape) / (machine.cores * costs.digit_macs_per_s)
    products_s = max(shape.weights / machine.memory_bytes_per_s, multiplied_s)
    tee_only = products_s + _attention_s(shape, machine, costs, work, machine.cores) + rows_s(check_ns, machine.cores)
    if shape.weights > machine.gpu_bytes:
        return Forecast(tee_only, math.inf, math.inf, math.inf)

    attention_s = _attention_s(shape, machine, costs, work, tee_cores)
    bus_s = _WORD_BYTES * work.words(shape) / machine.bus_bytes_per_s

    def beside_gpu(digits: int, ns: float) -> tuple[float, float]:
        """The time, and the processor time of all cores."""
        gpu_s = max(
            shape.weights / machine.gpu_bytes_per_s,
            digits * work.multiplications(shape) / machine.gpu_macs_per_s,
        )
        tee_s = attention_s + rows_s(ns, tee_cores)
        parts = (gpu_s, bus_s, tee_s)
        whole_s = max(parts) if work.is_prompt else sum(parts) + shape.num_linears * machine.round_trip_s
        spent_s = attention_s * tee_cores + ns * 1e-9 * work.words(shape) + gpu_s * machine.gpu_cores
        return whole_s, spent_s

    verified, _ = beside_gpu(_CLEAR_DIGITS, check_ns)
    stocked, spent_s = beside_gpu(_BLINDED_DIGITS, check_ns + costs.pad_ns)
    pads_s = work.multiplications(shape) / costs.pad_macs_per_s
    return Forecast(tee_only, verified, stocked, max(stocked, (pads_s + spent_s) / machine.cores))


def _attention_s(shape: ModelShape, machine: Machine, costs: Costs, work: Work, cores: int) -> float:
    """A prompt's by its arithmetic, a token's by the keys and values that are read."""
    if work.is_prompt:
        return work.attention_operations(shape) / (cores * costs.attention_flops_per_s)
    return _CACHE_BYTES * work.rows * work.context * shape.kv_width / machine.memory_bytes_per_s


def _words_a_core(shape: ModelShape, work: Work, cores: int, *, splits_rows: bool) -> float:
    """Of the core that has the most of them, of each Linear."""
    if splits_rows:
        return work.words(shape) / cores

    def of(rows: int, inputs: int, outputs: int) -> float:
        tasks = math.ceil(rows / _TASK_ROWS)
        pieces = math.ceil(outputs / _TASK_WORDS)
        return rows * (inputs / min(cores, tasks) + outputs / min(cores, tasks * pieces))

    of_layers = sum(count * of(work.rows, *sizes) for sizes, count in shape.linears)
    return of_layers + of(work.head_rows, *shape.lm_head)
