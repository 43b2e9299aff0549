"""The GPU process: attach, load, then execute submissions in their order until told to stop."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ArenaMismatch, DeviceError, ProtocolError
from tsqp_shm.gpu import _products
from tsqp_shm.gpu.device import Delivery, Device
from tsqp_shm.gpu.loading import Loaded, Operations
from tsqp_shm.gpu.modes import LOADERS
from tsqp_shm.gpu.open_device import open_device, resolve_device
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.printable import obeyed
from tsqp_shm.roles.process import peak_resident_bytes
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import Doorbell, open_doorbell
from tsqp_shm.shm.invitation import Invitation
from tsqp_shm.shm.layout import RING_DEPTH
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, PeerWatch
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Opcode, Status, SubmissionRules, pack_identity
from tsqp_shm.shm.transport import Transport
from tsqp_shm.trace.doorbell import ServingDoorbell
from tsqp_shm.trace.recorder import Recorder

# Between two operations of a layer the TEE process works for about this long at most.
POOL_PATIENCE_US = 200


# What torch raises where the device, and not a call, is at fault.
DEVICE_FAILURES = (getattr(torch, "AcceleratorError", torch.OutOfMemoryError), torch.OutOfMemoryError)


class _Running(NamedTuple):
    """A submission whose results are on their way."""

    submission: bytes
    started_ns: int
    value: int
    delivery: Delivery


class Worker:
    """Executes records. Whatever goes wrong, the TEE gets a completion that says so before this side ends."""

    def __init__(
        self,
        doorbell: Doorbell,
        watch: PeerWatch,
        rules: SubmissionRules,
        operations: Operations,
        device: Device,
    ) -> None:
        self._doorbell = doorbell
        self._watch = watch
        self._rules = rules
        self._device = device
        self._running: deque[_Running] = deque()
        self._completed_ns = 0
        # Those of the mode, and those of every one. The rules let no other through.
        self._execute: Operations = {
            Opcode.READY: lambda record: pack_identity(os.getpid(), device.torch_device.index, device.transfer),
            **operations,
            Opcode.STATUS: lambda record: peak_resident_bytes(),
            Opcode.STOP: lambda record: None,
        }
        assert set(self._execute) == set(rules.opcodes)

    def run(self) -> None:
        """Serves until STOP. The next operation begins before the results of those before it are in their slots, where
        the device allows it; they complete in their order.

        Raises:
            PeerDied: the TEE process is gone.
            ProtocolError: a submission is not allowed.
            DeviceError: the device failed.
        """
        opcode: int | None = None
        with torch.inference_mode():
            while opcode != Opcode.STOP or self._running:
                if self._running and self._complete_oldest():
                    continue
                submission = None if opcode == Opcode.STOP else self._next_submission()
                if submission is not None:
                    opcode = self._begin(submission)

    def _next_submission(self) -> bytes | None:
        if not self._running:
            return self._doorbell.receive(self._watch, None, "a submission")
        # UNTRUSTED: a peer that takes no completions fills its ring, and no memory here.
        return self._doorbell.take() if len(self._running) < RING_DEPTH else None

    def _begin(self, submission: bytes) -> int:
        started_ns = time.perf_counter_ns()
        try:
            record = self._rules.accept(submission)
            value = self._execute[record.opcode](record) or 0
            self._running.append(_Running(submission, started_ns, value, self._device.finish()))
        except Exception as error:
            # Those before it complete first, as the TEE waits for them in their order.
            while self._running:
                self._complete_oldest()
            raise self._refused(submission, error) from error
        return record.opcode

    def _complete_oldest(self) -> bool:
        submission, started_ns, value, delivery = self._running[0]
        try:
            is_complete = delivery.is_complete()
        except Exception as error:
            raise self._refused(submission, error) from error
        if not is_complete:
            self._watch.check()
            return False
        self._running.popleft()
        now_ns = time.perf_counter_ns()
        busy_ns = now_ns - max(started_ns, self._completed_ns)
        self._completed_ns = now_ns
        self._doorbell.complete(submission, Status.OK, busy_ns, value)
        return True

    def _refused(self, submission: bytes, error: Exception) -> Exception:
        """Tells the TEE. Returns what this process ends with."""
        status = Status.REJECTED if isinstance(error, ProtocolError) else Status.FAILED
        self._doorbell.complete(submission, status)
        if isinstance(error, DEVICE_FAILURES):
            return DeviceError(self._device.name, str(error).strip().splitlines()[0])
        return error


def use_threads(threads: int) -> None:
    """Sets how many threads this process computes with, for a process that plays this role alone: the setting is the
    whole process's, so where both roles are played in one it is not this role's to make."""
    torch.set_num_threads(threads)
    # Whichever of the two multiplies in the mode: a pool that has no work has no threads.
    for pool in (_products, _native):
        pool.set_num_threads(threads, POOL_PATIENCE_US)


def serve(
    model: Path,
    transport: Transport,
    config: EngineConfig,
    report: Callable[[str], None],
    on_ready: Callable[[], None],
    recorder: Recorder | None = None,
) -> None:
    """Plays the GPU role for one session.

    Args:
        model: a Hugging Face folder; must be the model that the TEE opens.
        transport: that of the TEE's session.
        config: what it says of the device, its pinning, and how long to wait for the TEE process; the rest is the
            TEE's to decide, but the threads, which are `use_threads`' to set.
        report: takes lines for the operator.
        on_ready: called when submissions are served.
        recorder: takes what this process does and when; None: nothing does.

    Raises:
        TsqpError: whatever keeps this role from working, one clear line each.
    """
    resolve_device(config.device)
    network = Network.of(ModelSpec.from_folder(model))
    with Checkpoint.open(model) as checkpoint:
        # Sizes are the config's word until the weights bear them out.
        checkpoint.require(network.tensors())
    with ExitStack() as stack:
        joined = stack.enter_context(closing(transport.join(config.timeout_s, report)))
        invitation = Invitation.parse(joined.invitation)
        plan = _own_plan(network, invitation, joined.name)
        arena = stack.enter_context(Arena.attach(joined.map_memory(plan.total_bytes), plan))
        # From here on the TEE notices a death, also while weights load.
        heartbeat = _native.Heartbeat(arena.buffer, "gpu", HEARTBEAT_INTERVAL_MS)
        stack.callback(heartbeat.release)
        compute = open_device(config.device, config.pinning, arena)
        stack.callback(compute.close)
        loaded = _load(network, plan, model, compute, report)
        # Before the first product: the TEE would find every one of other weights false.
        _require_same(joined.name, "model's linears_digest", loaded.linears_digest, invitation.linears_digest)
        open_waker = partial(joined.open_waker, invitation.endpoint)
        doorbell = open_doorbell(invitation.doorbell, arena, "gpu", open_waker, invitation.spin_us, invitation.yield_us)
        stack.callback(doorbell.close)
        if recorder is not None:
            recorder.describe(plan)
            doorbell = ServingDoorbell(doorbell, recorder)
        rules = SubmissionRules(plan, arena.epoch)
        on_ready()
        Worker(doorbell, PeerWatch(arena, "tee"), rules, loaded.operations, compute).run()


def _own_plan(network: Network, invitation: Invitation, arena: str) -> Plan:
    mode = invitation.limits.mode
    if mode not in LOADERS:
        raise ArenaMismatch(arena, "the mode", " or ".join(LOADERS), mode)
    plan = Plan.derive(network, invitation.limits)
    own = plan.geometry.plain()
    for field, found in invitation.geometry.items():
        _require_same(arena, f"model's {field}", own.get(field), found)
    return plan


def _require_same(arena: str, what: str, own: object, invited: object) -> None:
    if own != invited:
        raise ArenaMismatch(arena, f"the {what}", own, invited)


def _load(network: Network, plan: Plan, model: Path, device: Device, report: Callable[[str], None]) -> Loaded:
    mode = LOADERS[plan.limits.mode]
    memory = mode.memory(network, plan, device)
    device.reserve(memory.weights_bytes, memory.cache_bytes)
    reason = f" ({device.transfer_reason})" if device.transfer_reason else ""
    cache = f", cache of up to {memory.cache_bytes:,} bytes" if memory.cache_bytes else ""
    report(
        f"device {device.name}, slots {device.transfer}{reason}; "
        f"loading {memory.weights_bytes:,} bytes of weights ({memory.arithmetic}){cache}"
    )
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - started > 1.0:
            end = "\n" if done == total else ""
            print(f"\rloading layer {done}/{total}", end=end, file=obeyed(sys.stderr), flush=True)

    try:
        with Checkpoint.open(model) as checkpoint:
            loaded = mode.load(network, plan, checkpoint, device, progress)
    except torch.OutOfMemoryError as error:
        raise DeviceError(device.name, f"out of memory while loading: {error}") from error
    except MemoryError as error:
        raise DeviceError(device.name, "out of memory while loading") from error
    report(f"loaded in {time.monotonic() - started:.1f} s")
    return loaded
