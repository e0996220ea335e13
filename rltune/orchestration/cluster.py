"""Find, start and leave a Ray cluster. Everything here that must be set before ray is imported is set here."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rltune.errors import RunError, UserError
from rltune.orchestration.handshake import answers, check_cluster, check_kind, token_source
from rltune.orchestration.head_watch import head_watched
from rltune.orchestration.nodes import Node, read_nodes
from rltune.orchestration.places import find_place, ray_s_temporary_folder, token_folder
from rltune.orchestration.ray_private import BEHAVIOUR, LOCAL, NEEDED, QUIET, address_file, init_options
from rltune.orchestration.scratch import Scratch, scratch

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
"""Where torch's process groups meet on one machine."""
SILENT: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
"""Options of ``ray.init``."""


@dataclass(frozen=True)
class Cluster:
    """A connected cluster."""

    address: str
    is_own: bool
    """Whether this process started it, and it ends with this process."""
    dashboard_url: str
    nodes: tuple[Node, ...]
    """Those that were alive when it was connected."""
    scratch: Scratch | None = None
    """Where the files of one that this process started are."""

    @property
    def num_nodes(self) -> int:
        """Nodes, those included that run no worker."""
        return len(self.nodes)

    @property
    def logs(self) -> str:
        """Where the logs of its processes are, as far as can be said."""
        return "/tmp/ray/session_latest/logs on its node" if self.scratch is None else str(self.scratch.logs)

    def keep_logs(self) -> None:
        """Have the logs of a cluster that this process started stay for a day, though the run ends well."""
        if self.scratch is not None:
            self.scratch.is_kept = True


def find_address(address: str | None) -> str | None:
    """Return where to attach, None to start a cluster.

    The option, else what this process is connected to, else ``RAY_ADDRESS``, else the cluster that its user has started
    on this machine with ``ray start``; never one that another run has started for itself. ``auto`` is the same without
    starting one, ``local`` always starts one.

    Raises:
        UserError: ``auto`` finds none.
    """
    named = address if address not in (None, "", "auto") else _connected_to() or os.environ.get("RAY_ADDRESS")
    if named == "local":
        return None
    found = _running_here() if named in (None, "", "auto") else named
    if found is None and "auto" in (address, named):
        raise UserError(
            "--address: auto finds no cluster on this machine; start one with 'ray start --head', name it as "
            "HOST:PORT, or leave --address out: a run then starts its own"
        )
    return found


def prepare(address: str | None) -> str | None:
    """Set what Ray reads from the environment when it is imported, and return where to attach, None to start.

    Call it before anything that may import ray; accelerate does. What the user has set stays.
    """
    found = find_address(address)
    wanted = QUIET | BEHAVIOUR
    if found is None or found.startswith(("127.", "localhost:")):
        wanted |= LOCAL | LOOPBACK  # Ray rewrites a loopback address to the machine's own unless the client too is told
    if found is not None and token_source():
        wanted["RAY_AUTH_MODE"] = "token"  # Ray itself would not send it; a cluster that asks for none does not mind
    if found is None and not token_source() and token_folder() is None:
        wanted["RAY_AUTH_TOKEN"] = uuid.uuid4().hex + uuid.uuid4().hex  # Ray would write one into HOME, or not start
    _set_unless_set(wanted)
    return found


def _set_unless_set(wanted: Mapping[str, str]) -> None:
    os.environ.update(NEEDED)
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})


@contextmanager
def connect(address: str | None, *, num_cpus: int | None = None) -> Iterator[Cluster]:
    """Attach to a cluster or start one on this machine, and leave it at the end; one that we started ends.

    A connection that the caller has made already (``ray.init`` in a notebook) is used and left as it is. While
    connected, SIGTERM is taken as Ctrl-C: Ray's own handler would abort without saving anything.

    Args:
        address: ``host:port``, ``auto``, ``local``, or None for what ``find_address`` finds.
        num_cpus: CPUs of a cluster that is started here; all by default.

    Raises:
        UserError: The address is of a kind that cannot be attached to, or Ray has no folder for its files.
        RunError: There is no cluster at the address, or it could not be started.
    """
    if (connected := _connected_to()) is not None:
        if address not in (None, "auto", connected):
            raise UserError(
                f"address: this process is connected to the Ray cluster at {connected}, got {address!r}; call "
                "ray.shutdown() first, or leave it out"
            )
        _set_unless_set(QUIET | BEHAVIOUR)  # Tune reads its own when a sweep begins
        with _quiet():
            yield _describe(connected, is_own=False)
        return
    found = prepare(address)
    if found is None:
        with _started(num_cpus) as cluster, _quiet():
            yield cluster
        return
    check_kind(found)
    check_cluster(found, is_named=found in (address, os.environ.get("RAY_ADDRESS")))
    with _attached(found) as cluster, _quiet(), head_watched(found):
        yield cluster


def _connected_to() -> str | None:
    """Return the cluster that this process has connected to without us; None where it has not."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _attached(found: str) -> Iterator[Cluster]:
    """Connect to a cluster that is there."""
    import ray

    advice = "check address and token (RAY_AUTH_TOKEN)"
    with _explained(f"--address: no Ray cluster answers at {found!r}", advice):
        context = ray.init(address=found, **SILENT)
    try:
        yield _describe(found, is_own=False, dashboard=context.dashboard_url)
    finally:
        ray.shutdown()


@contextmanager
def _started(num_cpus: int | None) -> Iterator[Cluster]:
    """Start a cluster on this machine."""
    place = find_place()
    if not place.is_usable:
        raise UserError(
            f"a local Ray cluster cannot keep its files in {place.folder}: {place.fault}; set RAY_TMPDIR to a folder "
            "with a short path that can be written"
        )
    import ray

    with scratch(place) as found:
        advice = f"see {found.logs}, and what 'rltune doctor' says"
        with _temporary_folder(found.python), _explained("a local Ray cluster did not start", advice):
            options = init_options(str(found.ray)) | SILENT
            context = ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, **options)
        try:
            address = context.address_info["gcs_address"]
            if not address.startswith("127."):
                raise RunError(
                    f"the local Ray cluster listens at {address}, not on loopback alone: ray was imported before "
                    "rltune could say so; start Python anew, or call ray.init() first, which is then used"
                )
            yield replace(_describe(address, is_own=True, dashboard=context.dashboard_url), scratch=found)
        finally:
            ray.shutdown()


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except SystemExit as end:  # Ray's own handler of SIGTERM, until ours stands in its place
        raise KeyboardInterrupt from end
    except Exception as error:  # ray raises whatever its layers raise
        raise RunError(f"{what}: {error}; {advice}") from error


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[None]:
    """Have the processes that are started inside keep their temporary files in a folder."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        os.environ.update({} if before is None else {"TMPDIR": before})


def _describe(address: str, *, is_own: bool, dashboard: str | None = None) -> Cluster:
    import ray

    return Cluster(
        address=address,
        is_own=is_own,
        dashboard_url=f"http://{dashboard}" if dashboard else "",
        nodes=read_nodes(ray.nodes()),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's loggers from speaking, and its handler of SIGTERM from acting, inside."""
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # why a trial failed stands in its result, in words
    previous = _term_as_interrupt()
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _term_as_interrupt() -> Any:
    try:
        return signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread, where a signal could not be handled anyway
        return None


def _running_here() -> str | None:
    """Return the address that ``ray start --head`` left on this machine, if something still listens there."""
    try:
        address = address_file(ray_s_temporary_folder()).read_text().strip()
    except OSError:
        return None
    return address if answers(address, timeout_s=0.5) else None
