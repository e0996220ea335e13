"""Jobs of rltune on a cluster: which they are, following them, and the script that runs on the head."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from rltune.errors import RunError, UserError
from rltune.orchestration import jobs, on_head
from rltune.orchestration.jobs import (
    Job,
    check_storage,
    find_job,
    follow,
    free_id,
    job_of,
    list_jobs,
    on_the_head,
    stop,
)
from rltune.runs.objects import open_store
from tests.orchestration.fake_jobs import FakeServer, details_of
from tests.storage import BUCKET

MIX = {"rltune": "0.1.0", "name": "mix", "experiment": "mix.yaml", "run": "/shared/runs/mix"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    return FakeServer(folder=tmp_path)


def hand_in(server: FakeServer, job_id: str, work: Path, **about: str) -> Job:
    work.mkdir(exist_ok=True)
    server.submit_job(entrypoint="", submission_id=job_id, runtime_env={"working_dir": str(work)}, metadata=MIX | about)
    return find_job(server, job_id)


def test_a_job_says_which_run_it_is() -> None:
    found = job_of(details_of("rltune-mix", "SUCCEEDED"))
    assert found is not None
    assert (found.id, found.name, found.run, found.state) == ("rltune-mix", "mix", "/shared/runs/mix", "succeeded")
    assert found.has_ended
    pending = job_of(details_of("rltune-mix", "PENDING"))
    assert pending is not None
    assert not pending.has_ended


def test_the_newest_comes_first_and_other_people_s_jobs_do_not(server: FakeServer, tmp_path: Path) -> None:
    hand_in(server, "rltune-mix", tmp_path / "a")
    server.submit_job(entrypoint="", submission_id="x", runtime_env={"working_dir": str(tmp_path / "a")})
    hand_in(server, "rltune-mix-2", tmp_path / "a")
    assert [job.id for job in list_jobs(server)] == ["rltune-mix-2", "rltune-mix"]
    assert find_job(server, "mix").id == "rltune-mix-2"
    assert find_job(server, "rltune-mix").id == "rltune-mix"
    with pytest.raises(UserError, match=r"no job 'max' of rltune; the newest there: rltune-mix-2, rltune-mix$"):
        find_job(server, "max")


def test_each_job_of_a_run_has_its_own_id() -> None:
    assert free_id("mix", set()) == "rltune-mix"
    assert free_id("mix", {"rltune-mix", "rltune-mix-2", "rltune-max"}) == "rltune-mix-3"


@pytest.mark.parametrize("storage", [None, "runs", "./runs", "/tmp/ray/session_latest/runs"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_a_storage_that_goes_with_the_job_is_refused(storage: str | None, unpacked: bool) -> None:
    if unpacked:
        storage = f"/data/ray/session_1_2/runtime_resources/working_dir_files/_ray_pkg_1/{storage}"
    with pytest.raises(UserError, match=r"^--storage: .*give the absolute path of a folder that all nodes share"):
        check_storage(storage)


def test_a_folder_of_the_cluster_is_taken() -> None:
    assert check_storage("/shared/runs/") == "/shared/runs"


@pytest.mark.parametrize("storage", ["s3://bucket/runs", "s3:/bucket/runs", "gs://bucket/runs"])
def test_an_address_is_taken_as_it_was_meant(storage: str) -> None:
    assert check_storage(storage) == storage.replace(":/b", "://b")


def test_an_address_that_none_can_be_is_refused_before_the_cluster_is_asked() -> None:
    with pytest.raises(UserError, match="no run can lie there; write one of s3://"):
        check_storage("http://bucket/runs")


def test_a_log_is_followed_through_broken_connections(server: FakeServer, tmp_path: Path) -> None:
    """Each connection gives the log from its beginning."""
    job = hand_in(server, "rltune-mix", tmp_path / "a")
    server.chunks[:] = [["one\n", RuntimeError("cut")], [RuntimeError("cut")], ["on", "e\ntwo\n"]]
    said: list[str] = []
    assert follow(server, job, said.append).state == "succeeded"
    assert "".join(said) == "one\ntwo\n"


def test_a_log_that_breaks_often_and_goes_on_each_time_is_followed(server: FakeServer, tmp_path: Path) -> None:
    job = hand_in(server, "rltune-mix", tmp_path / "a")
    lines = [f"{number}\n" for number in range(jobs.MAX_BREAKS + 3)]
    server.chunks[:] = [[*lines[: count + 1], RuntimeError("cut")] for count in range(len(lines))] + [[*lines]]
    said: list[str] = []
    assert follow(server, job, said.append).state == "succeeded"
    assert said == lines


def test_a_log_that_keeps_breaking_is_given_up(server: FakeServer, tmp_path: Path) -> None:
    job = hand_in(server, "rltune-mix", tmp_path / "a")
    server.chunks[:] = [[RuntimeError("cut")] for _ in range(9)]
    with pytest.raises(RunError, match=r"broke off \(cut\); the job goes on by itself"):
        follow(server, job, lambda text: None)
    assert len(server.chunks) == 9 - jobs.MAX_BREAKS - 1


def test_a_job_that_failed_while_it_was_followed_says_so(server: FakeServer, tmp_path: Path) -> None:
    job = hand_in(server, "rltune-mix", tmp_path / "a")
    server.end("rltune-mix", JobStatus.FAILED)
    server.chunks[:] = [[RuntimeError("closed")]]
    assert follow(server, job, lambda text: None).state == "failed"


def test_a_job_is_stopped_and_waited_for(server: FakeServer, tmp_path: Path) -> None:
    assert stop(server, hand_in(server, "rltune-mix", tmp_path / "a")).state == "stopped"


def test_a_job_that_does_not_stop_is_not_waited_for_for_ever(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = hand_in(server, "rltune-mix", tmp_path / "a")
    monkeypatch.setattr(FakeServer, "stop_job", lambda self, job_id: True)
    monkeypatch.setattr(jobs, "STOP_WAIT_S", 0.0)
    monkeypatch.setattr(jobs, "LOOK_S", 0.05)
    with pytest.raises(RunError, match=r"rltune-mix: was told to stop and is still running; see the dashboard, http"):
        stop(server, job)


def test_what_ray_s_client_raises_is_one_message(server: FakeServer) -> None:
    with pytest.raises(RunError, match=r"^http://head:8265: a of\nb$|^http://head:8265: a of b$"), jobs.told(server):
        raise RuntimeError("a of\nb")


def test_the_head_is_looked_at(server: FakeServer, tmp_path: Path) -> None:
    """The script has no import of rltune; the job is gone when it has said what it found."""
    with on_the_head(server, "look", str(tmp_path / "new" / "runs"), "torch,nosuch-library") as found:
        assert found["missing"] == ["nosuch-library"]
        assert found["storage"] == ""
        assert found["executable"] == sys.executable
    assert server.jobs == {}


def test_a_head_that_has_just_started_is_given_time_for_its_agent(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    submit_job, refusals = server.submit_job, [RuntimeError(f"status code 500: {jobs.NO_AGENT}, please try again")] * 2

    def submit(**what: Any) -> str:
        if refusals:
            raise refusals.pop()
        return submit_job(**what)

    monkeypatch.setattr(FakeServer, "submit_job", staticmethod(submit))
    with on_the_head(server, "look", str(tmp_path / "new" / "runs"), "torch") as found:
        assert found
    assert refusals == []
    assert caplog.messages == ["waiting for the head's agent, which takes jobs"]
    refusals.append(RuntimeError("status code 500: another"))
    with pytest.raises(RunError, match="another"), on_the_head(server, "look", str(tmp_path), "torch"):
        pass
    monkeypatch.setattr(jobs, "AGENT_S", 0.0)
    refusals.extend([RuntimeError(f"status code 500: {jobs.NO_AGENT}, please try again")] * 2)
    with (
        pytest.raises(RunError, match=r"^http://\S+: the head has no agent .* --dashboard-agent-listen-port=0$"),
        on_the_head(server, "look", str(tmp_path), "torch"),
    ):
        pass


def test_a_job_on_the_head_is_taken_away_once_it_has_ended(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray deletes none that runs, and one that is told to stop does for a while."""
    asked: list[str] = []

    def slow(self: FakeServer, job_id: str) -> JobStatus:
        asked.append(job_id)
        has_ended = len(asked) > 2 and asked[-3:] == [job_id] * 3
        return JobStatus.STOPPED if has_ended else JobStatus.RUNNING

    def delete(self: FakeServer, job_id: str) -> bool:
        assert len(asked) > 2
        del self.jobs[job_id]
        return True

    with on_the_head(server, "look", str(tmp_path), ""):
        monkeypatch.setattr(FakeServer, "get_job_status", slow)
        monkeypatch.setattr(FakeServer, "delete_job", delete)
    assert server.jobs == {}


def test_a_storage_that_cannot_be_written_is_found_on_the_head(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with on_the_head(server, "look", str(tmp_path / "file" / "runs"), "") as found:
        assert found["storage"] == f"{tmp_path / 'file'} is a file"


def test_a_storage_of_another_user_is_found_on_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_head.os, "access", lambda path, mode: False)
    said: list[object] = []
    monkeypatch.setattr(on_head, "say", said.append)
    on_head.look(str(tmp_path / "new"), "")
    (found,) = said
    assert isinstance(found, dict)
    assert found["storage"] == f"{tmp_path} cannot be written by the user that Ray runs as"


def test_a_bucket_is_tried_on_the_head_with_the_head_s_own_rights(server: FakeServer, s3: str) -> None:
    """By the files that go along, beside a Python without rltune; nothing is left there."""
    blank = dataclasses.replace(server, environment={"PYTHONPATH": "", "PYTHONSAFEPATH": ""})
    with on_the_head(blank, "look", f"s3://{BUCKET}/head", "") as found:
        assert found["storage"] == ""
    with on_the_head(blank, "look", "s3://nosuch-bucket/runs", "") as found:
        assert "there is no such bucket; make it, or give another address" in found["storage"]
    assert open_store(f"s3://{BUCKET}/head").list() == {}
    assert server.jobs == {}


def test_what_goes_to_the_head_hides_no_rltune_that_is_there(tmp_path: Path) -> None:
    shutil.copy(on_head.__file__, tmp_path / "on_head.py")
    (tmp_path / on_head.SEAM_FOLDER / "rltune").mkdir(parents=True)
    code = "import on_head, json; print(json.dumps(on_head._installed('rltune')))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env={"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert json.loads(done.stdout) is None


def test_a_head_without_python_is_told_of(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ended without a word"), on_the_head(server, "nosuch"):
        pass
    assert server.jobs == {}


def test_the_script_needs_nothing_but_python() -> None:
    code = "import sys; import on_head; print(json.dumps(sorted(sys.modules)))"
    folder = Path(on_head.__file__).parent
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import json\n{code}"], cwd=folder, capture_output=True, text=True
    )
    assert not {"rltune", "numpy", "ray"} & set(json.loads(done.stdout))
