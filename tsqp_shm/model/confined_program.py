"""The program of the confined process (`model/confined.py`): it reads a tokenizer, encodes and renders a chat template.

Both are programs of the checkpoint's author: a template loops as it likes, a tokenizer's expressions may backtrack for
ever, and a malformed tokenizer can end the process of the library that reads it. So this process has nothing that is
worth taking: no environment but what finds its libraries and the time zone, no descriptor but two sockets, little
memory, an alarm that ends it, and a signal that does where its owner has ended. Nor does it let another process of its
user look at what it was given.

A request is a letter, a length, the seconds that it may take (8 characters) and that many bytes; an answer is "+" and a
value or "-" and what was wrong.

NOTE: it is run as a file, and imports nothing of this package: its start is a part of every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    import jinja2
    import tokenizers

# Of prctl.
_SET_DUMPABLE = 4
HEADER = struct.Struct("<cQ")
# Of an answer; a prompt of a million tokens has less.
MAX_ANSWER_BYTES = 32 << 20
# What is encoded when a tokenizer is read: an empty text, white space, and what no vocabulary has whole.
_TRIALS = ("", " ", "a b\n\tc", "\u00e9\u4e1c\U0001f9a9\x00\ufffd", "<s>[INST]<|x|>")


class Confined:
    """What the requests are about."""

    def __init__(self) -> None:
        self._tokenizer: tokenizers.Tokenizer | None = None
        self._template: jinja2.Template | None = None
        self.requests: Mapping[bytes, Callable[[bytes], str]] = {
            b"T": self.load_tokenizer,
            b"A": self.add_tokens,
            b"E": lambda text: self.encode(text, add_special_tokens=True),
            b"e": lambda text: self.encode(text, add_special_tokens=False),
            b"W": lambda text: self.tokens(text, add_special_tokens=True),
            b"w": lambda text: self.tokens(text, add_special_tokens=False),
            b"C": self.compile_template,
            b"R": self.render,
        }

    def load_tokenizer(self, content: bytes) -> str:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return ""

    def add_tokens(self, content: bytes) -> str:
        """Adds tokens and goes through everything once that its user will do without this process."""
        import tokenizers

        assert self._tokenizer is not None
        added, split_special_tokens = json.loads(content)
        self._tokenizer.add_tokens([tokenizers.AddedToken(**token) for token in added])
        self._tokenizer.encode_special_tokens = split_special_tokens
        for text in _TRIALS:
            for add_special_tokens in (True, False):
                # A text with a character that it cannot represent may be an error of that text's alone.
                try:
                    ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
                except Exception:
                    continue
                self._tokenizer.decode(ids, skip_special_tokens=add_special_tokens)
        vocabulary = range(self._tokenizer.get_vocab_size())
        self._tokenizer.decode(vocabulary, skip_special_tokens=False)
        for token_id in vocabulary:
            self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return ""

    def encode(self, text: bytes, *, add_special_tokens: bool) -> str:
        assert self._tokenizer is not None
        ids: list[int] = self._tokenizer.encode(text.decode(), add_special_tokens=add_special_tokens).ids
        return json.dumps(ids, separators=(",", ":"))

    def tokens(self, text: bytes, *, add_special_tokens: bool) -> str:
        assert self._tokenizer is not None
        return json.dumps(self._tokenizer.encode(text.decode(), add_special_tokens=add_special_tokens).tokens)

    def compile_template(self, source: bytes) -> str:
        self._template = compile_template(source.decode())
        return ""

    def render(self, variables: bytes) -> str:
        assert self._template is not None
        pieces, size = [], 0
        for piece in self._template.generate(json.loads(variables)):
            size += len(piece)
            if size > MAX_ANSWER_BYTES // 4:
                raise ValueError(f"it makes more than {MAX_ANSWER_BYTES // 4:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def compile_template(source: str) -> jinja2.Template:
    """A template in jinja2's sandbox.

    Source: the environment is that of transformers (`chat_template_utils.py`), because templates are written and tested
        against that one.
    """
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(jinja2.ext.Extension):
        """Renders the body of `{% generation %}`, a tag that marks the assistant's tokens for training."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def answer(confined: Confined, request: bytes, content: bytes) -> tuple[bytes, bytes]:
    try:
        value = confined.requests[request](content).encode("utf-8", "surrogatepass")
        if len(value) > MAX_ANSWER_BYTES:
            raise ValueError(f"it makes more than {MAX_ANSWER_BYTES:,} bytes")
    except MemoryError:
        return b"-", b"it takes more memory than it may"
    except RecursionError:
        return b"-", b"it is nested too deep"
    # A panic of the library is no Exception.
    except BaseException as error:
        return b"-", (str(error) or type(error).__name__)[:4000].encode(errors="replace")
    return b"+", value


def main(memory_bytes: int) -> None:
    # It sees prompts: what else runs as its user has no business in its memory. Where the system cannot, anybody has.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    for limit, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, allowed = resource.getrlimit(limit)
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(limit, (most, most))
    requests, answers, owner = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.dup(2)
    # What a library prints must not be taken for an answer.
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    # Of its own: a process that is started inherits who ignores what.
    for deadly in (signal.SIGALRM, signal.SIGIO):
        signal.signal(deadly, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGIO})
    end_with(owner)
    serve(requests, answers)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Ends with its owner, whose end of the socket closes however the owner ends."""
    confined = Confined()
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        request, size = HEADER.unpack(header)
        seconds = float(requests.read(8))
        content = requests.read(size)
        # Not only the owner's watch ends what takes too long: an owner that was killed has none.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict, value = answer(confined, request, content)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(HEADER.pack(verdict, len(value)) + value)
        answers.flush()


def end_with(owner: int) -> None:
    """Has the system end this process when the other end of a socket closes, whatever a library is doing by then.

    SYNC POINT: the signal comes for anything that arrives, and may come late, so nothing is ever said over this socket.
    """
    # Where the system cannot, the alarm alone ends it.
    with contextlib.suppress(OSError):
        fcntl.fcntl(owner, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(owner, fcntl.F_SETFL, fcntl.fcntl(owner, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have closed before.
    poll = select.poll()
    poll.register(owner, 0)
    if poll.poll(0):
        sys.exit()


if __name__ == "__main__":
    main(int(sys.argv[1]))
