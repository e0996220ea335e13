"""Whether a cluster can be attached to, asked in a second: Ray itself would try for minutes, fail in riddles, or crash.

Nothing here imports ray before it is called.
"""

import os
import platform
import socket
from pathlib import Path

from rltune.errors import RunError, UserError
from rltune.orchestration.ray_private import Greeting, NoGreeting, greet

TIMEOUT_S = 10.0
"""In which a head answers that is alive, however busy."""
PORTS = {
    8265: " (the dashboard's port)",
    10001: " (the port of Ray Client)",
}
GCS_PORT = 6379


def check_kind(address: str) -> None:
    """Check that an address is of the kind that a driver attaches to.

    Raises:
        UserError: It is another of Ray's kinds, or none.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"--address: {address!r} is for Ray Client, whose runs end with the connection; a run attaches, on a node "
            f"of the cluster, to HOST:{GCS_PORT}, and from elsewhere goes there by 'rltune submit EXPERIMENT --address "
            "http://HOST:8265'"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"--address: {address!r} takes submitted runs: rltune submit EXPERIMENT --address {address}; this command "
            f"attaches, on a node of the cluster, to HOST:{GCS_PORT}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise UserError(
            f"--address: must be HOST:PORT (the port is usually {GCS_PORT}), auto or local, got {address!r}"
        )


def check_cluster(address: str, *, is_named: bool = True) -> None:
    """Check that a cluster answers, lets us in, is of our versions, and has a node on this machine.

    Args:
        address: ``HOST:PORT`` of its GCS.
        is_named: Whether the user has named it; else it was found on this machine.

    Raises:
        UserError: What is wrong is to be put right here.
        RunError: It does not answer, or only in part.
    """
    if not answers(address):
        raise RunError(
            f"--address: nothing answers at {address!r}; check host and port, or start a cluster there with "
            "'ray start --head'"
        )
    found = _greet(address)
    _check_versions(address, found)
    if found.is_private and not is_named:
        raise UserError(
            f"the Ray cluster that runs here, at {address}, belongs to a program that has started it for itself; write "
            f"--address local for one of your own, or --address {address} if it is that one you mean"
        )
    if not found.sockets:
        raise RunError(
            f"--address: the head of the cluster at {address!r} answers, but none of its nodes is alive; start it anew"
        )
    if not any(path.is_socket() for path in found.sockets):
        host = address.rpartition(":")[0]
        raise UserError(
            f"--address: this machine is no node of the cluster at {address!r}, and only from a node can one attach; "
            f"have the run go there, 'rltune submit EXPERIMENT --address http://{host}:8265', or make this machine a "
            f"node without trials: ray start --address={address} --num-cpus=0 --num-gpus=0"
        )


def _greet(address: str) -> Greeting:
    try:
        return greet(address, timeout_s=TIMEOUT_S)
    except NoGreeting as error:
        if error.code == "UNAUTHENTICATED":
            raise UserError(f"--address: the cluster at {address!r} {_refusal()}") from None
        if error.code == "DEADLINE_EXCEEDED":
            raise RunError(
                f"--address: the head at {address!r} accepts connections and does not answer within {TIMEOUT_S:.0f} s: "
                "it hangs or is overloaded; see its logs, or start it anew"
            ) from None
        port = PORTS.get(int(address.rpartition(":")[2]), "")
        raise RunError(
            f"--address: what listens at {address!r}{port} does not answer as the GCS of a Ray cluster; name its port, "
            f"usually {GCS_PORT} ({error})"
        ) from None


def _refusal() -> str:
    """Say why a cluster has not let us in. The token itself is never shown."""
    source, mode = token_source(), os.environ.get("RAY_AUTH_MODE", "")
    cure = "set RAY_AUTH_TOKEN to what 'ray get-auth-token' prints on its head, or copy the head's ~/.ray/auth_token"
    if mode and mode.lower() != "token":
        return f"asks for a token, and RAY_AUTH_MODE={mode} keeps it from being sent; unset that"
    if source is None and mode:
        return f"cannot be asked: RAY_AUTH_MODE={mode} wants a token, and there is none here; {cure}, or unset it"
    if source is None:
        return f"asks for a token, and there is none here; {cure}"
    return f"refuses the token of {source}; {cure}"


def _check_versions(address: str, found: Greeting) -> None:
    import ray

    ours, theirs = (ray.__version__, platform.python_version()), (found.ray_version, found.python_version)
    is_minor = os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch") == "minor"
    is_same = ours[0] == theirs[0] and (ours[1] == theirs[1] or (is_minor and _minor(ours[1]) == _minor(theirs[1])))
    if all(theirs) and not is_same:
        raise UserError(
            f"--address: the cluster at {address!r} runs Ray {theirs[0]} on Python {theirs[1]}, here are Ray {ours[0]} "
            f"and Python {ours[1]}; they must be the same: start the cluster from an environment as this one, or run "
            "rltune in the cluster's"
        )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def answers(address: str, *, timeout_s: float = 5.0) -> bool:
    """Return whether something listens at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except (OSError, ValueError):
        return False


def token_source() -> str | None:
    """Return where Ray will take a cluster's token from: a variable or a file; None where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or os.path.expanduser("~/.ray/auth_token"))
    return ("RAY_AUTH_TOKEN_PATH" if named else str(path)) if path.is_file() else None
