#!/usr/bin/env python3
"""The split by RPC, as a baseline for `tsqp-shm bench prefill --vs serialized`: the way of the first such system.

Two processes, everything in float32. The client (the TEE) does the norms, the rotary embedding, the causal softmax and
SiLU; the server does the embedding, every Linear and the attention products. One call per operation over ZeroMQ
REQ/REP, operands and results packed by msgpack as {"shape", "dtype", "data"}; K and V are expanded to all heads, and
score matrices are whole: [H, T, T]. It has one correction: the first system left the causal mask out.

There is no KV cache, so it prefills and does not decode. It is started by `tsqp-shm bench`, which tells it its job.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

from tsqp_shm.bench.cases import Job, Turn
from tsqp_shm.bench.child import Answer, measured, serve
from tsqp_shm.errors import ContenderFailed
from tsqp_shm.model.rope import rope_tables
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint

# As that system grouped its calls: 98 of them, and 6,985 MiB, for 1,024 tokens of a 16-layer Llama-3.2-1B.
QKV_CALLS = (("q_proj", "k_proj", "v_proj"),)
GATE_UP_CALLS = (("gate_proj", "up_proj"),)
# By which names the report knows them: those of the product's operations.
OPERATIONS = {
    "embed": "EMBED",
    "q_proj": "QKV",
    "k_proj": "QKV",
    "v_proj": "QKV",
    "QK": "SCORES",
    "PV": "CONTEXT",
    "o_proj": "CONTEXT",
    "gate_proj": "GATE_UP",
    "up_proj": "GATE_UP",
    "down_proj": "DOWN",
    "lm_head": "LM_HEAD",
}
Tensor = torch.Tensor

# Nothing here writes into what it received, so no copy is made for torch's sake.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def pack(tensors: list[Tensor]) -> list[dict[str, Any]]:
    arrays = [tensor.cpu().contiguous().numpy() for tensor in tensors]
    return [{"shape": list(a.shape), "dtype": str(a.dtype), "data": a.tobytes()} for a in arrays]


def unpack(packed: list[dict[str, Any]]) -> list[Tensor]:
    arrays = [np.frombuffer(entry["data"], entry["dtype"]).reshape(entry["shape"]) for entry in packed]
    return [torch.from_numpy(array) for array in arrays]


class Server:
    """Weights and their products. Linear names are those of the checkpoint, without "model." and ".weight"."""

    def __init__(self, folder: Path, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        spec = ModelSpec.from_folder(folder)
        self.device = device
        if device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with Checkpoint.open(folder) as checkpoint:
            self._checkpoint = checkpoint
            hidden, inner = spec.hidden_size, spec.intermediate_size
            queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
            self._embedding = self._load("model.embed_tokens.weight", spec.vocab_size, hidden)
            self._linears: dict[str, tuple[Tensor, Tensor | None]] = {}
            head = self._embedding
            if not spec.tie_word_embeddings:
                head = self._load("lm_head.weight", spec.vocab_size, hidden)
            self._linears["lm_head"] = head, None
            for layer in range(spec.num_layers):
                for name, rows, columns, has_bias in (
                    ("self_attn.q_proj", queries, hidden, spec.qkv_bias),
                    ("self_attn.k_proj", keys, hidden, spec.qkv_bias),
                    ("self_attn.v_proj", keys, hidden, spec.qkv_bias),
                    ("self_attn.o_proj", hidden, queries, spec.o_bias),
                    ("mlp.gate_proj", inner, hidden, spec.mlp_bias),
                    ("mlp.up_proj", inner, hidden, spec.mlp_bias),
                    ("mlp.down_proj", hidden, inner, spec.mlp_bias),
                ):
                    full = f"layers.{layer}.{name}"
                    bias = self._load(f"model.{full}.bias", rows) if has_bias else None
                    self._linears[full] = self._load(f"model.{full}.weight", rows, columns), bias

    def _load(self, name: str, *shape: int) -> Tensor:
        values = self._checkpoint.tensor(name, shape).to_float32()
        return torch.from_numpy(np.array(values, np.float32)).to(self.device)

    def run(self, operation: str, names: list[str], operands: list[Tensor]) -> list[Tensor]:
        operands = [operand.to(self.device) for operand in operands]
        if operation == "embed":
            return [self._embedding[operands[0]]]
        if operation == "matmul":
            return [operands[0] @ operands[1]]
        return [torch.nn.functional.linear(operands[0], *self._linears[name]) for name in names]


def run_server(endpoint: str, folder: str, threads: str, device: str, lifeline: str) -> int:
    server = Server(Path(folder), int(threads), device)
    with zmq.Context() as context, context.socket(zmq.REP) as replies, torch.inference_mode():
        replies.setsockopt(zmq.LINGER, 0)
        replies.bind(endpoint)
        poller = zmq.Poller()
        poller.register(replies, zmq.POLLIN)
        # Its other end closes with the client, however that ends.
        poller.register(int(lifeline), zmq.POLLIN)
        while int(lifeline) not in (ready := dict(poller.poll())):
            assert replies in ready
            message = replies.recv()
            started_ns = time.perf_counter_ns()
            request = msgpack.unpackb(message)
            operands = unpack(request["operands"])
            computing_ns = time.perf_counter_ns()
            results = server.run(request["operation"], request["names"], operands)
            busy_ns = time.perf_counter_ns() - computing_ns
            reply = {"results": pack(results), "busy_ns": busy_ns, "device": server.device}
            packed = msgpack.packb(reply)
            # Beside the reply and not in it: packing the reply is a part of it.
            handling_ns = time.perf_counter_ns() - started_ns - busy_ns
            replies.send_multipart([packed, handling_ns.to_bytes(8, "little")], copy=False)
    return 0


class Serialized:
    """The client, and a contender of `tsqp-shm bench`."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        torch.set_num_threads(job.threads)
        stack.enter_context(torch.inference_mode())
        self._job = job
        folder = Path(job.model)
        self._spec = spec = ModelSpec.from_folder(folder)
        if any(spec.windows):
            raise ContenderFailed(job.contender, "it has no sliding window, and this model has one")
        with Checkpoint.open(folder) as checkpoint:

            def norm(name: str) -> Tensor:
                return torch.from_numpy(checkpoint.tensor(f"model.{name}.weight", (spec.hidden_size,)).to_float32())

            self._norms = {"norm": norm("norm")}
            for layer in range(spec.num_layers):
                for name in ("input_layernorm", "post_attention_layernorm"):
                    self._norms[f"layers.{layer}.{name}"] = norm(f"layers.{layer}.{name}")
        cos, sin = rope_tables(spec.rope, spec.head_dim, job.max_positions)
        self._cos, self._sin = torch.from_numpy(cos), torch.from_numpy(sin)

        endpoint = f"ipc://{stack.enter_context(tempfile.TemporaryDirectory(prefix='tsqp-shm-rpc-'))}/rpc"
        # Left in reverse: the sockets, then the lifeline, whose end the server sees, then the wait for the server.
        theirs, ours = os.pipe()
        server = [endpoint, job.model, str(job.threads), job.device, str(theirs)]
        self._server = subprocess.Popen([sys.executable, __file__, "--server", *server], pass_fds=[theirs])
        stack.callback(self._server.wait)
        os.close(theirs)
        stack.callback(os.close, ours)
        context = stack.enter_context(zmq.Context())
        self._requests = stack.enter_context(context.socket(zmq.REQ))
        self._requests.setsockopt(zmq.LINGER, 0)
        self._requests.connect(endpoint)
        self._start_counting()
        self.device = ""
        self._call("embed", [], [torch.zeros(1, dtype=torch.int64)])
        self.processes = {"client": os.getpid(), "server": self._server.pid}

    def repeat(self, turn: Turn) -> Answer:
        token_ids = torch.tensor(turn.prompts(self._spec.vocab_size)[0])
        answer: Answer = {}
        self._start_counting()
        with measured(self.processes, answer):
            self.forward(token_ids)
        operations = [
            {"side": side, "operation": name, "calls": calls, "total_s": total_ns / 1e9}
            for (side, name), (calls, total_ns) in self._tallies.items()
        ]
        moved = {"bytes_to_gpu": self._bytes_sent, "bytes_to_tee": self._bytes_received, "doorbells": self._calls}
        return {**answer, **moved, "operations": operations, "tokens": len(token_ids)}

    def forward(self, token_ids: Tensor) -> Tensor:
        """Shapes: token_ids [T]; the logits of the last row, [V]."""
        spec, tokens = self._spec, len(token_ids)
        (residual,) = self._call("embed", [], [token_ids])
        for layer in range(spec.num_layers):
            prefix = f"layers.{layer}"
            x = self._rms_norm(residual, f"{prefix}.input_layernorm")
            q, k, v = (self._heads(rows) for rows in self._linears(f"{prefix}.self_attn", QKV_CALLS, x))
            q, k = self._rope(q), self._rope(k)
            group = spec.num_heads // spec.num_kv_heads
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            (scores,) = self._call("matmul", ["QK"], [q, k.transpose(1, 2)])
            probs = self._softmax(scores)
            (context,) = self._call("matmul", ["PV"], [probs, v])
            context = context.transpose(0, 1).reshape(tokens, -1)
            (delta,) = self._linears(f"{prefix}.self_attn", (("o_proj",),), context)
            residual = residual + delta
            x = self._rms_norm(residual, f"{prefix}.post_attention_layernorm")
            gate, up = self._linears(f"{prefix}.mlp", GATE_UP_CALLS, x)
            (delta,) = self._linears(f"{prefix}.mlp", (("down_proj",),), self._silu_mul(gate, up))
            residual = residual + delta
        last = self._rms_norm(residual[-1:], "norm")
        (logits,) = self._call("linear", ["lm_head"], [last])
        return logits[0]

    def _start_counting(self) -> None:
        self._calls = self._bytes_sent = self._bytes_received = 0
        self._tallies: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def _count(self, side: str, name: str, duration_ns: int) -> None:
        tally = self._tallies[side, name]
        tally[0] += 1
        tally[1] += duration_ns

    def _linears(self, prefix: str, calls: tuple[tuple[str, ...], ...], x: Tensor) -> list[Tensor]:
        return [
            result for names in calls for result in self._call("linear", [f"{prefix}.{name}" for name in names], [x])
        ]

    def _call(self, operation: str, names: list[str], operands: list[Tensor]) -> list[Tensor]:
        started_ns = time.perf_counter_ns()
        message = msgpack.packb({"operation": operation, "names": names, "operands": pack(operands)})
        self._requests.send(message, copy=False)
        sent_ns = time.perf_counter_ns()
        while not self._requests.poll(200):
            if self._server.poll() is not None:
                raise ContenderFailed(self._job.contender, f"its server ended with exit code {self._server.returncode}")
        received_ns = time.perf_counter_ns()
        packed, handling = self._requests.recv_multipart()
        reply = msgpack.unpackb(packed)
        results = unpack(reply["results"])
        self._calls += 1
        self._bytes_sent += len(message)
        self._bytes_received += len(packed)
        self.device = reply["device"]
        self._count("gpu", OPERATIONS[names[0].rpartition(".")[2] if names else operation], reply["busy_ns"])
        self._count("gpu", "SERIALISE", int.from_bytes(handling, "little"))
        self._count("tee", "SERIALISE", time.perf_counter_ns() - started_ns - (received_ns - sent_ns))
        return results

    def _heads(self, rows: Tensor) -> Tensor:
        """[T, N*D] -> [N, T, D]."""
        return rows.view(len(rows), -1, self._spec.head_dim).transpose(0, 1)

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        started_ns = time.perf_counter_ns()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self._spec.rms_norm_eps)
        result = x * scale * self._norms[name]
        self._count("tee", "RMSNORM", time.perf_counter_ns() - started_ns)
        return result

    def _rope(self, x: Tensor) -> Tensor:
        started_ns = time.perf_counter_ns()
        low, high = x.chunk(2, -1)
        cos, sin = self._cos[: x.shape[-2]], self._sin[: x.shape[-2]]
        result = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        self._count("tee", "ROPE", time.perf_counter_ns() - started_ns)
        return result

    def _softmax(self, scores: Tensor) -> Tensor:
        started_ns = time.perf_counter_ns()
        tokens = scores.shape[-1]
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scaled = (scores * self._spec.head_dim**-0.5).masked_fill(future, float("-inf"))
        result = torch.softmax(scaled, -1)
        self._count("tee", "SOFTMAX", time.perf_counter_ns() - started_ns)
        return result

    def _silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        started_ns = time.perf_counter_ns()
        result = torch.nn.functional.silu(gate) * up
        self._count("tee", "SILU", time.perf_counter_ns() - started_ns)
        return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--server"]:
        sys.exit(run_server(*sys.argv[2:]))
    if len(sys.argv) != 3:
        from script_flags import ScriptParser

        parser = ScriptParser(__doc__)
        parser.parse_args()
        parser.error("it is started by: tsqp-shm bench prefill --vs serialized")
    sys.exit(serve(Serialized))
