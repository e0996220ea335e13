"""What a store does, on a server of S3 on loopback; what a user is told of one that denies him, or does not answer."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

from rltune.errors import StorageError, UserError
from rltune.runs.objects import Entry, ObjectStore, copied, open_store
from tests import storage
from tests.storage import BUCKET, Faulty


def test_what_is_written_is_read_whole(store: ObjectStore) -> None:
    assert store.read("trials/001/trial.json") is None
    store.write("trials/001/trial.json", b"one")
    store.write("trials/001/trial.json", b"another")
    assert store.read("trials/001/trial.json") == b"another"
    store.write("empty", b"")
    assert store.read("empty") == b""


def test_a_folder_is_listed_with_all_below_it_and_nothing_beside_it(store: ObjectStore) -> None:
    for key in ("a/1", "a/b/22", "ab/1", "c"):
        store.write(key, key.encode())
    assert {key: entry.size for key, entry in store.list("a/").items()} == {"a/1": 3, "a/b/22": 6}
    assert list(store.list()) == ["a/1", "a/b/22", "ab/1", "c"]
    assert list(store.list("c")) == ["c"]
    assert store.list("nosuch/") == {} == store.list("nosuch") == store.list("a")


def test_what_is_deleted_is_gone_and_may_be_deleted_again(store: ObjectStore) -> None:
    store.write("a/1", b"x")
    store.delete("a/1")
    store.delete("a/1")
    assert store.read("a/1") is None
    assert store.list() == {}


def test_lines_are_added_as_objects_that_sort_by_time_whatever_the_clock(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append("log.jsonl", ["1", "2"])
    monkeypatch.setattr(time, "time_ns", lambda: 1)  # set back
    store.append("log.jsonl", ["3"])
    store.append("log.jsonl", [])
    assert [store.read(key) for key in store.list("log.jsonl.d/")] == [b"1\n2\n", b"3\n"]


def test_a_file_that_is_brought_down_has_the_time_of_its_object(store: ObjectStore, tmp_path: Path) -> None:
    store.write("a/b", b"x")
    copied(store, "a/b", tmp_path / "a" / "b", Entry(1, 1_700_000_000_000_000_000))
    assert (tmp_path / "a" / "b").read_bytes() == b"x"
    assert os.stat(tmp_path / "a" / "b").st_mtime_ns == 1_700_000_000_000_000_000
    copied(store, "gone", tmp_path / "gone", Entry(1, 0))
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("memory://runs", "no run can lie there; write one of s3://, gs://"),
        ("file:///shared/runs", "write the folder itself, /shared/runs"),
        ("s3://", "names no bucket"),
        ("s3://key:password@bucket/runs", "may not hold a secret"),
        ("s3://bucket/runs?bogus=1", "cannot be used"),
        ("gs://bucket/runs?bogus=1", "cannot be used"),
        ("gs://", "names no bucket"),
    ],
)
def test_an_address_that_cannot_be_used_says_why(uri: str, why: str, s3: str) -> None:
    with pytest.raises(UserError) as found:
        open_store(uri)
    assert why in str(found.value)
    assert "password@" not in str(found.value)


def test_a_bucket_that_is_not_there_is_named_at_once(s3: str) -> None:
    with pytest.raises(StorageError, match=r"^s3://nosuch/runs/a: there is no such bucket"):
        open_store("s3://nosuch/runs").write("a", b"x")


def test_a_bucket_of_google_s_that_is_not_there_is_named_too(gcs: str) -> None:
    uri = storage.gcs_address(gcs, "runs").replace(BUCKET, "nosuch")
    with pytest.raises(StorageError, match=r"^gs://nosuch/runs/a\?.*: there is no such bucket; make it"):
        open_store(uri).write("a", b"x")


def denied(call: str, path: str) -> None:
    raise OSError(f"When writing {path}: AWS Error ACCESS_DENIED during PutObject operation: Access Denied")


def test_who_may_not_is_told_so_at_once(s3: str) -> None:
    faulty, store = behind_faults("mix")
    faulty.fault = denied
    with pytest.raises(StorageError, match=r"^s3://bucket/mix/front.json: access is denied; give this machine cred"):
        store.write("front.json", b"x")
    assert len(faulty.calls) == 1


def behind_faults(name: str) -> tuple[Faulty, ObjectStore]:
    own: Any = open_store(f"s3://{BUCKET}/{name}")
    faulty = Faulty(own._system)
    return faulty, ObjectStore(own.uri, faulty, own._root, waits_s=(0.0, 0.0))


@pytest.mark.long
@pytest.mark.parametrize(
    ("status", "code", "read", "listed"),
    [
        (403, "AccessDenied", "access is denied; give this machine cred", "access is denied; give this machine cred"),
        (403, "InvalidAccessKeyId", "access is denied", "its credentials are not known there; put them right"),
        (400, "ExpiredToken", "its credentials have expired, or", "its credentials have expired; get new ones"),
        (400, "AuthorizationHeaderMalformed", "in another region", "in another region"),
        (503, "SlowDown", "the store wants fewer requests", "the store wants fewer requests"),
        (500, "InternalError", "the store has a fault of its own", "the store has a fault of its own"),
    ],
)
def test_what_a_server_of_s3_says_is_told_in_words(
    status: int, code: str, read: str, listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes through pyarrow, which has more of it for a listing than for an object, where there is no body."""
    for name, value in storage.environment("").items():
        monkeypatch.setenv(name, value)
    with storage.refusing_server(status, code) as (server, requests):
        own: Any = open_store(f"s3://{BUCKET}/x?endpoint_override={server}&scheme=http")
        store = ObjectStore(own.uri, own._system, own._root, waits_s=(0.0,))
        for action, words in ((lambda: store.read("a"), read), (store.list, listed)):
            requests.clear()
            with pytest.raises(StorageError, match=re.escape(words)) as found:
                action()
            assert str(found.value).startswith(f"s3://{BUCKET}/x")
            # what another try would meet again is not tried again
            assert (len(requests) == 1) == (status < 500)
        requests.clear()
        with pytest.raises(StorageError):
            store.write("a", b"x" * 1000)
        assert set(requests) == {"PUT"}  # of one request, not of an upload in parts


def test_what_fails_for_a_moment_is_tried_again(s3: str) -> None:
    faulty, store = behind_faults("slow")
    left = [2]

    def slow(call: str, path: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("AWS Error SLOW_DOWN during PutObject operation: reduce your request rate")

    faulty.fault = slow
    store.write("front.json", b"x")
    assert (store.read("front.json"), left) == (b"x", [0])


def test_a_store_that_is_gone_is_said_to_be_with_its_address() -> None:
    system = S3FileSystem(
        access_key="a", secret_key="b", region="us-east-1", endpoint_override="127.0.0.1:9", scheme="http"
    )
    faulty = Faulty(system)

    def gone(call: str, path: str) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect")

    faulty.fault = gone
    store = ObjectStore("s3://bucket/mix", faulty, "bucket/mix", waits_s=(0.0,))
    with pytest.raises(StorageError, match=r"^s3://bucket/mix/a: the store does not answer; .* same command resumes"):
        store.read("a")
    assert len(faulty.calls) == 2
