"""A shard of bulk moderation: judged as ``moderate`` does, written in one step, the same bytes each time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder
from pyarrow.parquet import read_table
from tiny import tiny_folder

from lora_guard import Guard, files
from lora_guard.errors import DataError, GuardError, InputError
from lora_guard.moderate_file import conversation_of
from lora_guard.scale import bulk_shard, bulk_store
from lora_guard.scale.bulk_plan import Part, plan_file
from lora_guard.scale.bulk_shard import Job, Judge, ShardModerator, moderate_part

ROWS: list[dict[str, Any]] = [
    {"prompt": "How do I bake bread?", "id": 1},
    {"prompt": "How do I bake bread?", "response": "Mix flour and water.", "more": {}},
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"prompt": "", "response": None, "more": {"nested": [1]}},
]
BAD = [
    "not json",
    '{"prompt": 3}',
    '{"other": "x"}',
    '{"messages": [{"role": "user"}]}',
    '{"prompt": "x", "\\ud800": 1}',
]


@pytest.fixture(scope="module")
def guard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "good.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.fixture
def job(guard_folder: Path, tmp_path: Path) -> Job:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join([json.dumps(ROWS[0]), *BAD, *map(json.dumps, ROWS[1:])]), "utf-8")
    planned = plan_file(str(source), 100)
    spec = files.sha256(guard_folder / "guard.json")
    judge = Judge(str(guard_folder), None, False, "torch", "fp32", "balanced", None, spec)
    return Job(judge, [planned], planned.columns, str(tmp_path / "out"))


@pytest.fixture
def guard(job: Job) -> Guard:
    return job.judge.load()


def part_of(job: Job) -> Part:
    return Part(0, job.files[0].shards[0])


def written(job: Job) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(f"{job.output}/part-00000-000000.parquet").to_pylist()
    return rows


def test_rows_are_judged_as_moderate_judges_them_and_bad_ones_stand_apart(job: Job, guard: Guard) -> None:
    assert moderate_part(guard, job, part_of(job)) == (len(ROWS), len(BAD), "")
    rows = written(job)
    for row, found in zip(ROWS, rows, strict=True):
        verdict = guard.moderate(conversation_of(row, "row"))
        assert found["verdict_score"] == pytest.approx(verdict.score, abs=1e-6)
        assert found["verdict_flagged"] == verdict.flagged
        assert found["verdict_target"] == verdict.target
        assert found["verdict_a_score"] == pytest.approx(verdict.categories["a"].score, abs=1e-6)
    assert [row["more"] for row in rows] == [None, "{}", None, '{"nested": [1]}']
    letters = [
        json.loads(line) for line in Path(job.output, "_dead", "part-00000-000000.jsonl").read_text().splitlines()
    ]
    assert [json.loads(letter["row"]) for letter in letters[1:]] == [json.loads(text) for text in BAD[1:]]
    assert [letter["where"].rpartition(":")[2] for letter in letters] == ["2", "3", "4", "5", "6"]
    assert letters[0]["row"] == "not json"
    assert letters[0]["reason"].startswith("not JSON")
    assert all(letter["reason"] for letter in letters)
    ids = [job.files[0].row_id(index) for index in range(len(ROWS) + len(BAD))]
    assert [row["row_id"] for row in rows] == [ids[0], *ids[1 + len(BAD) :]]
    assert [letter["row_id"] for letter in letters] == ids[1 : 1 + len(BAD)]


def test_a_shard_judged_again_gives_the_same_bytes(job: Job, guard: Guard) -> None:
    moderate_part(guard, job, part_of(job))
    first = {path: path.read_bytes() for path in Path(job.output).rglob("part*")}
    moderate_part(job.judge.load(), job, part_of(job))
    assert {path: path.read_bytes() for path in Path(job.output).rglob("part*")} == first
    assert len(first) == 2


def test_letters_of_a_killed_actor_do_not_stand_beside_the_rows_that_are_judged_this_time(
    job: Job, guard: Guard, tmp_path: Path
) -> None:
    planned = plan_file(str(write_rows(tmp_path, ROWS)), 100)
    again = Job(job.judge, [planned], planned.columns, job.output)
    stale = Path(job.output, "_dead", "part-00000-000000.jsonl")
    bulk_store.write(str(stale), b"{}")
    assert moderate_part(guard, again, part_of(again)) == (len(ROWS), 0, "")
    assert not stale.exists()


def test_a_finished_shard_that_is_given_again_is_counted_and_not_judged(
    job: Job, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderate_part(guard, job, part_of(job))
    monkeypatch.delattr(bulk_shard.Judge, "load")
    monkeypatch.delattr(bulk_store, "write")
    done = ShardModerator(job)(part_of(job).to_row())
    assert done == {"judged": len(ROWS), "dead": len(BAD), "error": ""}


def test_the_parquet_file_is_written_last_for_it_says_that_the_shard_is_done(
    job: Job, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(bulk_store, "write", lambda place, data: order.append(place.rpartition(".")[2]))
    moderate_part(guard, job, part_of(job))
    assert order == ["jsonl", "parquet"]


@pytest.mark.parametrize("error", [GuardError("a logit that is NaN"), InputError("the template refuses the chat")])
def test_a_row_that_the_guard_cannot_judge_is_a_dead_letter_and_the_others_are_judged(
    job: Job, guard: Guard, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    judge = Guard.moderate

    def refusing(self: Guard, conversations: Any, **settings: Any) -> Any:
        together = conversations if isinstance(conversations, list) else [conversations]
        if any(conversation.messages[-1].content == "Hello" for conversation in together):
            raise error
        return judge(self, conversations, **settings)

    monkeypatch.setattr(Guard, "moderate", refusing)
    assert moderate_part(guard, job, part_of(job)) == (len(ROWS) - 1, len(BAD) + 1, "")
    assert [row["prompt"] for row in written(job)] == [row["prompt"] for row in ROWS if "prompt" in row]


def test_an_empty_cell_of_csv_is_no_response(job: Job, guard: Guard, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text('prompt,response\nHello,\nHello,"Good, thanks"\n')
    planned = plan_file(str(source), 100)
    csv = Job(job.judge, [planned], planned.columns, job.output)
    assert moderate_part(guard, csv, Part(0, planned.shards[0])) == (2, 0, "")
    assert [row["verdict_target"] for row in written(csv)] == ["prompt", "response"]
    assert [row["response"] for row in written(csv)] == ["", "Good, thanks"]


def test_input_that_changed_since_it_was_planned_is_refused(job: Job, guard: Guard) -> None:
    files.append_text(Path(job.files[0].path), "\n{}")
    with pytest.raises(DataError, match=r"rows\.jsonl has changed since the run began"):
        moderate_part(guard, job, part_of(job))
    assert not Path(job.output).exists()


def test_another_guard_on_an_actors_machine_ends_the_run_in_one_line(job: Job, guard_folder: Path) -> None:
    other = Judge(str(guard_folder), None, False, "torch", "fp32", "balanced", None, "0" * 64)
    done = ShardModerator(Job(other, job.files, job.columns, job.output))(part_of(job).to_row())
    assert "is another one on this machine" in done["error"]
    assert not Path(job.output).exists()


def test_a_base_of_other_weights_judges_only_where_it_is_allowed(job: Job, tmp_path: Path) -> None:
    other = replace(job.judge, base=str(tiny_folder(tmp_path / "base", seed=1)))
    assert "--allow-other-base" in ShardModerator(replace(job, judge=other))(part_of(job).to_row())["error"]
    allowing = replace(job, judge=replace(other, allow_other_base=True))
    assert ShardModerator(allowing)(part_of(job).to_row())["error"] == ""


def test_an_actor_loads_its_guard_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[None] = []
    load = Judge.load
    monkeypatch.setattr(bulk_shard.Judge, "load", lambda judge: (loads.append(None), load(judge))[1])
    actor = ShardModerator(job)
    for _ in range(2):
        bulk_store.remove(f"{job.output}/part-00000-000000.parquet")
        assert actor(part_of(job).to_row()) == {"judged": len(ROWS), "dead": len(BAD), "error": ""}
    assert len(loads) == 1
