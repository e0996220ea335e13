"""Hosts of a network of their own on this machine: network namespaces with their own addresses and folders.

``HERE`` is the place where their network meets, and a machine of its own too. No root is needed where the kernel lets
users make namespaces.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.orchestration.processes import descendants

HERE = "10.77.0.254"
REASON = "network namespaces are not allowed on this machine"


def are_allowed() -> bool:
    """Whether a user may make namespaces here, and has the tools."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    make = "ip link add name br0 type bridge && mount -t tmpfs none /mnt"
    tried = ["unshare", "-Urnm", "--propagation", "private", "sh", "-c", make]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


class Hosts:
    """Places by address, each a process that holds its namespaces open.

    Args:
        private: Folders of which each place has its own, empty at first.
    """

    def __init__(self, private: Sequence[Path]) -> None:
        self._private = private
        self._places: dict[str, subprocess.Popen[str]] = {}
        self._started: dict[str, list[subprocess.Popen[str]]] = {}

    def open(self) -> None:
        """Make the place where the network meets."""
        net = f"ip link add name br0 type bridge && ip addr add {HERE}/24 dev br0 && ip link set br0 up"
        self._hold(HERE, ["unshare", "-Urnm", "--propagation", "private"], net)

    def add(self, address: str) -> None:
        """Make a host."""
        self._hold(address, [*self._enter(HERE), "unshare", "-nm"], "true")
        name, pid = _link_of(address), self._places[address].pid
        link = f"ip link add name {name} type veth peer name eth0 netns {pid} && ip link set {name} master br0 up"
        subprocess.run([*self._enter(HERE), "sh", "-c", link], check=True)
        own = f"ip addr add {address}/24 dev eth0 && ip link set eth0 up"
        subprocess.run([*self._enter(address), "sh", "-c", own], check=True)

    def start(self, address: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process at a place."""
        process = subprocess.Popen([*self._enter(address), *command], text=True, **options)
        self._started.setdefault(address, []).append(process)
        return process

    def kill(self, address: str) -> None:
        """Kill all that was started at a place, at once."""
        kill(self._started.pop(address, []))

    def cut(self, address: str) -> None:
        """Take a host off the network; what it sends and is sent is lost without a word."""
        self._link(address, "down")

    def mend(self, address: str) -> None:
        """Bring it back."""
        self._link(address, "up")

    def _link(self, address: str, state: str) -> None:
        subprocess.run([*self._enter(HERE), "ip", "link", "set", _link_of(address), state], check=True)

    def close(self) -> None:
        """End all."""
        for address in list(self._started):
            self.kill(address)
        for process in self._places.values():
            process.communicate("")

    def _hold(self, address: str, make: Sequence[str], net: str) -> None:
        mounts = "".join(f" && mount -t tmpfs none '{folder}'" for folder in self._private)
        script = f"ip link set lo up && {net}{mounts} && echo ready && exec cat"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = self._places[address] = subprocess.Popen([*make, "sh", "-c", script], **pipes)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    def _enter(self, address: str) -> list[str]:
        pid = str(self._places[address].pid)
        return ["nsenter", "--preserve-credentials", "-U", "-n", "-m", f"--wd={Path.cwd()}", "-t", pid]


def _link_of(address: str) -> str:
    return f"v{address.rpartition('.')[2]}"


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kill processes with all that they have started, at once."""
    for pid in {pid for process in processes for pid in (process.pid, *descendants(process.pid))}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for process in processes:
        if process.stdout is None or not process.stdout.closed:  # whoever has read one to its end has closed it
            process.communicate()


@contextmanager
def hosts(private: Sequence[Path]) -> Iterator[Hosts]:
    """Make a network for as long as the block runs."""
    with ExitStack() as stack:
        found = Hosts(private)
        stack.callback(found.close)
        found.open()
        yield found
