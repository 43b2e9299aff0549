"""An HTTP answer of server-sent events, read from the bytes of a connection that ends behind it.

It is read when the load is over: while servers are measured the generator takes nothing from their cores but what it
takes to note when which bytes came.
"""

from __future__ import annotations

from collections.abc import Iterator

_MAX_LINE_BYTES = 1 << 16


class BrokenAnswer(Exception):
    """It is no HTTP, or none of the kinds that servers of completions give."""


class AnswerReader:
    """Reads pieces in the order in which they came.

    Attributes:
        status: of HTTP; 0: no head has come.
        body: of an answer that is no stream of events.
        is_whole: its last chunk, or as many bytes as its head says, has come.
    """

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.is_whole = False
        self._raw = bytearray()
        self._text = bytearray()
        self._is_chunked = self._is_stream = False
        self._left: int | None = None

    def push(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that ends in this piece.

        Raises:
            BrokenAnswer: it cannot be read.
        """
        self._raw += data
        if not self.status and not self._take_head():
            return
        self._take_chunks() if self._is_chunked else self._take_all()
        if not self._is_stream:
            self.body = bytes(self._text)
            return
        # Some servers end lines with CR LF.
        *events, rest = self._text.replace(b"\r\n", b"\n").split(b"\n\n")
        self._text = rest
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)

    def _take_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            return False
        first, *lines = bytes(head).split(b"\r\n")
        words = first.split()
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise BrokenAnswer("an answer that is no HTTP")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self.status = int(words[1])
        self._is_chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        length = headers.get(b"content-length", b"")
        self._left = int(length) if length.isdigit() else None
        self._raw = rest
        return True

    def _take_all(self) -> None:
        self._text += self._raw
        if self._left is not None:
            self._left -= len(self._raw)
            self.is_whole = self._left <= 0
        self._raw.clear()

    def _take_chunks(self) -> None:
        while True:
            if self._left is None:
                line, end, rest = self._raw.partition(b"\r\n")
                if not end:
                    if len(line) > _MAX_LINE_BYTES:
                        raise BrokenAnswer("a chunk without a size")
                    return
                try:
                    self._left = int(line.partition(b";")[0], 16)
                except ValueError:
                    raise BrokenAnswer("a chunk whose size is no number") from None
                self._raw = rest
                if self._left == 0:
                    self.is_whole = True
                    return
            # A line's end stands behind each chunk.
            if len(self._raw) < self._left + 2:
                return
            self._text += self._raw[: self._left]
            del self._raw[: self._left + 2]
            self._left = None
