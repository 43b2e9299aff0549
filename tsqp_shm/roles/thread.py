"""A role on a thread of this process: what `RoleProcess` is to one in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.roles.lifeline import RELAYED_ERRORS

# A role whose peer's heartbeat has stopped ends by itself within a second.
STOP_S = 2.0


class RoleThread:
    """The holder's end; use `RoleThread.start`."""

    def __init__(self, role: str, play: Callable[[], object]) -> None:
        self.role = role
        self._play = play
        self._error: BaseException | None = None
        self._has_come_up = False
        # A daemon: what hangs on it must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=role, daemon=True)

    @classmethod
    def start(cls, role: str, play: Callable[[], object]) -> RoleThread:
        thread = cls(role, play)
        thread._thread.start()
        return thread

    def _run(self) -> None:
        try:
            self._play()
        except BaseException as error:
            # Whatever it is, whoever waits for this role is told it.
            self._error = error

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def death(self) -> TsqpError | None:
        """Why it ended, or None while it lives.

        Returns:
            The error it ended with, if it has not come up yet and it is one that the caller can mend; else PeerDied
            with what it said.
        """
        if self._thread.is_alive():
            return None
        if self._error is None:
            return PeerDied(self.role, "its thread ended")
        if isinstance(self._error, RELAYED_ERRORS) and not self._has_come_up:
            return self._error
        return PeerDied(self.role, f"its thread ended by {type(self._error).__name__}", str(self._error))

    def came_up(self) -> None:
        """The session has begun: from here on an end of any kind is a death, after which another may be started."""
        self._has_come_up = True

    def stop(self) -> None:
        """Waits until it has ended by itself, a while at most: nothing ends a thread from outside."""
        self._thread.join(STOP_S)

    def kill(self) -> None:
        """One that is only believed dead ends when it sees that its peer's heartbeat has stopped."""
