"""Settings as frozen values: what a user may choose, its default, and what is allowed.

Command line and Python API read their defaults from here; `TSQP_SHM_*` environment variables lie between the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from tsqp_shm.arguments import refuse_unknown
from tsqp_shm.errors import ConfigError
from tsqp_shm.modes import MODES
from tsqp_shm.pad_stock import Stock
from tsqp_shm.scalars import flag, real, text, whole

DTYPES = ("bfloat16", "float32")
PINNINGS = ("auto", "registered", "staged", "pageable")
DOORBELLS = ("adaptive", "zmq", "spin")
# Where a product is computed for which there is no pad, and where prompts are.
PADS_OUT = ("tee", "wait", "refuse")
PREFILLS = ("auto", "gpu", "tee")
CHOICES = {
    "mode": tuple(MODES),
    "pinning": PINNINGS,
    "dtype": DTYPES,
    "doorbell": DOORBELLS,
    "pads_out": PADS_OUT,
    "prefill": PREFILLS,
}
# What vLLM, transformers and llama.cpp call a setting.
NAMES_HERE = {
    "max_num_batched_tokens": "max_batch_tokens",
    "max_seq_len": "max_model_len",
    "max_context_len": "max_model_len",
    "n_ctx": "max_model_len",
    "torch_dtype": "dtype",
    "device_map": "device",
    "timeout": "timeout_s",
    "num_threads": "tee_threads and gpu_threads",
    "n_threads": "tee_threads and gpu_threads",
}
MAX_WAIT_US = 10_000_000
# Of the native thread pool.
MAX_THREADS = 256
SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
# Where a model states no shorter limit; longer is asked for, because cache and score slots grow with it.
DEFAULT_MAX_MODEL_LEN = 4096
# Each block of rows reads a layer's weights once. Where they are many, larger blocks win over more overlap
# (docs/performance.md).
BLOCK_ROWS = 384
# Where every product comes back to be checked, a block's results are to stay near the core that reads them.
CHECKED_BLOCK_ROWS = 128
LARGE_LAYER_BLOCK_ROWS = 1024
LARGE_LAYER_PARAMETERS = 8 << 20


@dataclass(frozen=True)
class Limits:
    """What the geometry of arena and caches is derived from, beside the model.

    Attributes:
        dtype: element type of the slots and of the GPU process's arithmetic; float32 where the mode has its own.
        max_model_len: longest sequence, prompt and completion together, in tokens.
        max_num_seqs: sequences whose caches exist at once.
        max_batch_tokens: most tokens in one forward pass; longer prompts are prefilled in chunks.
        tile_rows: query rows in one attention tile.
        tiles_in_flight: score slots, so tiles that the two processes work on at once.
        block_rows: rows that go through the layers together; a longer batch keeps both processes busy at once.
        mode: of `modes.MODES`; what crosses, and so which slots there are.
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    tile_rows: int
    tiles_in_flight: int
    block_rows: int = BLOCK_ROWS
    mode: str = "plain"

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, tuple(MODES))
        require_choice("dtype", self.dtype, DTYPES)
        require_range("max_model_len", self.max_model_len, 1, 1 << 20)
        require_range("max_num_seqs", self.max_num_seqs, 1, 1024)
        require_range("max_batch_tokens", self.max_batch_tokens, 1, 1 << 20)
        require_range("tile_rows", self.tile_rows, 1, 4096)
        require_range("tiles_in_flight", self.tiles_in_flight, 2, 16)
        require_range("block_rows", self.block_rows, 1, 1 << 20)
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError("max_batch_tokens", self.max_batch_tokens, f"at least max_num_seqs ({self.max_num_seqs})")

    @property
    def arithmetic(self) -> str:
        """What products and cache are computed in, in words."""
        return MODES[self.mode].arithmetic or self.dtype


class Threads(NamedTuple):
    """Of the TEE's kernels, and of a GPU process whose device is the CPU; 0 where the mode has none."""

    tee: int
    gpu: int


@dataclass(frozen=True)
class EngineConfig:
    """Everything a session is started with, beside the model.

    Units: times in seconds, but where the name says microseconds.
    """

    mode: str = "plain"
    device: str = "auto"
    pinning: str = "auto"
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_batch_tokens: int = 2048
    prefill_budget: int = 256
    prefix_reuse: bool | None = None
    tile_rows: int = 128
    tiles_in_flight: int = 3
    block_rows: int | None = None
    doorbell: str = "adaptive"
    spin_us: int = 2
    yield_us: int = 2000
    endpoint: str | None = None
    session: str | None = None
    timeout_s: float = 60.0
    restart_gpu: int = 0
    tee_threads: int | None = None
    gpu_threads: int | None = None
    check_finite: bool = False
    model_digest: str | None = None
    pad_stock: str | None = None
    pad_threads: int = 1
    pad_ready: int = 0
    pads_out: str = "tee"
    prefill: str = "auto"
    pad_prompt_to: int = 0
    lock_memory: bool = False

    def __post_init__(self) -> None:
        if whole(self.pad_stock) is not None:
            # A number of rows, as Python says it.
            object.__setattr__(self, "pad_stock", str(self.pad_stock))
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), str(field.type)))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError("device", self.device, "auto, cpu, cuda or cuda:N")
        for name, allowed in CHOICES.items():
            require_choice(name, getattr(self, name), allowed)
        self._refuse_untaken(field.name for field in fields(self) if getattr(self, field.name) != field.default)
        require_range("prefill_budget", self.prefill_budget, 0, 1 << 20)
        require_range("spin_us", self.spin_us, 0, MAX_WAIT_US)
        require_range("yield_us", self.yield_us, 0, MAX_WAIT_US)
        if not 0 < self.timeout_s <= 86400:
            raise ConfigError("timeout", self.timeout_s, "seconds, more than 0 and at most 86400")
        require_range("restart_gpu", self.restart_gpu, 0, 1_000_000)
        for name, highest in (("tee_threads", MAX_THREADS), ("gpu_threads", MAX_THREADS), ("block_rows", 1 << 20)):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 1, highest)
        if self.max_model_len is not None:
            require_range("max_model_len", self.max_model_len, 1, 1 << 20)
        if self.session is not None:
            require_session_name(self.session)
        if self.model_digest is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", self.model_digest):
            expected = "sha256: and 64 hexadecimal digits, as tsqp-shm inspect --digest prints it"
            raise ConfigError("model_digest", self.model_digest, expected)
        if self.endpoint is not None:
            require_endpoint(self.endpoint)
        self._require_pads()
        self._limits(self.max_model_len or 1, self.block_rows or BLOCK_ROWS)

    def _require_pads(self) -> None:
        if self.pad_stock is not None:
            Stock.parse(self.pad_stock)
        require_range("pad_threads", self.pad_threads, 0, MAX_THREADS)
        require_range("pad_ready", self.pad_ready, 0, 1 << 20)
        require_range("pad_prompt_to", self.pad_prompt_to, 0, 1 << 20)
        for name, chosen in (("pad_ready", self.pad_ready > 0), ("pads_out", self.pads_out == "wait")):
            if chosen and self.pad_threads == 0:
                raise ConfigError("pad_threads", 0, f"1 or more, as {name} waits for pads that somebody makes")

    @property
    def reuses_prefixes(self) -> bool:
        """Whether the next turn of a conversation goes on from the cache of the last one. How long what is new is shows
        to whoever sees lengths, so where that is all that shows it is not done unless somebody asks for it."""
        return not MODES[self.mode].has_pads if self.prefix_reuse is None else self.prefix_reuse

    def limits(self, max_positions: int, layer_parameters: int) -> Limits:
        """The limits for a model of so many positions, and of so many weights in a layer.

        Raises:
            ConfigError: max_model_len is longer than the model's positions.
        """
        length = self.max_model_len
        if length is None:
            length = min(max_positions, DEFAULT_MAX_MODEL_LEN)
        if length > max_positions:
            raise ConfigError("max_model_len", length, f"at most the model's {max_positions} positions")
        of_small_layers = CHECKED_BLOCK_ROWS if MODES[self.mode].num_vectors else BLOCK_ROWS
        block_rows = of_small_layers if layer_parameters <= LARGE_LAYER_PARAMETERS else LARGE_LAYER_BLOCK_ROWS
        return self._limits(length, self.block_rows or block_rows)

    def _limits(self, max_model_len: int, block_rows: int) -> Limits:
        return Limits(
            dtype=self.dtype if MODES[self.mode].arithmetic is None else "float32",
            max_model_len=max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            tile_rows=self.tile_rows,
            tiles_in_flight=self.tiles_in_flight,
            block_rows=block_rows,
            mode=self.mode,
        )

    def threads(self) -> Threads:
        """The numbers of threads, chosen or by default.

        The GPU process takes every core this process may use, the TEE half of them: while it works on one block of
        rows the GPU process works on another, and two whole sets would stand in each other's way
        (docs/performance.md). Without a GPU process the cores are the TEE's.
        """
        cores = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        if not MODES[self.mode].has_gpu_process:
            return Threads(self.tee_threads or cores, 0)
        return Threads(self.tee_threads or max(1, cores // 2), self.gpu_threads or cores)

    def gpu_arguments(self) -> list[str]:
        """What a GPU process is started with, whoever starts it; the rest it is told in the arena."""
        told = {"device": self.device, "pinning": self.pinning, "timeout": self.timeout_s}
        if self.gpu_threads is not None:
            told["gpu-threads"] = self.gpu_threads
        return [f"--{name}={value}" for name, value in told.items()]

    @classmethod
    def chosen(cls, config: object, settings: Mapping[str, Any], names_here: Mapping[str, str]) -> EngineConfig:
        """Settings over those of a config; without one, as `from_environment`.

        Args:
            names_here: what other arguments are called here, beside those of other libraries.

        Raises:
            ConfigError: it is no config, or a setting is not there or not allowed.
        """
        refuse_unknown(settings, tuple(cls.__dataclass_fields__), {**names_here, **NAMES_HERE})
        if config is None:
            return cls.from_environment(settings)
        if not isinstance(config, cls):
            raise ConfigError("config", config, "an EngineConfig", is_mistyped=True)
        chosen = replace(config, **settings)
        chosen._refuse_untaken(settings)
        return chosen

    @classmethod
    def from_environment(cls, overrides: Mapping[str, Any]) -> EngineConfig:
        """Defaults, then `TSQP_SHM_*` variables, then the overrides that are not None.

        A variable that the mode does not take is passed over: it is set for whatever is started there.

        Raises:
            ConfigError: a variable or an override is not a legal value, or the mode does not take an override.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        mode = text(given.get("mode", os.environ.get(environment_variable("mode"), cls.mode)))
        values: dict[str, Any] = {}
        for field in fields(cls):
            variable = environment_variable(field.name)
            words = os.environ.get(variable)
            if words is not None and (mode not in MODES or MODES[mode].refusal(field.name) is None):
                values[field.name] = _parse(variable, words, str(field.type))
        chosen = cls(**{**values, **given})
        chosen._refuse_untaken(given)
        return chosen

    def _refuse_untaken(self, names: Iterable[str]) -> None:
        """Raises:
        ConfigError: the mode does not take one of these settings, which somebody has chosen.
        """
        for name in names:
            expected = MODES[self.mode].refusal(name)
            if expected is not None:
                raise ConfigError(name.removesuffix("_s"), getattr(self, name), expected)


def environment_variable(field: str) -> str:
    """The variable of a field of `EngineConfig`, named as its flag is: --timeout, TSQP_SHM_TIMEOUT."""
    return f"TSQP_SHM_{field.removesuffix('_s').upper()}"


def _typed(field: str, value: object, kind: str) -> Any:
    """A value as Python's own of the type that a field has."""
    kind, _, or_none = kind.partition(" | ")
    if value is None and or_none:
        return None
    reads: dict[str, tuple[Callable[[object], Any], str]] = {
        "str": (text, "a string"),
        "int": (whole, "a whole number"),
        "float": (real, "a number"),
        "bool": (flag, "True or False"),
    }
    read, expected = reads[kind]
    typed = read(value)
    if typed is None:
        raise ConfigError(field, value, " or ".join(CHOICES.get(field, (expected,))), is_mistyped=True)
    return typed


def _parse(variable: str, words: str, kind: str) -> Any:
    if kind.startswith("str"):
        return words
    if kind.startswith("bool"):
        require_choice(variable, words, ("0", "1"))
        return words == "1"
    try:
        return float(words) if kind.startswith("float") else int(words)
    except ValueError:
        raise ConfigError(variable, words, "a number") from None


def require_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(field, value, " or ".join(allowed))


def require_range(field: str, value: int, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ConfigError(field, value, f"a whole number from {lowest} to {highest}")


def require_endpoint(endpoint: str) -> None:
    # Only this machine: a record names slots of an arena that no other machine maps. Printable: what is not cannot be
    # encoded as a path, or hides in a message. libzmq would take "@" for an abstract name, which any user can have
    # before us and no file mode keeps to one, and "*" for a path of its own choosing.
    parts = re.fullmatch(r"ipc://[^@*].*|tcp://127\.0\.0\.1:([0-9]{1,5})", endpoint)
    if not endpoint.isprintable() or not parts or not 1 <= int(parts[1] or 1) <= 65535:
        raise ConfigError("endpoint", endpoint, "ipc://PATH, which is no abstract name (@), or tcp://127.0.0.1:PORT")


def require_session_name(name: str) -> None:
    if not SESSION_NAME.fullmatch(name):
        raise ConfigError("session", name, "1 to 40 letters, digits, '.', '_' or '-', a letter or digit first")
