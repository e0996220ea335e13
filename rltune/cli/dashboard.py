"""``rltune dashboard``: the address of a cluster's dashboard, and what is to be seen there."""

from collections.abc import Sequence
from typing import Annotated

import typer

from rltune.cli.terminal import console, marked


def dashboard(
    address: Annotated[
        str | None,
        typer.Option(
            help="Cluster: HOST:PORT or http://HOST:8265. Else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or one here."
        ),
    ] = None,
) -> None:
    """Show where a cluster's dashboard is, how to get there from elsewhere, and what it shows now."""
    from rltune.orchestration.dashboard import find_dashboard, look, tunnel
    from rltune.orchestration.handshake import token_source

    server = find_dashboard(address)
    shown = look(server)
    console.print(server.url)
    going_on = [job.id for job in shown.jobs if not job.has_ended]
    lines = {
        "answers": f"Ray {server.ray_version}, {shown.num_nodes} node{'' if shown.num_nodes == 1 else 's'}",
        "tunnel": tunnel(server.url) and f"{tunnel(server.url)}, where only ssh gets there",
        "token": (source := token_source()) and f"the page asks for it: {source}",
        "jobs": f"{_some(going_on) or 'none of rltune goes on'}: {server.url}/#/jobs",
        "trials": "not kept on this cluster" if shown.train_runs is None else _some(shown.train_runs) or "none goes on",
        "metrics": f"{server.url}/#/metrics, once Prometheus and Grafana run",
    }
    for label, text in lines.items():
        if text:
            console.print(marked(f"{label:>11} ", "dim", text), soft_wrap=True)


def _some(names: Sequence[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
