"""A session whose other side is another process: its name, its memory and its waker, which the TEE holds."""

from __future__ import annotations

from tsqp_shm.shm.posix.folder import SOCKET_FILE, remove_doorbells
from tsqp_shm.shm.posix.held_name import HeldName
from tsqp_shm.shm.posix.memory import PosixMemory
from tsqp_shm.shm.posix.objects import OwnObject, arena_name
from tsqp_shm.shm.posix.stream import ChosenPath, ZmqStream


class Session:
    """The TEE's hold on a session's name; use `Session.begin`."""

    def __init__(self, held: HeldName, endpoint: str | None) -> None:
        self.name = held.name
        self.folder = held.folder
        self._held = held
        self._endpoint = endpoint
        # Of the memory made last: the object under its name, and what proves a process to be of this session.
        self._object: OwnObject | None = None
        self._secret = b""
        self._chosen_path: ChosenPath | None = None
        self._arenas = 0

    @classmethod
    def begin(cls, name: str | None = None, endpoint: str | None = None, *, sweeps: bool = True) -> Session:
        """Takes a name, as `HeldName.take`.

        Args:
            endpoint: of every waker, `ipc://PATH` or `tcp://127.0.0.1:PORT`; None: a socket in the session's folder.

        Raises:
            As `HeldName.take`.
        """
        return cls(HeldName.take(name, sweeps=sweeps), endpoint)

    @property
    def arena_name(self) -> str:
        return arena_name(self.name)

    @property
    def gpu_flags(self) -> tuple[str, ...]:
        return ("--session", self.name)

    @property
    def endpoint(self) -> str:
        """Of the arena made last: a GPU process that was only believed dead would come back to the socket it knows."""
        if self._endpoint is not None:
            return self._endpoint
        return f"ipc://{self.folder / SOCKET_FILE}" + (f".{self._arenas}" if self._arenas > 1 else "")

    def create_memory(self, size_bytes: int) -> PosixMemory:
        """`PosixMemory.create` under this session's name; the session's end sees to it that none is left.

        A session has one at a time.

        Raises:
            ArenaError: as `PosixMemory.create`.
        """
        if self._held.has_folder:
            remove_doorbells(self.folder)
        self._arenas += 1
        # Noted before anything lies under the name, so that the session's end finds it whenever a signal comes.
        self._object = OwnObject(self.arena_name)
        memory = PosixMemory.make(self._object, size_bytes)
        try:
            self._secret = memory.put_secret()
        except BaseException:
            memory.close()
            raise
        return memory

    def open_waker(self) -> ZmqStream:
        # Before any GPU process is invited there.
        self._chosen_path = self._chosen_path or ChosenPath.of(self._endpoint)
        return ZmqStream(self.endpoint, "tee", self._secret)

    def end(self) -> None:
        """Removes what is there of the session and lets go of the name. Ending twice does nothing."""
        if not self._held.is_held:
            return
        if self._object is not None:
            # As a rule it is gone by now; not if a signal came between its making and whoever was to close it.
            self._object.remove()
        if self._chosen_path is not None:
            self._chosen_path.remove_dead_socket()
        self._held.let_go()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
