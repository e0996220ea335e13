"""A Ray cluster over hosts with addresses and folders of their own. Its head, which one attaches to, has no CPU."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration import processes
from tests.orchestration.hosts import HERE, Hosts, hosts, kill
from tests.orchestration.processes import PATIENCE_S, descendants, name_of

ADDRESS = f"{HERE}:6379"
WORKERS = ("10.77.0.1", "10.77.0.2")
TOKEN = "70c3" * 16
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000"]
COUNT = f"""
import time
from rltune.orchestration.ray_private import NoGreeting, greet
count = -1
while True:
    try:
        found = len(greet("{ADDRESS}", timeout_s=5).sockets)
    except NoGreeting:
        found = 0
    if found != count:
        print(found, flush=True)
        count = found
    time.sleep(0.5)
"""
"""Prints how many nodes are alive whenever it changes."""
ASK = """
import json, sys
from urllib.request import urlopen
import ray
from ray.util.state import list_actors
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
alive = list_actors(sys.argv[1], filters=[("state", "=", "ALIVE")], detail=True)
ports = [(row["NodeManagerAddress"], row["MetricsExportPort"]) for row in ray.nodes() if row["Alive"]]
answer = {
    "actors": [row.class_name for row in alive],
    "names": [row.repr_name for row in alive],
    "metrics": {host: urlopen(f"http://{host}:{port}/metrics").read().decode() for host, port in ports},
}
print("answer", json.dumps(answer))
"""
RAY_S_OWN = {"_AutoscalingCoordinatorActor"}
"""Actors that Ray starts once a cluster, for whoever uses it, and that take no resources."""


@dataclass
class RayHosts:
    """The cluster: a head at ``HERE``, and workers of one CPU each."""

    hosts: Hosts
    root: Path
    environment: dict[str, str]
    _rays: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        """A folder that all hosts share."""
        return self.root / "shared"

    @property
    def private(self) -> Path:
        """A folder of which each host has its own."""
        return self.root / "private"

    def rltune(self, *arguments: str, at: str = HERE, **variables: str) -> subprocess.Popen[str]:
        """Start rltune on a host."""
        command = [sys.executable, "-c", processes.MAIN, *arguments, "--address", ADDRESS]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return self.hosts.start(at, command, env=self.environment | variables, **pipes)

    def start_ray(self, address: str, *, num_cpus: int = 0) -> None:
        """Make a host a node, its head where it is ``HERE``."""
        node = [f"--address={ADDRESS}"]
        if address == HERE:
            node = ["--head", "--port=6379", f"--temp-dir={self.root / 'ray'}"]
        command = [*START, *node, f"--num-cpus={num_cpus}", f"--node-ip-address={address}"]
        with (self.root / "log").open("a") as log:
            self._rays[address] = self.hosts.start(address, command, env=self.environment, stdout=log, stderr=log)

    def kill_ray(self, *addresses: str) -> None:
        """Kill the node of each host, all at once."""
        kill([self._rays.pop(address) for address in addresses])

    def start_nodes(self) -> None:
        """Start Ray everywhere, one node after the other."""
        self.start_ray(HERE)
        counting = self.hosts.start(
            HERE, [sys.executable, "-c", COUNT], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert counting.stdout is not None
        for line in counting.stdout:
            if (count := int(line)) == 1 + len(WORKERS):
                break
            if count > 0:
                self.start_ray(WORKERS[count - 1], num_cpus=1)
        else:
            pytest.fail((self.root / "log").read_text())
        counting.kill()

    def busy(self) -> list[str]:
        """Return the addresses of the hosts on which workers of Ray Train are."""
        found = {address: descendants(node.pid) for address, node in self._rays.items()}
        return [address for address, pids in found.items() if any(map(_is_worker, pids))]

    def ask(self) -> dict[str, Any]:
        """Return what Ray tells of actors that are alive, and the page of figures of each node by its address."""
        process = self.hosts.start(
            HERE, [sys.executable, "-c", ASK, ADDRESS], env=self.environment, stdout=subprocess.PIPE
        )
        output, _ = process.communicate(timeout=PATIENCE_S)
        found: dict[str, Any] = json.loads(output.partition("answer ")[2])
        found["actors"] = [name for name in found["actors"] if name not in RAY_S_OWN]
        return found


def _is_worker(pid: int) -> bool:
    return name_of(pid).startswith("ray::RayTrainWorker")


@contextmanager
def ray_hosts(own_variables: Mapping[str, str] | None = None) -> Iterator[RayHosts]:
    """Bring the cluster up for as long as the block runs; with variables, each host also keeps caches of its own."""
    root = Path(tempfile.mkdtemp(prefix="rlt-"))  # not pytest's: a socket's path must not be long
    own = [root / "ray", root / "private"]
    for folder in (*own, root / "shared"):
        folder.mkdir()
    variables = processes.environment(pause_s=0.3) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    if own_variables:
        variables |= {**own_variables, "XDG_CACHE_HOME": str(root / "private")}
    try:
        with hosts(own) as found:
            for address in WORKERS:
                found.add(address)
            cluster = RayHosts(found, root, variables)
            cluster.start_nodes()
            yield cluster
    finally:
        shutil.rmtree(root, ignore_errors=True)
