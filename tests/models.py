"""Small random models, what transformers computes with them, and `LLM`s on them that start at once."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config
from transformers.utils import logging as transformers_logging

from tsqp_shm import LLM
from tsqp_shm.config import EngineConfig
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.outputs import RequestOutput
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.transport import Hold
from tsqp_shm.tee.runtime import Runtime

# Progress bars, and remarks on rotary factors that are chosen to be odd.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

CONFIG_CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}

# Odd on purpose: whole words, but no width is a multiple of a vector's, and hidden_size is not heads * head_dim.
GEOMETRY = {
    "vocab_size": 257,
    "hidden_size": 72,
    "intermediate_size": 132,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class RandomModel:
    """A random checkpoint to be written.

    Attributes:
        fields: of the config, over `GEOMETRY`.
        stored_as: dtype of the safetensors files; the values are bfloat16's in any case.
        old_rope_form: `rope_theta` and `rope_scaling` instead of `rope_parameters`.
        shards: write the weights in several files.
    """

    family: str
    fields: dict[str, Any] = field(default_factory=dict)
    stored_as: str = "bfloat16"
    old_rope_form: bool = False
    shards: bool = False

    def write(self, folder: Path) -> Path:
        """Writes the folder as save_pretrained does. Its weights depend on the config's shapes only."""
        fields = {**GEOMETRY, **self.fields}
        model = AutoModelForCausalLM.from_config(CONFIG_CLASSES[self.family](**fields))
        _randomise(model)
        # Small, because many tests write one; large enough for every tensor to be whole in its shard.
        limits = {"max_shard_size": "60KB"} if self.shards else {}
        model.to(getattr(torch, self.stored_as)).save_pretrained(folder, **limits)
        if self.old_rope_form:
            edit_config(folder, _into_old_rope_form)
        return folder


def edit_config(folder: Path, edit: Any) -> None:
    """Rewrites config.json by a function that changes its content in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def _into_old_rope_form(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope


def _randomise(model: torch.nn.Module) -> None:
    """Weights that keep activations near 1 and make every bias and norm weight count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                values = 1 + 0.3 * values
            elif name.endswith("bias"):
                values = 0.5 * values
            elif "embed_tokens" not in name:
                values = values * parameter.shape[1] ** -0.5
            # Representable in bfloat16, so that a bfloat16 model has the weights of a float32 one.
            parameter.copy_(values.to(torch.bfloat16))


@functools.cache
def transformers_model(folder: Path, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@functools.cache
def transformers_logits(
    folder: Path, token_ids: tuple[int, ...], dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> np.ndarray:
    """Shapes: [T, V] f32."""
    with torch.inference_mode():
        logits = transformers_model(folder, dtype, attention)(torch.tensor([token_ids])).logits[0]
    return logits.float().numpy()


def greedy_of_transformers(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Completions of prompts of one length, an ending end-of-sequence token included."""
    model = transformers_model(folder, torch.float32, "eager")
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        sequences = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=model.config.pad_token_id or 0,
        )
    completions = sequences[:, ids.shape[1] :].tolist()
    eos = model.generation_config.eos_token_id
    return [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in completions]


def token_ids(outputs: Iterable[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def random_token_ids(count: int, vocab_size: int = 257, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, vocab_size, count).tolist())


# What a GPU process may compute on, as parameters of a fixture.
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# Imports torch once; each line on stdin is then a GPU process, forked before torch has started a thread.
_GPU_SERVER = """
import json, os, signal, sys, traceback
from pathlib import Path
from tsqp_shm.config import EngineConfig
from tsqp_shm.gpu.worker import serve, use_threads
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.protocol import SubmissionRules
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
accept = SubmissionRules.accept
def accept_or_die(rules, submission):
    record = accept(rules, submission)
    if int.from_bytes(submission[:8], "little") == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return record
for line in sys.stdin:
    if os.fork() == 0:
        arguments = json.loads(line)
        dies_at = arguments.pop("dies_at")
        if dies_at:
            SubmissionRules.accept = accept_or_die
        try:
            model, transport = Path(arguments.pop("model")), PosixTransport(arguments.pop("session"))
            use_threads(arguments.pop("gpu_threads"))
            serve(model, transport, EngineConfig(timeout_s=30, **arguments), len, int)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
"""


class FastStart:
    """Starts LLMs whose GPU processes are forked from one that has already imported torch."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = subprocess.Popen(
            [sys.executable, "-c", _GPU_SERVER],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
        )
        self._names = (f"fast{os.getpid()}-{number}" for number in itertools.count())

    def llm(self, model: Path, *, gpu_threads: int = 1, pinning: str = "auto", **config: Any) -> LLM:
        start_gpu = functools.partial(self.start_gpu, model, gpu_threads=gpu_threads, pinning=pinning)
        return LLM(model, start_gpu=start_gpu, session=next(self._names), timeout_s=30.0, **config)

    @contextlib.contextmanager
    def runtime(self, model: Path, **config: Any) -> Iterator[Runtime]:
        """A session whose steps the test runs itself, by `step`."""
        settings = EngineConfig(session=next(self._names), timeout_s=30.0, **config)
        with Checkpoint.open(model) as checkpoint:
            start_gpu = functools.partial(self.start_gpu, model)
            transport = PosixTransport(settings.session)
            runtime = Runtime(ModelSpec.from_folder(model), checkpoint, settings, transport, start_gpu)
        with contextlib.closing(runtime):
            runtime.open()
            yield runtime

    def start_gpu(
        self, model: Path, session: Hold, *, gpu_threads: int = 1, pinning: str = "auto", dies_at: int = 0
    ) -> None:
        """A GPU process that is nobody's child: an LLM sees its death by its heartbeat alone.

        Args:
            dies_at: the number of the submission at which it kills itself; 0: none.
        """
        order = {"model": str(model), "session": session.name, "gpu_threads": gpu_threads, "dies_at": dies_at}
        order |= {"device": self._device, "pinning": pinning}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def fast_start(device: str = "cpu") -> Iterator[FastStart]:
    starter = FastStart(device)
    try:
        yield starter
    finally:
        starter.close()


@functools.cache
def _cache_folder() -> tempfile.TemporaryDirectory[str]:
    # Removed at the interpreter's exit.
    return tempfile.TemporaryDirectory(prefix="tsqp-models")


_written: dict[str, Path] = {}


def model_folder(model: RandomModel) -> Path:
    """The folder of a model that no test changes, written at its first use in this run."""
    key = repr(model)
    if key not in _written:
        _written[key] = model.write(Path(_cache_folder().name) / f"model{len(_written)}")
    return _written[key]


def with_tokenizer(folder: Path, tokenizer_of: Path) -> Path:
    """Gives a folder another model's tokenizer and chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_of / name).exists():
            (folder / name).write_bytes((tokenizer_of / name).read_bytes())
    return folder


def with_bytes_as_tokens(folder: Path) -> Path:
    """Gives a folder a tokenizer in which each byte is a token, so that any text can be said and counted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def relative_distance(logits: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, in standard deviations of the true logits."""
    return float(np.abs(logits - truth).max() / truth.std())


def rms_distance(logits: np.ndarray, truth: np.ndarray) -> float:
    """The root mean square difference, in standard deviations of the true logits."""
    return float(np.sqrt(np.mean((logits - truth) ** 2)) / truth.std())


def pooled(distances: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(distances))))
