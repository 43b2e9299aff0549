"""What a model's author wrote runs in a process of its own: bounded, with nothing worth taking, never left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import process_table
import pytest
from local_session import LocalGpus
from models import RandomModel
from process_table import is_alive
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tsqp_shm import LLM
from tsqp_shm.errors import ConfigError, LimitError, ModelFileError, RequestError
from tsqp_shm.model import chat_template, confined, tokenizer
from tsqp_shm.model.added_tokens import TokenizerConfig
from tsqp_shm.model.chat_template import ChatTemplate
from tsqp_shm.model.confined import ConfinedError, ConfinedProcess
from tsqp_shm.model.tokenizer import Tokenizer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HELLO = [{"role": "user", "content": "Hello"}]


def byte_level() -> dict:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return json.loads(backend.to_str())


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))
    return tmp_path


def edit_tokenizer(folder: Path, **parts: object) -> None:
    content = byte_level()
    content.update({name: part for name, part in parts.items() if name != "model"})
    content["model"].update(parts.get("model", {}))
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture
def render(folder):
    """Renders a template."""
    process = ConfinedProcess()

    def render_source(source: str) -> str:
        (folder / "chat_template.jinja").write_text(source)
        return ChatTemplate.from_folder(folder, TokenizerConfig(), process).render(HELLO, True, {})

    yield render_source
    process.close()


@pytest.fixture
def hasty(monkeypatch):
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(confined.ConfinedProcess.prepare, "__defaults__", (0.5,))
    monkeypatch.setattr(confined.ConfinedProcess.ask, "__defaults__", (0.5,))
    monkeypatch.setattr(tokenizer, "DEADLINE_S", 0.5)


@pytest.fixture
def read_folder(folder):
    """Reads the tokenizer of the folder; closed at the end, as the traceback of an error may hold it."""
    opened = []

    def read() -> Tokenizer:
        opened.append(Tokenizer.from_folder(folder))
        return opened[-1]

    yield read
    for one in opened:
        one.close()


_others: set[int] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """What earlier tests keep for later ones."""
    _others.clear()
    _others.update(children())


def children() -> list[int]:
    """The processes that the test has started."""
    return [pid for pid in process_table.children() if pid not in _others]


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def wait_for_the_end_of(pid: int, within_s: float) -> None:
    end = time.monotonic() + within_s
    while is_alive(pid):
        assert time.monotonic() < end, "it is still alive"
        time.sleep(0.01)


@pytest.mark.parametrize("source", [ENDLESS, "{{ 9**(9**9) }}"])
def test_a_template_that_does_not_end_is_one_error(render, hasty, source):
    with pytest.raises((RequestError, ModelFileError), match="longer than it may"):
        render(source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ ('a' * 3000000000)|length }}", "more memory than it may"),
        ("{% set l = [0] * 3000000000 %}", "more memory than it may"),
        ("{{ 'a' * 20000000 }}", "more than 8,388,608 characters"),
        ("{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}", "nested too deep"),
        ("{{ raise_exception('\x1b]0;owned\x07\nsecond line') }}", r"\\x1b\]0;owned\\x07 second line"),
        ("{{ (raise_exception|attr('__globals__'))['json'] }}", "unsafe"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_a_template_does_not_get_is_one_error(render, source, said):
    with pytest.raises(RequestError, match=said) as caught:
        render(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("source", ["{{ " + "(" * 100_000 + " }}", "{{ " + "-" * 50_000 + "1 }}", "{% \x1b %}", "{{"])
def test_a_template_that_is_none_is_one_error_that_names_its_file(render, source):
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: malformed chat template") as caught:
        render(source)
    assert str(caught.value).isprintable()


# The library gives up a match after ten million steps; this has a million, at every place of a text.
SLOW = "(?:a|(a)){20}[^a]"
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
NO_NORMALIZER = {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}
BAD_TEMPLATES = [
    {"single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": []},
    {"single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}]},
]


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": NO_NORMALIZER},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "\x1b("}}},
        {"version": "\x1b[2J"},
        *({"post_processor": {"type": "TemplateProcessing", "special_tokens": {}, **bad}} for bad in BAD_TEMPLATES),
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_a_tokenizer_that_would_end_the_process_is_one_error(folder, parts, capfd):
    edit_tokenizer(folder, **parts)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: not a tokenizer") as caught:
        Tokenizer.from_folder(folder)
    assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


FUSE = {"type": "Fuse"}
REPLACE = {"type": "Replace", "content": "x"}


def in_sequence(*decoders: dict) -> dict:
    return {"type": "Sequence", "decoders": list(decoders)}


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        ({**REPLACE, "pattern": {"Regex": "(?:c|(c)){22}[^c]"}}, "decoder.pattern is a Regex"),
        (in_sequence(FUSE, {**REPLACE, "pattern": {"Regex": "a"}}), r"decoder.decoders\[1\].pattern is a Regex"),
        (
            in_sequence(in_sequence({**REPLACE, "pattern": {"Regex": "(?:(c)|c|\\1)+[^c]"}})),
            r"decoder.decoders\[0\].decoders\[0\].pattern is a Regex",
        ),
        (in_sequence(FUSE, {**REPLACE, "pattern": {"String": "a"}, "content": "aa"}), "longer than the 'a'"),
        ({**REPLACE, "pattern": {"String": ""}}, "longer than the ''"),
        (in_sequence({"type": "BPEDecoder", "suffix": ""}), r"decoder.decoders\[0\].suffix is empty"),
        (
            {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": False},
            "decoder.word_delimiter_token is empty",
        ),
        (in_sequence(*[FUSE] * 32), "decoder has more than 32 parts"),
        ({"type": "Strip", "content": "a", "start": 1, "stop": 1}, "decoder.stop is 1"),
        ({"type": "Strip", "content": "a", "start": 2**64 - 1, "stop": 2**64 - 1}, "decoder.stop is 1844674407370955"),
    ],
)
def test_a_decoder_that_nothing_bounds_is_one_error_that_names_its_field(folder, decoder, said, capfd):
    edit_tokenizer(folder, decoder=decoder)
    with pytest.raises(ModelFileError, match=rf"tokenizer\.json: .*{said}") as caught:
        Tokenizer.from_folder(folder)
    assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a|aa|a+)+$"}}}, "a" * 40 + "b"),
        ({"pre_tokenizer": None, "model": {"vocab": {"a": 0}, "unk_token": "nope"}}, "b"),
    ],
    ids=["backtracks", "has no token for it"],
)
def test_a_text_that_a_tokenizer_fails_on_is_that_request_s_error(read_folder, folder, parts, text, capfd):
    edit_tokenizer(folder, **parts)
    read = read_folder()
    with pytest.raises(RequestError, match=f"^text: got '{len(text)} characters', expected text that the model's"):
        read.encode(text)
    assert capfd.readouterr().err == ""
    assert read.encode("a") == read.encode("a")


def test_a_text_that_takes_too_long_is_that_request_s_error(read_folder, folder, hasty):
    edit_tokenizer(folder, pre_tokenizer={**SPLIT, "pattern": {"Regex": SLOW}})
    read = read_folder()
    with pytest.raises(RequestError, match="text that the model's tokenizer can encode: it takes longer than it may"):
        read.encode("a" * 3000)
    assert read.encode("ab") == [64, 65]


def test_it_is_kept_from_one_text_to_the_next_and_started_again_where_it_was_killed(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    read = Tokenizer.from_folder(folder)
    first = children()
    assert read.encode("ab") == [64, 65]
    assert read.apply_chat_template(HELLO) == "Hello"
    assert children() == first
    os.kill(first[0], signal.SIGKILL)
    wait_for_the_end_of(first[0], 5)
    assert read.encode("ab") == [64, 65]
    assert read.apply_chat_template(HELLO) == "Hello"
    second = children()
    assert len(second) == 1
    assert second != first


def test_it_has_no_environment_and_no_descriptor_of_its_owner(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    _read, write = os.pipe()
    os.set_inheritable(write, True)
    read = Tokenizer.from_folder(folder)
    (pid,) = children()
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    held = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    # Some versions of libffi keep their own library open, to map parts of it again.
    libraries = {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "r-xp" in line}
    own = {os.devnull} | {library for library in libraries if "libffi" in library}
    assert all(target.startswith("socket:") or target in own for target in held)
    assert f"pipe:[{os.fstat(write).st_ino}]" not in held
    os.close(_read)
    os.close(write)
    del read


def test_it_is_gone_with_its_tokenizer_and_with_a_closed_llm(tmp_path):
    folder = RandomModel("llama").write(tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(byte_level()))
    with LocalGpus(folder).llm(dtype="float32") as llm:
        assert len(children()) == 1
        for prompts in ("a" * (1 << 17), [{"prompt": "a" * (1 << 17)}]):
            with pytest.raises(RequestError, match="none of which has more than 2 bytes"):
                llm.generate(prompts)
    assert children() == []
    read = Tokenizer.from_folder(folder)
    assert len(children()) == 1
    del read
    assert children() == []
    assert llm.tokenizer.encode("ab") == [64, 65]
    llm.tokenizer.close()


def test_it_is_gone_with_an_llm_that_does_not_come_up(tmp_path):
    folder = RandomModel("llama").write(tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(byte_level()))
    with pytest.raises(ConfigError, match="start_gpu"):
        LLM(folder, start_gpu=refuse)
    assert children() == []


def refuse(session: object) -> None:
    raise ConfigError("start_gpu", None, "another day")


def test_threads_take_turns(folder):
    read = Tokenizer.from_folder(folder)
    found: dict[int, list[list[int]]] = {}

    def encode(number: int) -> None:
        found[number] = [read.encode(chr(97 + number) * length) for length in range(50)]

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [[64 + number] * length for length in range(50)] for number in range(4)}


def test_a_forked_child_has_one_of_its_own(folder, forked):
    read = Tokenizer.from_folder(folder)
    (own,) = children()

    def use_and_drop() -> None:
        nonlocal read
        assert read.encode("ab") == [64, 65]
        assert children() != [own]
        del read

    forked(use_and_drop).join()
    assert is_alive(own)
    assert read.encode("ab") == [64, 65]
    assert children() == [own]


def test_it_works_in_a_program_whose_standard_streams_are_closed(folder, forked):
    def use():
        for descriptor in range(3):
            os.close(descriptor)
        read = Tokenizer.from_folder(folder)
        assert read.decode(read.encode("a text")) == "a text"

    forked(use).join()


def test_it_ends_with_its_owner_however_that_ends(folder, forked):
    told, tell = os.pipe()

    def own() -> None:
        read = Tokenizer.from_folder(folder)
        os.write(tell, f"{children()[0]}\n".encode())
        signal.pause()
        del read

    owner = forked(own)
    pid = int(os.read(told, 100))
    owner.kill()
    wait_for_the_end_of(pid, 10)
    os.close(told)
    os.close(tell)


@pytest.mark.parametrize("source", [ENDLESS, "{{ 9**(9**9) }}"], ids=["in Python", "in C, which holds the interpreter"])
def test_one_that_never_ends_ends_with_its_owner(forked, source):
    told, tell = os.pipe()

    def own() -> None:
        process = ConfinedProcess()
        # Compiling works out what is constant.
        process.prepare(b"C", b"")
        os.write(tell, f"{process.pid}\n".encode())
        process.ask(b"C", source.encode(), 300)
        process.ask(b"R", b"{}", 300)

    owner = forked(own)
    pid = int(os.read(told, 100))
    before_s = processor_s(pid)
    while processor_s(pid) < before_s + 0.3:
        time.sleep(0.01)
    owner.kill()
    wait_for_the_end_of(pid, 20)
    os.close(told)
    os.close(tell)


def test_what_arrives_while_it_works_does_not_end_it():
    """A signal for what arrives may come late, for a request that has been read by then."""
    own_process = ConfinedProcess()
    own_process.prepare(b"C", ENDLESS.encode())
    failures: list[BaseException] = []

    def render() -> None:
        try:
            own_process.ask(b"R", b"{}", 1.5)
        except ConfinedError as error:
            failures.append(error)

    thread = threading.Thread(target=render)
    before_s = processor_s(own_process.pid)
    thread.start()
    while processor_s(own_process.pid) < before_s + 0.3:
        time.sleep(0.01)
    own_process._channel.send(b"x")
    thread.join()
    own_process.close()
    assert [str(failure) for failure in failures] == ["it takes longer than it may"]


def test_who_waits_too_long_for_its_turn_gets_one_error(folder, read_folder, monkeypatch):
    (folder / "chat_template.jinja").write_text(ENDLESS)
    read = read_folder()
    monkeypatch.setattr(confined, "_TURN_S", 0.2)
    monkeypatch.setattr(confined.ConfinedProcess.ask, "__defaults__", (1.5,))
    failures: list[BaseException] = []

    def render() -> None:
        try:
            read.apply_chat_template(HELLO)
        except RequestError as error:
            failures.append(error)

    before_s = processor_s(children()[0])
    thread = threading.Thread(target=render)
    thread.start()
    while processor_s(children()[0]) < before_s + 0.2:
        time.sleep(0.01)
    with pytest.raises(
        RequestError, match=r"requests before it have kept the process that runs it for more than 0\.2 s"
    ):
        read.encode("ab")
    thread.join()
    assert "longer than it may" in str(failures[0])
    assert read.encode("ab") == [64, 65]


def test_what_a_text_may_take_does_not_grow_with_it_for_ever(folder, read_folder, monkeypatch):
    edit_tokenizer(folder, pre_tokenizer={**SPLIT, "pattern": {"Regex": SLOW}})
    read = read_folder()
    monkeypatch.setattr(tokenizer, "_CHARACTERS_PER_SECOND", 1)
    monkeypatch.setattr(tokenizer, "_MOST_ENCODING_S", 0.5)
    with pytest.raises(RequestError, match="longer than it may"):
        read.encode("a" * 3000)


def test_a_text_that_cannot_fit_is_refused_and_not_encoded(folder, read_folder):
    read = read_folder()
    read.close()
    # The longest token is spelled in two bytes.
    for text in ("a" * (1 << 17), "é" * (1 << 16)):
        with pytest.raises(RequestError, match="at most 60000 tokens, none of which has more than 2 bytes"):
            read.encode(text, most_tokens=60_000)
    assert children() == []
    assert read.encode("a" * (1 << 17), most_tokens=1 << 16) == [64] * (1 << 17)
    assert len(read.encode("a" * (1 << 16), most_tokens=10)) == 1 << 16


def test_what_is_prepared_anew_shares_the_deadline_of_the_request(monkeypatch, tmp_path):
    (tmp_path / "program.py").write_text(
        f"""
import os, struct, time
os.read(0, 17)
if os.path.exists({str(tmp_path / "was here")!r}):
    time.sleep(60)
open({str(tmp_path / "was here")!r}, "w").close()
os.write(1, struct.pack("<cQ", b"+", 0))
time.sleep(60)
"""
    )
    monkeypatch.setattr(confined.confined_program, "__file__", str(tmp_path / "program.py"))
    process = ConfinedProcess()
    process.prepare(b"T", b"", 30)
    process.close()
    began_s = time.monotonic()
    with pytest.raises(ConfinedError, match="longer than it may"):
        process.ask(b"E", b"", 0.5)
    assert time.monotonic() - began_s < 25


def test_an_exception_of_a_signal_handler_does_not_leave_an_answer_for_the_next(folder, read_folder):
    (folder / "chat_template.jinja").write_text(ENDLESS)
    read = read_folder()

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError("by a handler")

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(InterruptedError, match="by a handler"):
            read.apply_chat_template(HELLO)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert read.encode("ab") == [64, 65]


def test_where_no_process_starts_texts_are_encoded_here_and_templates_refused(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    (folder / "chat_template.jinja").write_text("x")
    with pytest.warns(RuntimeWarning, match="No such file.*texts are encoded in this one"):
        read = Tokenizer.from_folder(folder)
    assert read.encode("ab") == [64, 65]
    assert read.decode([64, 65]) == "ab"
    with pytest.raises(LimitError, match=r"processes.*No such file"):
        read.apply_chat_template(HELLO)


def test_where_the_system_stops_starting_them_a_text_is_encoded_here(folder, monkeypatch):
    read = Tokenizer.from_folder(folder)
    read.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.warns(RuntimeWarning, match="No such file.*texts are encoded in this one"):
        assert read.encode("ab") == [64, 65]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read.encode("ab") == [64, 65]


def test_an_answer_out_of_form_ends_it(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, time; os.write(1, b'?' * 9); time.sleep(60)")
    monkeypatch.setattr(confined.confined_program, "__file__", str(program))
    with pytest.raises(ConfinedError, match="does not answer in form"):
        ConfinedProcess().ask(b"E", b"")


@pytest.mark.parametrize(("number", "said"), [(signal.SIGRTMIN + 1, "signal 35"), (signal.SIGKILL, "SIGKILL")])
def test_one_that_a_signal_ends_is_one_error_that_names_it(monkeypatch, tmp_path, number, said):
    program = tmp_path / "program.py"
    program.write_text(f"import os; os.kill(os.getpid(), {int(number)})")
    monkeypatch.setattr(confined.confined_program, "__file__", str(program))
    with pytest.raises(ConfinedError, match=f"ended by {said}"):
        ConfinedProcess().ask(b"E", b"")


def test_the_trusted_process_does_not_import_the_template_engine():
    assert "jinja2" not in Path(chat_template.__file__).read_text().replace("jinja2's sandbox", "")
