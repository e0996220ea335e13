from pathlib import Path

import pytest

from rltune.runs import events
from rltune.runs.events import Event, append_event, read_events


def test_events_come_back_in_the_order_of_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trials" / "001" / "events.jsonl"
    for moment, name, fields in ((20.5, "loaded", {}), (10.25, "suggested", {"text": "a 'b'\n", "step": 3})):
        monkeypatch.setattr(events.time, "time", lambda moment=moment: moment)
        append_event(path, name, **fields)
    assert read_events(path) == [
        Event(10.25, "suggested", {"text": "a 'b'\n", "step": 3}),
        Event(20.5, "loaded", {}),
    ]
    assert len(path.read_text().splitlines()) == 2


def test_there_are_none_before_the_first(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


@pytest.mark.parametrize(
    "torn", ['{"time": 1.0, "ev', '{"time": 1.0}', "[]", '"text"', "7", "\xff", '{"time": null, "event": "x"}']
)
def test_a_line_cut_short_costs_itself_alone(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    append_event(path, "suggested")
    with path.open("ab") as file:
        file.write(torn.encode("latin1"))
    append_event(path, "ended")
    assert [event.event for event in read_events(path)] == ["suggested", "ended"]


def test_a_place_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    append_event(tmp_path / "file" / "events.jsonl", "suggested")
    append_event(tmp_path, "suggested")  # a folder


def test_events_of_runs_of_before_have_their_names_of_now(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"time": 1.0, "event": "dealt"}\n')
    assert [event.event for event in read_events(tmp_path / "events.jsonl")] == ["suggested"]
