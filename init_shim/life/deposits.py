"""What an agent leaves with PID 1, so that the next one can go on with it: kept processes.

PID 1 looks into nothing of it but the pid, which tells it whose end it has reaped. It holds at most
KEPT_PROCESSES of them and one of the agent itself, each with at most KEPT_META characters and
SUPERVISION_DESCRIPTORS descriptors; what is more is not taken, and that is said.
"""

import os
import resource

from microguest.guest import bounds
from microguest.guest.status import exit_fields
from microguest.guest.supervision import AGENT_ID, Deposit, KeptExited, KeptStatus, Restored
from microguest.init_shim.reporter import say
from microguest.init_shim.timeline import boot_ms

__all__ = ["Deposits", "close_all"]


class Entry:
    """One deposit and its descriptors. `exited` is None while the process runs."""

    def __init__(self, message: Deposit, descriptors: list[int]) -> None:
        self.message = message
        self.descriptors = descriptors
        self.exited: KeptStatus | None = None

    def close(self) -> None:
        close_all(self.descriptors)


class Deposits:
    """All of them, in the order in which their ids came first."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, message: Deposit, descriptors: list[int]) -> bool:
        """Take over the descriptors, also where the deposit is refused. Whether it was taken."""
        earlier = self._entries.get(message.id)
        if earlier is None and len(self._entries) > bounds.KEPT_PROCESSES:
            close_all(descriptors)
            say(f"deposit {message.id} is refused: there are {len(self._entries)}")
            return False
        if len(descriptors) != 1 + len(message.names):
            close_all(descriptors)
            say(f"deposit {message.id} is refused: {len(descriptors)} descriptors came with it")
            return False
        entry = self._entries[message.id] = Entry(message, descriptors)
        if earlier is not None:
            if earlier.message.pid == message.pid:
                entry.exited = earlier.exited
            earlier.close()
        return True

    def withdraw(self, process_id: str) -> None:
        """Forget it; an unknown one is no error."""
        entry = self._entries.pop(process_id, None)
        if entry is not None:
            entry.close()

    def note_exit(self, message: KeptExited) -> None:
        """The agent says that it is about to reap it."""
        entry = self._entries.get(message.id)
        if entry is not None and entry.exited is None:
            entry.exited = status_of(message)

    def reaped(
        self, pid: int, wait_status: int, usage: resource.struct_rusage
    ) -> KeptExited | None:
        """PID 1 itself has reaped a child: what to tell the agent, where it is a deposited one.

        The pid cannot be another's: while the agent lives, its children are not PID 1's, and it
        announces their ends before their pids are free.
        """
        for process_id, entry in self._entries.items():
            if entry.message.pid == pid and entry.exited is None:
                message = KeptExited.from_map(
                    {
                        **exit_fields(wait_status),
                        "id": process_id,
                        "ended_ms": boot_ms(),
                        "user_seconds": usage.ru_utime,
                        "system_seconds": usage.ru_stime,
                        "max_rss_kib": usage.ru_maxrss,
                    }
                )
                entry.exited = status_of(message)
                return message
        return None

    def ids(self) -> list[str]:
        """In order."""
        return list(self._entries)

    def pids(self) -> set[int]:
        """Of kept processes, and the agent's own."""
        return {entry.message.pid for entry in self._entries.values()}

    def agents_meta(self) -> str:
        """What the agent has deposited about itself: the path of its cgroups, "" for none."""
        entry = self._entries.get(AGENT_ID)
        return "" if entry is None else entry.message.meta

    def restored(self, process_id: str) -> "tuple[Restored, list[int]] | None":
        """What to tell a new agent, with the descriptors, which stay; None where it is gone."""
        entry = self._entries.get(process_id)
        if entry is None:
            return None
        message = entry.message
        restored = Restored(
            id=message.id,
            pid=message.pid,
            meta=message.meta,
            names=message.names,
            exited=entry.exited,
        )
        return restored, entry.descriptors


def status_of(message: KeptExited) -> KeptStatus:
    """Without the id."""
    return KeptStatus(**{name: getattr(message, name) for name in KeptStatus._fields})


def close_all(descriptors: list[int]) -> None:
    """Close them."""
    for fd in descriptors:
        os.close(fd)
