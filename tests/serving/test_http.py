"""The server as HTTP: what it answers to whatever comes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest
from process_table import children, is_alive
from prometheus_client.parser import text_string_to_metric_families
from servers import Server, demo_server

from tsqp_shm.bench.serve.asked import Request
from tsqp_shm.bench.serve.load import ask
from tsqp_shm.bench.serve.peers import Setup, our_servers
from tsqp_shm.shm.posix.folder import sweep_dead_sessions

COMPLETIONS = "/v1/completions"


def test_it_says_how_it_is_without_a_key(locked):
    assert locked.get("/health") == (200, {"status": "ready", "mode": "tee-only"})
    assert locked.get("/ping")[0] == locked.get("/live")[0] == locked.get("/version")[0] == 200
    assert locked.get("/v1/models")[0] == 401


def test_each_answer_has_an_id_and_the_mode(server):
    _, headers, _ = server.ask("GET", "/v1/models", X_Request_Id="mine-1")
    assert (headers["x-request-id"], headers["x-tsqp-mode"]) == ("mine-1", "tee-only")
    _, headers, _ = server.ask("GET", "/nowhere", X_Request_Id="two words")
    assert len(headers["x-request-id"]) == 32 and headers["x-tsqp-mode"] == "tee-only"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"prompt": NaN}', 400, None),
        ([], 400, "body"),
        ({}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [["a"]]}, 400, "prompt[0]"),
        ({"prompt": "x", "stop": [5]}, 400, "stop[0]"),
        ({"prompt": "x", "stream": "yes"}, 400, "stream"),
        ({"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "x", "stop": ["x"] * 17}, 400, "stop"),
        ({"prompt": "x", "bad_words": ["word " * 50]}, 400, "bad_words"),
    ],
    ids=str,
)
def test_a_malformed_request_is_one_error_that_names_the_field(server, body, status, param):
    found, answer = server.post(COMPLETIONS, body)
    assert (found, answer["error"]["param"]) == (status, param)
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_no_text_of_a_request_comes_back_or_into_what_the_server_says(server):
    secret = "xyzzy-plugh"
    for body in ({"prompt": secret, "stop": [5]}, {"prompt": secret * 9000}, {"prompt": "a", "temperature": secret}):
        status, answer = server.post(COMPLETIONS, body)
        assert status == 400 and secret not in json.dumps(answer)
    messages = [{"role": secret, "content": secret}]
    assert secret not in json.dumps(server.post("/v1/chat/completions", {"messages": messages})[1])
    assert server.post(COMPLETIONS, {"prompt": secret, "max_tokens": 2})[0] == 200
    assert secret not in server.ask("GET", "/metrics")[2].decode() and secret not in "\n".join(server.lines)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n{")
        assert b" 413 " in client.recv(4096)


def test_text_becomes_tokens_and_tokens_text(server):
    text = "Grüße, 世界"
    _, encoded = server.post("/tokenize", {"prompt": text})
    assert encoded["count"] == len(encoded["tokens"])
    assert server.post("/detokenize", {"tokens": encoded["tokens"]}) == (200, {"prompt": text})
    status, chat = server.post("/tokenize", {"messages": [{"role": "user", "content": text}]})
    assert status == 200 and chat["count"] > encoded["count"]
    assert server.get("/tokenizer_info")[1]["eos_token"] == "<|im_end|>"


def test_metrics_are_read_by_prometheus_and_count_what_was_asked(server):
    before = server.metric("tsqp:generation_tokens_total")
    server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "temperature": 0})
    families = {
        family.name: family for family in text_string_to_metric_families(server.ask("GET", "/metrics")[2].decode())
    }
    assert families["tsqp:generation_tokens"].samples[0].value == before + 3
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds"):
        assert f"tsqp:{name}" in families


def test_the_load_of_the_benchmark_gets_every_token_and_counts_as_the_server_does(server, demo_model):
    setup = Setup(demo_model, 1, 4, 24, 6, "bfloat16", "cpu", None)
    (ours,) = our_servers(["tsqp-shm-tee-only"])
    asked = [Request(number, f"{number} small stones in", 6, float(number % 2)) for number in range(7)]
    before = server.metric("tsqp:generation_tokens_total")

    def body(request):
        return {**ours.body(setup, request), "model": demo_model.name}

    loaded = ask(server.port, asked, 3, body, 60)
    assert [(each.failure, each.tokens) for each in loaded.answers] == [("", 6)] * 7
    assert server.metric("tsqp:generation_tokens_total") - before == 42
    assert all(each.first_s > 0 and 1 <= len(each.gaps_s) <= 5 for each in loaded.answers)
    (wrong,) = ask(server.port, asked[:1], 1, lambda request: {**body(request), "model": "another"}, 60).answers
    assert wrong.failure.startswith("status 404")


def test_a_client_that_goes_away_ends_its_request(server):
    for stream in (True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": stream}).encode()
        ended = server.metric('tsqp:request_success_total{finished_reason="abort"}')
        with socket.create_connection(("127.0.0.1", server.port), 30) as client:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            server.until("tsqp:num_requests_running", 1)
        server.until('tsqp:request_success_total{finished_reason="abort"}', ended + 1)
        server.until("tsqp:num_requests_running", 0)


def test_a_full_queue_is_429_and_says_when_to_come_again(server):
    # Four run and twelve may wait.
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "n": 16, "stream": True}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
        )
        client.recv(1)
        status, headers, answer = server.ask("POST", COMPLETIONS, {"prompt": "b"})
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(answer)["error"]["code"] == "queue_full"
    server.until("tsqp:num_requests_waiting", 0)


def test_whoever_dawdles_with_a_head_or_a_body_is_cut_off_and_disturbs_nobody(demo_model):
    arguments = ("--mode", "tee-only", "--receive-s", "1", "--max-connections", "300")
    with demo_server(demo_model, *arguments) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(200)]
        for each in slow[:100]:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-")
        for each in slow[100:]:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2})[0] == 200
        for each in slow[:100]:
            assert each.recv(4096) == b""
        for each in slow[100:]:
            assert b" 408 " in each.recv(4096)
        for each in slow:
            each.close()


def test_a_record_of_evidence_is_for_the_key_that_asked(locked, tmp_path):
    status, headers, _ = locked.ask(
        "POST", COMPLETIONS, {"prompt": "a", "max_tokens": 2, "temperature": 0}, Authorization="Bearer first-key"
    )
    request_id, nonce = headers["x-tsqp-evidence"], headers["x-tsqp-nonce"]
    assert status == 200 and len(bytes.fromhex(nonce)) == 32
    path = f"/v1/evidence/{request_id}"
    status, record = locked.get(path, Authorization="Bearer first-key")
    assert (status, record["schema"], len(record["requests"])) == (200, "tsqp-shm evidence 1", 1)
    assert locked.get(path, Authorization="Bearer second-key")[0] == 404
    assert locked.get(path)[0] == 401
    assert locked.get("/v1/evidence/cmpl-none", Authorization="Bearer first-key")[0] == 404


def test_a_unix_socket_is_its_user_s_alone_and_leaves_nothing(demo_model, tmp_path):
    path = tmp_path / "s"
    with Server(demo_model, "--mode", "tee-only", "--uds", path) as server:
        assert server.url == f"unix:{path}" and path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in client.recv(4096)
    assert not path.exists()


def test_flags_come_from_a_file_too_and_a_wrong_one_is_one_line(demo_model, tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text(
        "# a server\nmode: tee-only\nserved-model-name: 'mine'  # so\nmax-num-seqs: 2\napi-key:\n  - secret\n"
    )
    with demo_server(demo_model, "--config", config) as server:
        assert server.get("/v1/models", Authorization="Bearer secret")[1]["data"][0]["id"] == "mine"
    for words, said in (
        ("api-key:\n", "a string, or strings"),
        ("port: [1]\n", "one value"),
        ("api-key: 5\n", "quote"),
    ):
        config.write_text(words)
        with pytest.raises(AssertionError, match=said):
            Server(demo_model, "--config", config)
    config.write_text("colour: red\n")
    with pytest.raises(AssertionError, match="colour: got 'red', expected a flag of this command"):
        Server(demo_model, "--config", config)


def test_sigterm_lets_what_runs_end_and_takes_nothing_new(demo_model):
    server = demo_server(demo_model, "--mode", "tee-only")
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "temperature": 0, "stream": True}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
        )
        client.recv(1)
        os.kill(server.process.pid, signal.SIGTERM)
        end = time.monotonic() + 30
        while server.get("/health")[0] != 503:
            assert time.monotonic() < end
        assert server.post(COMPLETIONS, {"prompt": "b"})[0] == 503
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    assert answer.count(b'"text":') >= 300 and b"data: [DONE]" in answer
    assert server.process.wait(30) == 0


def test_a_server_that_is_killed_leaves_no_process(demo_model):
    server = demo_server(demo_model, "--mode", "plain", "--dtype", "float32", "--max-model-len", 256)
    gpu = children(server.process.pid)
    assert gpu
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    end = time.monotonic() + 30
    while any(map(is_alive, gpu)):
        assert time.monotonic() < end
        time.sleep(0.02)
    sweep_dead_sessions()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server = Server(tmp_path, "--mode", "tee-only")
    assert server.process.wait(30) == 1
    assert "config.json" in server.lines[-1]
