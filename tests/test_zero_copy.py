"""Zero copy, shown: one process writes a slot, the other computes on the same physical bytes; 64 bytes pass for it."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from arenas import attach_arena, new_arena
from models import RandomModel, model_folder, random_token_ids

from tsqp_shm import SamplingParams, _native
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.weights import LinearWeights
from tsqp_shm.model.weights import bfloat16_to_float32, float32_to_bfloat16
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix import session
from tsqp_shm.shm.posix.handshake import NONCE_BYTES, PROOF_BYTES
from tsqp_shm.shm.posix.stream import ZmqStream
from tsqp_shm.shm.slots import open_slots

ROWS, HIDDEN, FEED_FORWARD = 5, 24, 40
PLAN = Plan.of_slots(
    [
        ("gate_up", "bfloat16", 8, 2 * FEED_FORWARD),
        ("act", "bfloat16", 8, FEED_FORWARD),
        ("hidden", "bfloat16", 8, HIDDEN),
    ],
)
GATE_UP, ACT, OUT = PLAN.slots


def arena_name() -> str:
    return f"/tsqp-shm-{os.geteuid()}-zero-copy-{os.getpid()}"


def place_in_memory(address: int) -> tuple[str, int, int]:
    """The shared-memory object behind an address of this process: device and inode, and the offset in it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return device, int(inode), int(offset, 16) + address - start
    raise AssertionError(f"{address:#x} is not mapped")


def send(pipe: int, value: object) -> None:
    os.write(pipe, f"{value!r}\n".encode())


def receive(pipe: int) -> str:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(pipe, 1)
        assert byte, "the other process has ended"
        line += byte
    return line.decode().rstrip()


def test_a_kernels_output_is_the_linears_input_and_its_output_the_next_kernels_input(forked):
    """TEE in a forked child, which runs no torch; GPU process here."""
    gate_up = np.random.default_rng(1).normal(0, 1, (ROWS, 2 * FEED_FORWARD)).astype(np.float32)
    to_tee, from_gpu = os.pipe()
    to_gpu, from_tee = os.pipe()
    name = arena_name()

    def tee() -> None:
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            arena.publish()
            act, hidden = slots.view(ACT), slots.view(OUT)
            send(from_tee, [place_in_memory(view.__array_interface__["data"][0]) for view in (act, hidden)])
            assert receive(to_tee) == "'looked'"
            _native.store_rows(slots.table, GATE_UP.index, 0, ROWS, gate_up)
            _native.silu_mul(slots.table, GATE_UP.index, ACT.index, 0, ROWS)
            send(from_tee, act[:ROWS].tolist())
            computed = receive(to_tee)
            result = np.empty((ROWS, HIDDEN), np.float32)
            _native.load_rows(slots.table, OUT.index, 0, ROWS, result)
            send(from_tee, result.tolist())
            assert computed == repr(hidden[:ROWS].tolist())
            receive(to_tee)

    child = forked(tee)
    os.close(from_tee)
    places = receive(to_gpu)
    with attach_arena(name, PLAN) as arena:
        device = Device(torch.device("cpu"), arena)
        # Taken before the kernel runs: what it shows later was never fetched.
        act = device.input(ACT, 0, (ROWS, FEED_FORWARD))
        hidden = device.output(OUT, 0, (ROWS, HIDDEN))
        assert repr([place_in_memory(tensor.data_ptr()) for tensor in (act, hidden)]) == places
        assert (act == 0).all()
        send(from_gpu, "looked")
        written = receive(to_gpu)
        assert repr(act.view(torch.uint16).tolist()) == written
        gate, up = bfloat16_to_float32(float32_to_bfloat16(gate_up)).reshape(ROWS, 2, FEED_FORWARD).swapaxes(0, 1)
        np.testing.assert_allclose(act.float().numpy(), gate / (1 + np.exp(-gate)) * up, rtol=2**-7, atol=1e-6)

        weight = torch.randn(HIDDEN, FEED_FORWARD, generator=torch.Generator().manual_seed(2)).bfloat16()
        before = hidden.data_ptr()
        LinearWeights(weight, None).apply(act, hidden)
        device.finish()
        assert hidden.data_ptr() == before
        send(from_gpu, hidden.view(torch.uint16).tolist())
        assert receive(to_gpu) == repr(hidden.float().tolist())
        send(from_gpu, "done")
        del act, hidden
        device.close()
    child.join()
    for pipe in (to_tee, from_gpu, to_gpu):
        os.close(pipe)


def test_every_slot_a_device_hands_out_lies_in_the_arena():
    with new_arena(PLAN, arena_name()) as arena:
        device = Device(torch.device("cpu"), arena)
        base = np.frombuffer(arena.buffer, np.uint8).__array_interface__["data"][0]
        for slot in PLAN.slots:
            for tensor in (
                device.input(slot, 0, (slot.num_rows, slot.row_elements)),
                device.output(slot, slot.row_elements, (1, slot.row_elements)),
            ):
                row = tensor.storage_offset() // slot.row_elements
                assert tensor.data_ptr() == base + slot.offset_bytes + row * slot.row_bytes
                assert tensor.is_contiguous()
        device.close()


class Wire:
    """A connection between two processes, read along: every byte of either direction is kept."""

    def __init__(self, near: Path, behind: Path) -> None:
        self._behind = str(behind)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(near))
        self._listening.listen()
        self.heard = (bytearray(), bytearray())
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def _forward(self) -> None:
        near, _ = self._listening.accept()
        far = socket.socket(socket.AF_UNIX)
        while True:
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                far.connect(self._behind)
                break
        with near, far:
            ways = {near: (far, self.heard[0]), far: (near, self.heard[1])}
            with contextlib.suppress(ConnectionError):
                while True:
                    for source in select.select(list(ways), [], [])[0]:
                        target, heard = ways[source]
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        heard += data
                        target.sendall(data)

    def close(self) -> None:
        self._thread.join()
        self._listening.close()

    def records(self) -> tuple[list[bytes], list[bytes]]:
        """From the GPU process, from the TEE."""
        return _records(bytes(self.heard[1])), _records(bytes(self.heard[0]))


def _records(stream: bytes) -> list[bytes]:
    assert len(stream) % layout.RECORD_BYTES == 0
    return [stream[at : at + layout.RECORD_BYTES] for at in range(0, len(stream), layout.RECORD_BYTES)]


@pytest.mark.parametrize("doorbell", ["zmq", "adaptive"])
def test_only_records_of_64_bytes_pass_through_the_socket(fast, doorbell, monkeypatch, runtime_folder):
    """All that goes through the socket is looked at, on the wire: at a path, as over TCP no relay gets between."""
    paths = [runtime_folder / secrets.token_hex(4) for _ in range(2)]
    wire = Wire(*paths)
    # The TEE rings at one end of the wire, and invites the GPU process to the other.
    near = f"ipc://{paths[0]}"
    monkeypatch.setattr(session, "ZmqStream", lambda endpoint, role, secret: ZmqStream(near, role, secret))
    folder = model_folder(RandomModel("llama"))
    options = {"doorbell": doorbell, "endpoint": f"ipc://{paths[1]}", "yield_us": 0, "spin_us": 0}
    with fast.llm(folder, max_model_len=300, **options) as llm:
        llm.generate([list(random_token_ids(250)), [1]], SamplingParams(max_tokens=4, temperature=0))
        stats = llm.stats()
    wire.close()

    # What the two have said first is as long as a record.
    assert NONCE_BYTES + PROOF_BYTES == layout.RECORD_BYTES
    from_gpu, from_tee = (records[1:] for records in wire.records())
    epochs = {record[8:16] for record in from_gpu + from_tee}
    assert len(epochs) == 1, "something else than a record of this session"
    # Where the record lies in the ring, the socket only wakes.
    assert (epochs == {bytes(8)}) == (doorbell == "adaptive")
    # Two records a doorbell, there and back, and STOP, which was rung after the statistics were taken.
    rung = stats["doorbell"]["rung"] + 1
    if doorbell == "zmq":
        assert len(from_gpu) == len(from_tee) == rung
    else:
        assert 0 < len(from_gpu) <= rung
        assert 0 < len(from_tee) <= rung
    on_the_wire = sum(map(len, wire.heard)) - 2 * layout.RECORD_BYTES
    in_slots = stats["bytes"]["to_gpu"] + stats["bytes"]["to_tee"]
    assert on_the_wire <= 2 * rung * layout.RECORD_BYTES
    assert in_slots > 20 * on_the_wire
    assert stats["bytes"]["serialised"] == 0


def test_nothing_is_allocated_in_the_arena_while_a_model_runs(fast):
    with fast.llm(model_folder(RandomModel("llama")), max_model_len=300) as llm:
        path = Path("/dev/shm") / llm.stats()["arena"]["name"].lstrip("/")
        before = path.stat()
        llm.generate([list(random_token_ids(250))], SamplingParams(max_tokens=4, temperature=0))
        after = path.stat()
        assert (before.st_ino, before.st_size, before.st_blocks) == (after.st_ino, after.st_size, after.st_blocks)
        # Backed in full from the beginning.
        assert before.st_blocks * 512 >= before.st_size == llm.stats()["arena"]["bytes"]
