"""``rltune doctor``: everything that decides whether a run can start, one line each."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rltune.assets import (
    BUILTIN_AESTHETIC_HEAD,
    BUILTIN_CLIP_DIR,
    BUILTIN_COUNTER,
    BUILTIN_JUDGE,
    BUILTIN_PIPELINE_DIR,
)
from rltune.cli.terminal import console, marked
from rltune.errors import RltuneError
from rltune.runs.record import LIBRARIES as RUN_LIBRARIES

LIBRARIES = ("rltune", *RUN_LIBRARIES)
OK, NOTE, BAD = "ok", "note", "bad"
STYLES = {OK: "green", NOTE: "yellow", BAD: "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: str
    what: str


def diagnose(address: str | None) -> None:
    """Print the report. Attaches to a cluster if there is one; starts none.

    Raises:
        RltuneError: Something that every run needs is missing; it has been printed.
    """
    findings: list[Finding] = []
    for finding in _findings(address):
        console.print(marked(f"{finding.mark:4}", STYLES[finding.mark], finding.what), soft_wrap=True)
        findings.append(finding)
    num_bad = sum(finding.mark == BAD for finding in findings)
    if num_bad:
        raise RltuneError(f"doctor: {num_bad} finding(s) marked bad stop every run; see above for what to do")


def _findings(address: str | None) -> Iterator[Finding]:
    yield Finding(OK, f"Python {platform.python_version()} on {platform.platform()}")
    for library in LIBRARIES:
        try:
            yield Finding(OK, f"{library} {version(library)}")
        except PackageNotFoundError:
            yield Finding(BAD, f"{library} is not installed; run: pip install rltune")
    yield from _ray_extras()
    yield from _hardware()
    yield from _weights()
    yield from _cluster(address)


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
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding(OK if free_gib > 5 else NOTE, f"{free_gib:.0f} GiB free on the disk of {Path.cwd()}")


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


def _cluster(address: str | None) -> Iterator[Finding]:
    from rltune.orchestration.cluster import connect, find_address
    from rltune.orchestration.nodes import describe

    found = find_address(address)
    if found is None:
        yield Finding(NOTE, "no Ray cluster is running here; a run starts one of its own, on loopback only")
        yield from _places()
        return
    try:
        with connect(address) as cluster:
            yield Finding(OK, f"Ray cluster {found}: {describe(cluster.nodes)}")
            if cluster.dashboard_url:
                yield Finding(OK, f"dashboard {cluster.dashboard_url}")
    except RltuneError as error:
        yield Finding(BAD, str(error))


def _places() -> Iterator[Finding]:
    from rltune.orchestration.places import find_place, token_folder

    place = find_place()
    if not place.is_usable:
        what = f"a Ray cluster of a run cannot keep its files in {place.folder}: {place.fault}"
        yield Finding(BAD, f"{what}; set RAY_TMPDIR to a folder with a short path that can be written")
    elif place.is_ray_s_own:
        yield Finding(OK, f"Ray keeps its files in {place.folder / 'ray'}")
    else:
        yield Finding(NOTE, f"Ray keeps its files in {place.folder / 'ray'}, not below TMPDIR: {place.fault}")
    if token_folder() is None:
        yield Finding(NOTE, "HOME is not there or cannot be written; a run keeps Ray's token in its environment")
