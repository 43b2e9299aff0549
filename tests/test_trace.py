"""The trace of a real session: both processes on one clock, and nothing in it but names and numbers."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from arenas import new_arena
from endpoints import SECRET
from hypothesis import given
from hypothesis import strategies as st
from models import RandomModel, model_folder, random_token_ids, with_tokenizer

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import DOORBELLS
from tsqp_shm.errors import ConfigError, PeerDied, TraceError
from tsqp_shm.shm.doorbell import SpinDoorbell, open_doorbell
from tsqp_shm.shm.plan import NO_MODEL, Plan
from tsqp_shm.shm.posix.stream import ZmqStream
from tsqp_shm.shm.protocol import Opcode, Record, pack_completion
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.trace.chrome import write_trace
from tsqp_shm.trace.doorbell import ServingDoorbell, SubmittingDoorbell
from tsqp_shm.trace.recorder import WAITS, Recorder, Recording

COMMAND = [sys.executable, "-m", "tsqp_shm"]
TEE, GPU = 1, 2
PHASES = {"spin", "yield", "park"}
PROMPT = "Grüße aus dem schönen Köln, sehr geehrte Damen und Herren"
ALIVE = SimpleNamespace(heartbeat_age_s=0.5, check=lambda: None)
PLAN = Plan.of_slots([("x", "float32", 1, 1)], replace(NO_MODEL, linear_roles=((1, ("down",)), (1, ("lm_head",)))))


class Trace:
    """A trace as a reader takes it apart. Units: nanoseconds."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self.document = json.loads(self.text)
        self.events = self.document["traceEvents"]
        self.slices = defaultdict(list)
        for event in self.events:
            if event["ph"] == "X":
                begin = round(event["ts"] * 1000)
                facts = SimpleNamespace(begin=begin, end=begin + round(event["dur"] * 1000), **event)
                self.slices[event["pid"]].append(facts)

    def by_sequence(self, pid: int, kind: str) -> dict[int, SimpleNamespace]:
        """The slices of a process of a category or of a first word, one for each doorbell."""
        found = [one for one in self.slices[pid] if kind in (one.cat, one.name.split()[0]) and "sequence" in one.args]
        by_sequence = {one.args["sequence"]: one for one in found}
        assert len(by_sequence) == len(found)
        return by_sequence


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(demo_model, tmp_path_factory) -> Path:
    folder = RandomModel("llama", {"vocab_size": 49152}).write(tmp_path_factory.mktemp("trace") / "model")
    return with_tokenizer(folder, demo_model)


@pytest.fixture(scope="module")
def launched(model, tmp_path_factory) -> Trace:
    """Of a launch with several tiles in a layer, and so with operations beside kernels."""
    path = tmp_path_factory.mktemp("traces") / "launched.json"
    flags = ["--prompt", PROMPT, "--tile-rows", "4", "--max-new-tokens", "3", "--max-model-len", "64", "--ignore-eos"]
    result = run("launch", model, *flags, "--trace", path)
    assert result.returncode == 0, result.stderr
    assert "slices" in result.stderr
    return Trace(path)


def test_both_processes_are_there_under_their_names(launched):
    names = {
        (event["pid"], event["name"]): event["args"].get("name") for event in launched.events if event["ph"] == "M"
    }
    assert names[TEE, "process_name"].startswith("TEE process")
    assert names[GPU, "process_name"].startswith("GPU process")
    assert launched.document["otherData"]["dropped"] == {"tee": 0, "gpu": 0}
    assert {one.cat for one in launched.slices[TEE]} == {"kernel", "doorbell", "wait"}
    assert {one.cat for one in launched.slices[GPU]} == {"operation", "doorbell", "wait"}


def test_every_event_has_the_fields_of_the_trace_event_format(launched):
    needed = {
        "M": {"name", "pid", "tid", "args"},
        "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
        "s": {"name", "cat", "id", "pid", "tid", "ts"},
        "t": {"name", "cat", "id", "pid", "tid", "ts"},
        "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
    }
    for event in launched.events:
        assert event.keys() == needed[event["ph"]] | {"ph"}
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0


def test_every_doorbell_has_its_operation_its_wait_and_its_arrow(launched):
    rings, waits = launched.by_sequence(TEE, "ring"), launched.by_sequence(TEE, "wait")
    operations = launched.by_sequence(GPU, "operation")
    # The last one tells the GPU process to stop.
    assert sorted(rings) == list(range(1, len(rings) + 1))
    assert rings.keys() == waits.keys() == operations.keys()
    for sequence, ring in rings.items():
        assert ring.args == waits[sequence].args == operations[sequence].args
        assert operations[sequence].name == ring.args["opcode"]
    arrows = Counter((event["ph"], event["id"]) for event in launched.events if "id" in event)
    assert arrows == Counter((phase, sequence) for phase in "stf" for sequence in rings)


def test_doorbells_tell_layer_rows_and_slots(launched):
    rings = launched.by_sequence(TEE, "ring").values()
    assert {ring.args["opcode"] for ring in rings} >= {"EMBED", "QKV", "SCORES", "CONTEXT", "LM_HEAD", "STOP"}
    assert {ring.args["layer"] for ring in rings if ring.args["opcode"] == "QKV"} == {0, 1}
    scores = [ring.args for ring in rings if ring.args["opcode"] == "SCORES"]
    assert {one["out_slot"] for one in scores} == {"f32.scores.0", "f32.scores.1"}
    assert all(one["in_slot"] == "f32.qk" and one["rows"] > 0 and one["segments"] == 1 for one in scores)


def test_both_processes_are_on_one_clock(launched):
    """What the GPU process did for a doorbell, it did between the TEE's ring and the end of the TEE's wait."""
    rings, waits = launched.by_sequence(TEE, "ring"), launched.by_sequence(TEE, "wait")
    for sequence, operation in launched.by_sequence(GPU, "operation").items():
        assert rings[sequence].begin <= operation.begin <= operation.end <= waits[sequence].end


@pytest.mark.parametrize("pid", [TEE, GPU])
def test_slices_of_a_thread_nest(launched, pid):
    open_ends: list[int] = []
    last_begin = 0
    for one in launched.slices[pid]:
        assert one.begin >= last_begin
        last_begin = one.begin
        while open_ends and open_ends[-1] <= one.begin:
            open_ends.pop()
        assert not open_ends or one.end <= open_ends[-1]
        open_ends.append(one.end)


@pytest.mark.parametrize("pid", [TEE, GPU])
def test_a_wait_shows_its_phases(launched, pid):
    waits = [one for one in launched.slices[pid] if one.name.split()[0] == "wait"]
    phases = [one for one in launched.slices[pid] if one.name in PHASES]
    # Both sides waited long enough for each, while the other loaded or computed.
    assert {one.name for one in phases} == PHASES
    for phase in phases:
        assert any(wait.begin <= phase.begin and phase.end <= wait.end for wait in waits)


def test_an_arrow_starts_passes_and_ends_inside_its_slices(launched):
    owners = {
        "s": launched.by_sequence(TEE, "ring"),
        "t": launched.by_sequence(GPU, "operation"),
        "f": launched.by_sequence(TEE, "wait"),
    }
    for event in launched.events:
        if "id" in event:
            owner = owners[event["ph"]][event["id"]]
            assert owner.pid == event["pid"]
            assert owner.begin <= round(event["ts"] * 1000) < owner.end


def test_kernels_come_after_the_doorbell_they_wait_for(launched):
    kernels = [one for one in launched.slices[TEE] if one.cat == "kernel"]
    assert {one.name for one in kernels} >= {"LOAD", "RMSNORM", "ROPE", "SOFTMAX", "SILU", "SAMPLE"}
    rings = launched.by_sequence(TEE, "ring")
    assert all(rings[one.args["after"]].end <= one.begin for one in kernels)


def test_nothing_of_the_prompt_is_in_the_trace(launched):
    assert not any(word in launched.text for word in PROMPT.replace(",", "").split() if len(word) > 3)
    keys = set().union(*(event.get("args", {}).keys() for event in launched.events))
    told = {"sequence", "opcode", "layer", "rows", "in_slot", "out_slot", "first_segment", "segments"}
    assert keys == told | {"after", "name", "sort_index"}


def test_an_llm_writes_one_too_and_says_of_short_waits_how_many_and_how_long(model, tmp_path):
    with LLM(model, device="cpu", max_model_len=64, trace=tmp_path / "llm.json", trace_min_wait_us=300) as llm:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0))
        doorbells = llm.statistics.doorbells
    trace = Trace(tmp_path / "llm.json")
    # And the one that told the GPU process to stop.
    assert len(trace.by_sequence(TEE, "ring")) == len(trace.by_sequence(GPU, "operation")) == doorbells + 1
    for pid, role in ((TEE, "tee"), (GPU, "gpu")):
        waits = [one for one in trace.slices[pid] if one.cat == "wait"]
        left_out = trace.document["otherData"]["waits_left_out"][role]
        assert left_out["shorter_than_us"] == 300
        assert waits
        assert min(one.end - one.begin for one in waits) >= 300_000
        # A wait that is left out leaves its spin out, and a spin is never as long.
        assert left_out["spin"]["count"] > 0
        assert all(0 <= left_out[kind]["us"] < 300 * max(1, left_out[kind]["count"]) for kind in WAITS)
    recorded = len(trace.by_sequence(TEE, "wait"))
    assert recorded + trace.document["otherData"]["waits_left_out"]["tee"]["wait"]["count"] == doorbells + 1


def test_the_trace_of_a_session_whose_gpu_process_dies_shows_the_tee_s_last_wait(model, tmp_path):
    path = tmp_path / "died.json"
    with pytest.raises(PeerDied), LLM(model, device="cpu", max_model_len=64, trace=path) as llm:
        os.kill(llm.bring_up()["processes"]["gpu"]["pid"], signal.SIGKILL)
        llm.logits([3, 4])
    trace = Trace(path)
    assert list(trace.slices) == [TEE]
    assert max(trace.slices[TEE], key=lambda one: one.end).name == "wait EMBED"


def test_a_trace_goes_on_over_a_restart_with_the_new_gpu_process(model, tmp_path):
    path = tmp_path / "restarted.json"
    with LLM(model, device="cpu", max_model_len=64, restart_gpu=1, trace=path) as llm:
        llm.logits([3, 4])
        os.kill(llm.bring_up()["processes"]["gpu"]["pid"], signal.SIGKILL)
        llm.logits([3, 4])
        last = llm.bring_up()["processes"]["gpu"]["pid"]
        assert llm.statistics.gpu_restarts == 1
    trace = Trace(path)
    titles = [event["args"]["name"] for event in trace.events if event["name"] == "process_name"]
    assert [title.endswith(f"pid {last}") for title in titles] == [False, True]
    arrows = defaultdict(set)
    for event in trace.events:
        if "id" in event:
            arrows[event["ph"]].add(event["id"])
    # Sequence numbers begin anew with the second arena, and its arrows are not those of the first.
    second = {arrow for arrow in arrows["s"] if arrow >> 32 == 1}
    assert arrows["t"] == second < arrows["s"]
    assert {arrow >> 32 for arrow in arrows["s"]} == {0, 1}


def test_without_a_trace_nothing_of_it_is_there(model):
    with LLM(model, device="cpu", max_model_len=64) as llm:
        assert type(llm.statistics) is Statistics
        assert type(llm.runtime.connection.doorbell).__module__ == "tsqp_shm.shm.doorbell"


@pytest.mark.parametrize("path", ["no-such-folder/trace.json", "."])
def test_a_trace_that_cannot_be_written_is_one_line_before_any_work(model, tmp_path, path):
    # Launch looks at it first of all: there is no model either.
    session = ["--session", "untraced", "--timeout", "1"]
    for verb, folder in (("launch", tmp_path / "no-model"), ("tee", model), ("gpu", model)):
        result = run(verb, folder, "--trace", tmp_path / path, *session)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert str(tmp_path / path) in result.stderr


def test_a_failed_launch_leaves_an_earlier_trace_alone_and_no_empty_one(model, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text("{}")
    for path, flags, code in (
        (earlier, [tmp_path / "no-model"], 1),
        (tmp_path / "new.json", [model, "--max-model-len", "100000"], 2),
    ):
        result = run("launch", *flags, "--trace", path)
        # What went wrong is told, and not that there is nothing to trace.
        assert (result.returncode, result.stderr.count("\n")) == (code, 1)
        assert "recording" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["earlier.json"]
    assert earlier.read_text() == "{}"


@pytest.mark.parametrize("mode", DOORBELLS)
def test_every_way_of_ringing_is_recorded(runtime_folder, forked, tmp_path, mode):
    name, count = f"/tsqp-shm-test-trace-{mode}-{os.getpid()}", 20
    endpoint = f"ipc://{runtime_folder}/trace-{mode}"

    def traced(kind, role, arena, recorder):
        return closing(
            kind(open_doorbell(mode, arena, role, partial(ZmqStream, endpoint, role, SECRET), 20, 200), recorder)
        )

    with new_arena(PLAN, name) as arena:

        def serve():
            recorder = Recorder("gpu")
            with traced(ServingDoorbell, "gpu", arena, recorder) as bell:
                for _ in range(count):
                    bell.send(pack_completion(bell.receive(ALIVE, 30.0, "a submission"), 0))
            with (tmp_path / "gpu").open("wb") as out:
                recorder.write(out)

        child = forked(serve)
        recorder = Recorder("tee")
        with traced(SubmittingDoorbell, "tee", arena, recorder) as bell:
            for sequence in range(1, count + 1):
                bell.send(Record(sequence, 1, Opcode.CONTEXT, 3, 0, 0, 0, 1, 0, 0).pack())
                bell.receive(ALIVE, 30.0, "a completion")
            assert sum(bell.waits.values()) == count
        child.join()
    with (tmp_path / "tee").open("wb") as out:
        recorder.write(out)
    assert run("trace", tmp_path / "both.json", tmp_path / "gpu", tmp_path / "tee").returncode == 0
    trace = Trace(tmp_path / "both.json")
    test_both_processes_are_on_one_clock(trace)
    for pid in (TEE, GPU):
        test_slices_of_a_thread_nest(trace, pid)
        assert len(trace.by_sequence(pid, "ring")) == count
        shown = {one.name for one in trace.slices[pid]} & PHASES
        assert shown <= {"adaptive": PHASES, "spin": {"spin", "yield"}, "zmq": {"park"}}[mode]
    assert {one.name for one in trace.slices[GPU]} & PHASES


def test_a_wait_that_ctrl_c_ended_is_taken_up_again_under_its_own_number(tmp_path):

    def interrupt():
        raise KeyboardInterrupt

    recorder = Recorder("tee")
    with new_arena(PLAN, f"/tsqp-shm-test-trace-{os.getpid()}") as arena:
        tee_end = SubmittingDoorbell(SpinDoorbell(arena, "tee", 0), recorder)
        with closing(tee_end) as tee, closing(SpinDoorbell(arena, "gpu", 0)) as gpu:
            for sequence in (1, 2):
                tee.send(Record(sequence, 1, Opcode.CONTEXT, 0, 0, 0, 0, 1, 0, 0).pack())
            with pytest.raises(KeyboardInterrupt):
                tee.receive(SimpleNamespace(heartbeat_age_s=0.5, check=interrupt), 30.0, "a completion")
            for _ in range(2):
                gpu.send(pack_completion(gpu.receive(ALIVE, 30.0, "a submission"), 0))
                tee.receive(ALIVE, 30.0, "a completion")
    with (tmp_path / "tee").open("wb") as out:
        recorder.write(out)
    events = Recording.read(tmp_path / "tee").events
    assert [event.sequence for event in events if event.name == "wait"] == [1, 1, 2]


def test_the_sums_of_a_trace_are_those_of_all_waits_whatever_is_left_out(tmp_path):
    lasting = [1, 5_000, 4_999, 800, 5_001, 90_000, 5_000]
    sums = []
    for least_wait_ns in (0, 5_000, 1 << 60):
        recorder, now_ns = Recorder("tee", least_wait_ns=least_wait_ns), 0
        recorder.slice("ROPE", 0, 1)
        for ns in lasting:
            recorder.wait("wait", now_ns, now_ns + ns)
            now_ns += ns + 10
        with (tmp_path / "tee").open("wb") as out:
            recorder.write(out)
        left_out = sum(ns for ns in lasting if ns < least_wait_ns)
        result = run("trace", tmp_path / "trace.json", tmp_path / "tee")
        assert ("are left out" in result.stderr) == (left_out > 0)
        trace = Trace(tmp_path / "trace.json")
        told = trace.document["otherData"]["waits_left_out"]["tee"]
        assert told["wait"]["us"] == left_out / 1000
        sums.append(sum(one.dur for one in trace.slices[TEE] if one.cat == "wait") + told["wait"]["us"])
    assert sums == pytest.approx([sum(lasting) / 1000] * 3)


@pytest.mark.parametrize("words", [["--trace-min-wait-us", "5"], ["--trace", "x.json", "--trace-min-wait-us", "-1"]])
def test_a_shortest_wait_that_is_none_or_of_no_trace_is_one_line_before_any_work(tmp_path, words):
    result = run("launch", tmp_path / "no-model", *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "trace_min_wait_us" in result.stderr
    assert not Path("x.json").exists()


def test_a_full_buffer_counts_what_it_has_no_room_for(tmp_path):
    recorder = Recorder("tee", capacity=3)
    for begin_ns in range(5):
        recorder.slice("ROPE", begin_ns, begin_ns + 1)
    with (tmp_path / "tee").open("wb") as out:
        recorder.write(out)
    recording = Recording.read(tmp_path / "tee")
    assert ([event.begin_ns for event in recording.events], recording.dropped) == ([0, 1, 2], 2)
    result = run("trace", tmp_path / "trace.json", tmp_path / "tee")
    assert "2 more that found no room" in result.stderr
    assert Trace(tmp_path / "trace.json").document["otherData"]["dropped"] == {"tee": 2}


def written(role: str) -> bytes:
    recorder = Recorder(role)
    recorder.describe(PLAN)
    for sequence, (opcode, target) in enumerate(((Opcode.QKV, 1), (Opcode.LINEAR, 0), (Opcode.LINEAR, 1)), 7):
        recorder.slice("run", 10, 30, Record(sequence, 0, opcode, target, 0, 0xFFFF, 0, 3, 0, 0).pack())
    recorder.wait("spin", 12, 13)
    out = io.BytesIO()
    recorder.write(out)
    return out.getvalue()


RECORDING = written("gpu")


def test_a_recording_is_whole_though_a_signal_ends_the_process_meanwhile():
    class Interrupted(io.BytesIO):
        parts = 0

        def write(self, part):
            self.parts += 1
            if self.parts == 2:
                raise SystemExit(143)
            return super().write(part)

    recorder = Recorder("gpu")
    recorder.slice("run", 10, 30)
    out, undisturbed = Interrupted(), io.BytesIO()
    with pytest.raises(SystemExit):
        recorder.write(out)
    recorder.write(undisturbed)
    assert out.getvalue() == undisturbed.getvalue()


def test_a_linear_is_shown_by_its_name_and_layer(tmp_path):
    (tmp_path / "gpu").write_bytes(RECORDING)
    out = io.StringIO()
    write_trace([Recording.read(tmp_path / "gpu")], out)
    shown = [event for event in json.loads(out.getvalue())["traceEvents"] if event.get("cat") == "operation"]
    assert [(one["name"], one["args"]["opcode"], one["args"]["layer"]) for one in shown] == [
        ("QKV", "QKV", 1), ("DOWN", "DOWN", 0), ("LM_HEAD", "LM_HEAD", 0),
    ]  # fmt: skip


def test_two_recordings_of_one_role_or_none_are_refused(tmp_path):
    for name, content in (("a", RECORDING), ("b", RECORDING), ("junk", b"{}"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    for names, code in ((["a", "b"], 2), (["junk"], 1), (["empty"], 1), (["nowhere"], 1)):
        result = run("trace", tmp_path / "trace.json", *(tmp_path / name for name in names))
        assert (result.returncode, result.stderr.count("\n")) == (code, 1)
        assert not (tmp_path / "trace.json").exists()


@given(position=st.integers(0, len(RECORDING) - 1), value=st.integers(0, 255), length=st.integers(0, len(RECORDING)))
def test_whatever_the_gpu_process_wrote_gives_a_trace_or_one_error(tmp_path_factory, position, value, length):
    path = tmp_path_factory.getbasetemp() / "damaged"
    damaged = bytearray(RECORDING)
    damaged[position] = value
    path.write_bytes(damaged[: length if position % 3 == 0 else None])
    try:
        recording = Recording.read(path)
    except TraceError:
        return
    out = io.StringIO()
    write_trace([recording], out)
    for event in json.loads(out.getvalue())["traceEvents"]:
        # It cannot put anything on the TEE's track, whatever role and pid it claims.
        assert event["pid"] == event["tid"] == {"tee": TEE, "gpu": GPU}[recording.role]


def test_a_recording_too_long_to_be_one_is_not_read(tmp_path):
    path = tmp_path / "long"
    with path.open("wb") as out:
        out.write(RECORDING)
        out.truncate(1 << 40)
    with pytest.raises(TraceError, match=r"holds more than the [0-9,]+ bytes of a recording"):
        Recording.read(path)


def test_a_count_of_slices_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(RECORDING[:32] + struct.pack("<Q", 1 << 60) + RECORDING[40:])
    with pytest.raises(TraceError, match="whole"):
        Recording.read(path)


def test_an_llm_s_trace_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="trace"):
        LLM(model_folder(RandomModel("llama")), trace=tmp_path / "no" / "trace.json")


def test_token_ids_are_not_in_a_recording(model, tmp_path):
    ids = random_token_ids(40, 49152)
    with LLM(model, device="cpu", max_model_len=64, trace=tmp_path / "ids.json") as llm:
        llm.logits(ids)
    numbers = {value for one in Trace(tmp_path / "ids.json").events for value in one.get("args", {}).values()}
    assert not set(ids) & {number for number in numbers if isinstance(number, int) and number > 1000}
