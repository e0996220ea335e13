"""Stores of both kinds that there is a server for."""

from collections.abc import Iterator

import pytest

from rltune.runs.objects import ObjectStore, open_store
from tests import storage


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    """An emulator of Google's storage -> ``host:port``."""
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    with storage.gcs_server() as server:
        yield server


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """An empty store."""
    name = request.node.originalname
    if request.param == "gs":
        return open_store(storage.gcs_address(request.getfixturevalue("gcs"), name))
    request.getfixturevalue("s3")
    return open_store(f"s3://{storage.BUCKET}/{name}")
