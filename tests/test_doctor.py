"""The doctor: each check says what is there, in places where the answer is known, and never fails itself."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from models import RandomModel

from tsqp_shm import _native, hardening
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor import pads, versions
from tsqp_shm.doctor.enclave import examine_enclave
from tsqp_shm.doctor.environment import print_environment
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING
from tsqp_shm.doctor.limits import examine_limits
from tsqp_shm.doctor.model import examine_model
from tsqp_shm.doctor.pads import examine_pads
from tsqp_shm.doctor.processor import examine_processor
from tsqp_shm.doctor.sessions import examine_sessions
from tsqp_shm.doctor.transport import TRIPS, examine_transport, run_trial
from tsqp_shm.errors import ConfigError
from tsqp_shm.shm.posix.session import Session

COMMAND = [sys.executable, "-m", "tsqp_shm"]
CONFIG = EngineConfig()
BLINDED = EngineConfig(mode="blinded")
NOBODY = 65534


def by_check(findings) -> dict:
    return {finding.check: finding for finding in findings}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_something_bad_is_exit_code_1_and_the_other_checks_are_made_all_the_same(tmp_path):
    result = run("doctor", tmp_path / "nowhere", "--json", TSQP_SHM_ISA="abacus")
    document = json.loads(result.stdout)
    verdicts = {finding["check"]: finding["verdict"] for finding in document["findings"]}
    assert verdicts["model"] == verdicts["instruction sets"] == BAD
    assert document["counts"][BAD] == 2
    expected = {"Python", "packages", "torch", "device", "cores", "threads", "memory", "file descriptors"}
    expected |= {"shared memory", "memory lock", "huge pages", "enclave", "sessions", "doorbell", "wake-up"}
    assert expected <= verdicts.keys()
    for finding in document["findings"]:
        assert finding["verdict"] == GOOD or (finding["why"] and finding["cure"])
    assert (result.returncode, result.stderr) == (1, "")


def test_a_wrong_flag_is_one_line():
    result = run("doctor", "--doorbell", "brass")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", ["adaptive", "zmq", "spin"])
def test_a_trial_rings_a_second_process_and_leaves_nothing(mode):
    trial = run_trial(mode, None, CONFIG)
    assert 0 < trial.p50_us <= trial.p99_us
    assert sum(trial.waits.values()) == TRIPS
    # The way that the records took, as the doorbell itself counted it.
    assert ("message" in trial.waits) == (mode == "zmq")
    assert (trial.asleep_us is None) == (mode != "adaptive")


def test_an_endpoint_in_use_is_bad_before_anyone_tries_to_work_with_it():
    with Session.begin() as session:
        import zmq

        with zmq.Context() as context, context.socket(zmq.PAIR) as taken:
            taken.bind(session.endpoint)
            config = EngineConfig(endpoint=session.endpoint)
            (finding,) = examine_transport(config)
            assert finding.verdict == BAD
            assert "no live session uses" in finding.found
            with pytest.raises(ConfigError):
                run_trial("adaptive", session.endpoint, CONFIG)


def test_limits_that_libzmq_would_abort_at_are_a_finding(forked):
    def run():
        resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
        (finding,) = examine_transport(CONFIG)
        assert finding.verdict == BAD
        assert "too few file descriptors" in finding.found

    forked(run).join()


def test_a_peer_that_dies_in_a_trial_is_a_finding(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (finding,) = examine_transport(CONFIG)
    assert finding.verdict == BAD
    assert "the trial process died (exit code 1)" in finding.found


def test_a_trial_does_not_sweep_what_is_to_be_looked_at(forked):
    def begin_and_die():
        Session.begin("dead")
        os._exit(0)

    forked(begin_and_die).wait()
    try:
        run_trial("spin", None, CONFIG)
        finding = by_check(examine_sessions())["sessions"]
        assert finding.verdict == WARNING
        assert "1 dead (dead)" in finding.found
        assert finding.cure == "tsqp-shm clean"
    finally:
        with Session.begin():
            pass


EXAMINE_SHM = """
import json, sys
from dataclasses import asdict
from tsqp_shm.doctor.shared_memory import examine_shared_memory
print(json.dumps([asdict(finding) for finding in examine_shared_memory(json.loads(sys.argv[1]))]))
"""


@pytest.mark.parametrize(
    ("options", "arena_bytes", "verdict", "said"),
    [
        ("size=64m", None, WARNING, "64 MiB of 64 MiB free"),
        ("size=64m", 10 << 20, GOOD, "the arena takes 10 MiB"),
        ("size=64m", 100 << 20, BAD, "the arena takes 100 MiB"),
        ("size=1g", None, GOOD, "1,024 MiB of 1,024 MiB free"),
        ("ro", None, BAD, "read-only"),
        ("nr_inodes=1", None, BAD, "takes no more files"),
    ],
)
def test_shared_memory_is_held_against_the_need(in_namespace, options, arena_bytes, verdict, said):
    result = in_namespace(
        f"mount -t tmpfs -o {options} tmpfs /dev/shm", sys.executable, "-c", EXAMINE_SHM, json.dumps(arena_bytes)
    )
    finding = json.loads(result.stdout)[0]
    assert (finding["check"], finding["verdict"]) == ("shared memory", verdict)
    assert said in finding["found"]
    assert bool(finding["cure"]) == (verdict != GOOD)


def test_huge_pages_of_the_mount_are_seen(in_namespace):
    result = in_namespace("mount -t tmpfs -o huge=always tmpfs /dev/shm", sys.executable, "-c", EXAMINE_SHM, "null")
    if "bad option" in result.stderr:
        pytest.skip(f"this kernel has no huge pages for shared memory: {result.stderr.strip()}")
    finding = next(finding for finding in json.loads(result.stdout) if finding["check"] == "huge pages")
    assert finding["found"].startswith("on for shared memory (huge=always")


def test_a_models_need_is_worked_out_from_its_config_and_the_flags(tmp_path):
    folder = RandomModel("llama").write(tmp_path / "model")
    finding, need = examine_model(folder, CONFIG)
    assert finding.verdict == GOOD
    _, larger = examine_model(folder, EngineConfig(max_batch_tokens=4096))
    assert need.arena_bytes < larger.arena_bytes < larger.memory_bytes
    finding, need = examine_model(folder, EngineConfig(max_model_len=513))
    assert (finding.verdict, need) == (BAD, None)
    assert "at most the model's 512 positions" in finding.found


def test_more_memory_than_there_is_is_a_warning():
    assert by_check(examine_limits(CONFIG, 1 << 60))["memory"].verdict != GOOD
    assert by_check(examine_limits(CONFIG, 1 << 20))["memory"].verdict == GOOD


def test_one_core_and_too_many_threads_are_warnings(forked):
    def on_one_core():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        findings = by_check(examine_processor(EngineConfig(tee_threads=2)))
        assert findings["cores"].verdict == WARNING
        assert findings["threads"].verdict == WARNING

    forked(on_one_core).join()


def test_a_forced_instruction_set_is_a_warning():
    code = (
        "from tsqp_shm.config import EngineConfig\n"
        "from tsqp_shm.doctor.processor import examine_processor\n"
        "print(next(examine_processor(EngineConfig())))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TSQP_SHM_ISA": "scalar"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "scalar kernels chosen" in said
    assert "unset TSQP_SHM_ISA" in said


def test_a_torch_that_hangs_or_crashes_is_a_finding(monkeypatch):
    monkeypatch.setattr(versions, "PROBE", "import time; time.sleep(60)")
    assert "no answer within" in versions.probe_torch(timeout_s=0.2)["failed"]
    monkeypatch.setattr(versions, "PROBE", "raise RuntimeError('no driver')")
    assert versions.probe_torch()["failed"] == "RuntimeError: no driver"
    monkeypatch.setattr(versions, "PROBE", "import os; os.abort()")
    assert "exit code -6" in versions.probe_torch()["failed"]
    found = by_check(versions.examine_versions(CONFIG))
    assert found["torch"].verdict == BAD


@pytest.fixture(scope="module")
def need(tmp_path_factory):
    return examine_model(RandomModel("llama").write(tmp_path_factory.mktemp("need") / "model"), BLINDED)[1]


def test_what_blinded_needs_is_a_finding_each(need):
    before = hardening.examine()
    findings = by_check(examine_pads(BLINDED, need))
    # It has tried in another process whether this can be forbidden.
    assert hardening.examine() == before
    assert list(findings) == ["pad kernels", "keys", "pad stock", "dumps"]
    assert findings["pad kernels"].found.startswith(_native.pads_instruction_set())
    assert f"{need.num_linears} made, in locked memory" in findings["keys"].found
    assert "leaves no core" in findings["dumps"].found
    assert findings["pad stock"].found.startswith(f"{need.max_model_len:,} rows of ")
    for finding in findings.values():
        assert finding.verdict == GOOD or (finding.why and finding.cure)


def test_the_pads_of_a_row_are_the_products_of_all_linears(need):
    heads, kv_heads = 6 * 24, 2 * 24
    of_layer = (heads + 2 * kv_heads) + 72 + 2 * 132 + 72
    assert need.pad_row_bytes == 4 * (2 * of_layer + 257)
    assert need.num_linears == 2 * 4 + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="root is above the limit, and becomes another user")
def test_what_cannot_be_locked_is_bad_for_keys_and_a_warning_for_the_stock(need, forked):
    def run():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        config = EngineConfig(mode="blinded", lock_memory=True, pad_stock="64")
        _, keys, stock, _ = examine_pads(config, need)
        assert (keys.verdict, stock.verdict) == (BAD, WARNING)
        assert "ulimit -l" in keys.cure
        assert "ulimit -l" in stock.cure

    forked(run).join()


def of_stock(config, need):
    return next(finding for finding in examine_pads(config, need) if finding.check == "pad stock")


@pytest.mark.parametrize(("stock", "verdict"), [("1", GOOD), ("1KiB", BAD), ("1000TiB", BAD)])
def test_a_stock_is_held_against_the_memory_that_is_free(need, stock, verdict, monkeypatch):
    monkeypatch.setattr(pads, "has_swap", lambda: False)
    assert of_stock(EngineConfig(mode="blinded", pad_stock=stock), need).verdict == verdict


def test_a_stock_that_can_be_swapped_out_is_a_warning(need, monkeypatch):
    monkeypatch.setattr(pads, "has_swap", lambda: True)
    assert of_stock(BLINDED, need).verdict == WARNING
    assert of_stock(EngineConfig(mode="blinded", lock_memory=True), need).verdict == GOOD


def test_a_system_that_lets_no_process_forbid_dumps_is_bad(need, monkeypatch):
    monkeypatch.setattr(pads, "HARDEN", "raise SystemExit('cannot be kept from being dumped')")
    finding = by_check(examine_pads(BLINDED, need))["dumps"]
    assert (finding.verdict, finding.found) == (BAD, "cannot be kept from being dumped")


@pytest.fixture
def machine(tmp_path) -> Path:
    (tmp_path / "dev").mkdir()
    (tmp_path / "proc").mkdir()
    return tmp_path


def enclave(root: Path, **config) -> tuple[str, str]:
    (finding,) = examine_enclave(EngineConfig(**config), root)
    return finding.verdict, finding.found


def test_gramine_needs_a_doorbell_that_crosses_its_border(machine):
    (machine / "dev/attestation").mkdir()
    (machine / "dev/attestation/attestation_type").write_text("dcap")
    assert enclave(machine) == (BAD, "Gramine (attestation: dcap)")
    assert enclave(machine, doorbell="zmq")[0] == BAD
    assert enclave(machine, endpoint="tcp://127.0.0.1:5555")[0] == GOOD
    assert enclave(machine, doorbell="spin")[0] == GOOD


@pytest.mark.parametrize(
    ("device", "flags", "said"),
    [
        ("tdx_guest", "", "Intel TDX"),
        (None, "hypervisor tdx_guest", "Intel TDX"),
        ("sev-guest", "", "AMD SEV-SNP"),
        (None, "hypervisor sev sev_snp", "AMD SEV-SNP"),
        (None, "hypervisor sev", "AMD SEV"),
        # A host that could start such guests.
        (None, "sev sev_snp", "none, and no confidential VM"),
        ("sgx_enclave", "", "none; this machine has SGX"),
        (None, "hypervisor", "none, and no confidential VM"),
    ],
)
def test_an_enclave_or_confidential_vm_is_recognised_by_what_the_kernel_shows(machine, device, flags, said):
    if device:
        (machine / "dev" / device).touch()
    (machine / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t:\n")
    verdict, found = enclave(machine)
    assert verdict == GOOD
    assert said in found


def test_the_environment_block_shows_settings_and_no_other_variable():
    secrets = {"HF_TOKEN": "hf_abcdef", "TSQP_SHM_PROMPT": "private words", "AWS_SECRET_ACCESS_KEY": "hunter2"}
    result = run("env", TSQP_SHM_DOORBELL="spin", TSQP_SHM_ISA="scalar", **secrets)
    assert (result.returncode, result.stderr) == (0, "")
    assert "TSQP_SHM_DOORBELL=spin" in result.stdout
    assert "TSQP_SHM_ISA=scalar" in result.stdout
    for name, value in secrets.items():
        assert name not in result.stdout
        assert value not in result.stdout
    heads = {line.split()[0] for line in result.stdout.splitlines()}
    assert {"tsqp-shm", "python", "packages", "system", "processor", "kernels", "/dev/shm", "limits"} <= heads


def test_the_environment_as_json_has_the_facts_of_the_block(capsys, monkeypatch):
    monkeypatch.setenv("TSQP_SHM_DOORBELL", "spin")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    block, found = ("".join(_environment(capsys, json_output=as_json).splitlines()) for as_json in (False, True))
    facts = json.loads(found)
    assert "hf_abcdef" not in found
    assert facts["settings"]["TSQP_SHM_DOORBELL"] == "spin"
    # But for sizes, which the block rounds.
    sizes = ("memory", "shared_memory")
    for name, fact in facts.items():
        for value in _values(fact) if name not in sizes else []:
            assert str(value) in block
    assert len(facts) == len(_environment(capsys, json_output=False).splitlines())
    assert facts["shared_memory"]["size_bytes"] >= facts["shared_memory"]["free_bytes"] > 0


def _environment(capsys, json_output: bool) -> str:
    assert print_environment(json_output=json_output) == 0
    return capsys.readouterr().out


def _values(fact: object) -> list[object]:
    """Those that are said: of what is not there, or has no limit, the block says so in words."""
    if isinstance(fact, dict):
        return [value for each in fact.values() for value in _values(each)]
    if isinstance(fact, list):
        return [value for each in fact for value in _values(each)]
    return [] if fact is None or isinstance(fact, bool) else [fact]


def test_the_doctor_itself_loads_no_torch():
    code = "import sys, tsqp_shm.doctor.examination, tsqp_shm.doctor.environment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
