"""``rltune doctor``: everything that decides whether a run can start, one line each, here and on a cluster's nodes."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rltune.assets import (
    BUILTIN_AESTHETIC_HEAD,
    BUILTIN_CLIP_DIR,
    BUILTIN_COUNTER,
    BUILTIN_JUDGE,
    BUILTIN_PIPELINE_DIR,
)
from rltune.cli.arguments import AddressOption, place
from rltune.cli.terminal import console, marked
from rltune.errors import RltuneError

if TYPE_CHECKING:
    from rltune.orchestration.cluster import Cluster
    from rltune.orchestration.survey import View

OK, NOTE, BAD = "ok", "note", "bad"
STYLES = {OK: "green", NOTE: "yellow", BAD: "red"}
FREE_GIB = 5.0
"""Of disk, below which a run with checkpoints may not end."""
SHM_SHARE = 0.3
"""Of memory, which Ray's object store takes in /dev/shm."""
SKEW_S = 5.0
"""Of clocks, above which durations that two nodes have measured are told of as doubtful."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: str
    what: str


def doctor(
    address: AddressOption = None,
    storage: Annotated[
        Path | None, typer.Option(help="Where runs are to lie, as of a run: every node tries it.", parser=place)
    ] = None,
) -> None:
    """Show what is installed, which weights are here, and whether a cluster, its nodes and its storage answer."""
    from rltune.orchestration.cluster import prepare

    prepare(address)  # before anything imports ray
    diagnose(address, storage)


def diagnose(address: str | None, storage: Path | str | None = None) -> None:
    """Print the report. Attaches to a cluster if there is one, and runs a small task on each of its nodes; starts none.

    Args:
        address: Of a cluster, as of a run.
        storage: Folder of runs, or the address of one, that nodes must share; left out, they are not asked for it.

    Raises:
        RltuneError: Something that every run needs is missing; it has been printed.
    """
    findings: list[Finding] = []
    for finding in _findings(address, storage):
        console.print(marked(f"{finding.mark:4}", STYLES[finding.mark], finding.what), soft_wrap=True)
        findings.append(finding)
    num_bad = sum(finding.mark == BAD for finding in findings)
    if num_bad:
        raise RltuneError(f"doctor: {num_bad} finding(s) marked bad stop every run; see above for what to do")


def _findings(address: str | None, storage: Path | str | None) -> Iterator[Finding]:
    yield Finding(OK, f"Python {platform.python_version()} on {platform.platform()}")
    from rltune.runs.record import LIBRARIES

    for library in ("rltune", *LIBRARIES):
        try:
            yield Finding(OK, f"{library} {version(library)}")
        except PackageNotFoundError:
            yield Finding(BAD, f"{library} is not installed; run: pip install rltune")
    yield from _ray_extras()
    yield from _hardware()
    yield from _weights()
    yield from _cluster(address, storage)


def _ray_extras() -> Iterator[Finding]:
    try:
        version("aiohttp")
    except PackageNotFoundError:
        yield Finding(BAD, "ray has no dashboard parts, without which stopped trials leak; pip install 'ray[default]'")


def _hardware() -> Iterator[Finding]:
    import torch

    num_gpus = torch.cuda.device_count()
    for i in range(num_gpus):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(OK, f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not num_gpus:
        yield Finding(NOTE, f"no GPU; {os.cpu_count()} CPU cores: enough for the built-in model, not for SD 1.5")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(OK, f"{memory_gib:.0f} GiB of memory")
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    advice = "" if free_gib > FREE_GIB else "; free some, or give --storage a folder on another: checkpoints take room"
    yield Finding(NOTE if advice else OK, f"{free_gib:.0f} GiB free on the disk of {Path.cwd()}{advice}")
    if os.path.isdir("/dev/shm"):
        mark, what = _shared_memory(shutil.disk_usage("/dev/shm").total / 2**30, memory_gib)
        yield Finding(mark, what)


def _shared_memory(shm_gib: float, memory_gib: float) -> tuple[str, str]:
    what = f"{shm_gib:.3g} GiB of shared memory (/dev/shm)"
    if shm_gib >= SHM_SHARE * memory_gib:
        return OK, what
    need = f"{SHM_SHARE * memory_gib:.0f}"
    return NOTE, f"{what}; Ray takes up to {need} GiB of it and is slower on disk: docker run --shm-size={need}g"


def _weights() -> Iterator[Finding]:
    needed = (BUILTIN_PIPELINE_DIR, BUILTIN_CLIP_DIR, BUILTIN_AESTHETIC_HEAD, BUILTIN_COUNTER, BUILTIN_JUDGE)
    missing = [path for path in needed if not path.exists()]
    if missing:
        yield Finding(BAD, f"built-in weights are missing: {missing[0]}; install rltune again")
    else:
        yield Finding(OK, "built-in model and rewards are in the package")
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        repos = []
    for repo in repos:
        yield Finding(OK, f"Hugging Face cache: {repo.repo_id}, {repo.size_on_disk_str}")
    if not repos:
        yield Finding(NOTE, "the Hugging Face cache is empty; base models are fetched with: rltune models fetch ID")
    yield from _reward_weights()


def _reward_weights() -> Iterator[Finding]:
    from rltune.rewards.base import REWARDS

    names = REWARDS.names()
    waiting = [name for name in names if REWARDS.card(name).missing]
    ready = [name for name in names if name not in waiting]
    more = f"; {len(waiting)} more need published weights that are not: see 'rltune models'" if waiting else ""
    yield Finding(NOTE if waiting else OK, f"rewards that are ready to use here: {', '.join(ready)}{more}")


def _cluster(address: str | None, storage: Path | str | None) -> Iterator[Finding]:
    from rltune.orchestration.cluster import connect, find_address
    from rltune.orchestration.handshake import token_source
    from rltune.orchestration.nodes import describe

    source = token_source()
    yield Finding(OK, f"Ray's token comes from {source}" if source else "no token for Ray clusters is here")
    try:
        found = find_address(address)
        if found is None:
            yield Finding(NOTE, "no Ray cluster is running here; a run starts one of its own, on loopback only")
            yield from _places()
            return
        with connect(address) as cluster:
            yield Finding(OK, f"Ray cluster {found}: {describe(cluster.nodes)}")
            yield from _dashboard(cluster.dashboard_url)
            yield from _nodes(cluster, storage)
    except RltuneError as error:
        yield Finding(BAD, str(error))


def _dashboard(url: str) -> Iterator[Finding]:
    import requests

    if not url:
        yield Finding(
            NOTE, "the cluster has no dashboard; without it submitted runs and stopped trials have no way out"
        )
        return
    try:
        answer = requests.get(f"{url}/api/version", timeout=5)
    except requests.RequestException as error:
        what = f"the dashboard {url} does not answer ({type(error).__name__}); see dashboard.log on the head"
        yield Finding(BAD, f"{what}: without it stopped trials keep their workers")
        return
    asks = ", and asks for the token" if answer.status_code in (401, 403) else ""
    yield Finding(OK, f"dashboard {url} answers{asks}")


def _nodes(cluster: "Cluster", storage: Path | str | None) -> Iterator[Finding]:
    """Ask every node by a small task what it has, and whether it sees the storage."""
    from rltune.orchestration.survey import faults_of, folder_probe, store_probe, survey
    from rltune.runs.objects import open_store

    if storage is None:
        views = survey(cluster.nodes)
    else:
        with folder_probe(storage) if isinstance(storage, Path) else store_probe(open_store(storage)) as look:
            views = survey(cluster.nodes, look)
    for view in views:
        if not view.no_answer:
            yield Finding(OK, _node_line(view))
    for view in views:
        yield from _node_notes(view)
    for fault in faults_of(views, storage):
        yield Finding(BAD, fault)
    if storage is None and len(views) > 1:
        yield Finding(NOTE, "whether nodes share a folder for runs was not asked; give it with --storage")
    elif storage is not None and not any(view.no_storage or view.no_answer for view in views):
        what = "is the same folder on every node, and" if isinstance(storage, Path) else "answers every node, and"
        yield Finding(OK, f"{storage} {what} can be written there")


def _node_line(view: "View") -> str:
    sizes = {"memory": "of memory", "disk": "free for temporary files", "shm": "of shared memory"}
    parts = [f"{view.gib[name]:.3g} GiB {what}" for name, what in sizes.items() if name in view.gib]
    return ", ".join([f"node {view.node.name}: runs a task", *parts])


def _node_notes(view: "View") -> Iterator[Finding]:
    name = view.node.name
    if abs(view.clock_s) > SKEW_S:
        way = "ahead" if view.clock_s > 0 else "behind"
        what = f"node {name}: its clock is {abs(view.clock_s):.0f} s {way}; set it (NTP)"
        yield Finding(NOTE, f"{what}, or durations and budgets of time are wrong by as much")
    if view.gib.get("disk", FREE_GIB) < FREE_GIB:
        yield Finding(NOTE, f"node {name}: little room for temporary files; free some below its TMPDIR and /tmp/ray")
    if "shm" in view.gib and "memory" in view.gib:
        mark, what = _shared_memory(view.gib["shm"], view.gib["memory"])
        if mark != OK:
            yield Finding(mark, f"node {name}: {what}")


def _places() -> Iterator[Finding]:
    from rltune.orchestration.places import find_place, token_folder

    place = find_place()
    if not place.is_usable:
        what = f"a Ray cluster of a run cannot keep its files in {place.folder}: {place.fault}"
        yield Finding(BAD, f"{what}; set RAY_TMPDIR to a folder with a short path that can be written")
    elif not place.fault:
        yield Finding(OK, f"the Ray cluster of a run keeps its files in {place.folder}, while it runs")
    else:
        what = f"the Ray cluster of a run keeps its files in {place.folder}, while it runs, not below TMPDIR"
        yield Finding(NOTE, f"{what}: {place.fault}")
    if token_folder() is None:
        yield Finding(NOTE, "HOME is not there or cannot be written; a run keeps Ray's token in its environment")
