"""Plans of bulk moderation: every row is in exactly one shard, and a row's id does not depend on the shards."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from lora_guard.errors import DataError
from lora_guard.scale import bulk_plan, bulk_rows
from lora_guard.scale.bulk_plan import InputFile, Part, Shard, plan_file, planning, reading

TEXTS = [f"row {number}\nof several lines, or not" for number in range(23)]


def write_input(folder: Path, form: str) -> Path:
    path = folder / f"rows{form}"
    if form == ".jsonl":
        path.write_text("\n\n".join(json.dumps({"prompt": text}) for text in TEXTS), "utf-8")
    elif form == ".csv":
        path.write_text("prompt\n" + "".join(f'"{text}"\n' for text in TEXTS), "utf-8")
    else:
        write_table(pyarrow.table({"prompt": TEXTS}), path, row_group_size=9)
    return path


def texts_of(file: InputFile, shard: Shard) -> list[str]:
    with open(file.path, "rb") as opened:
        found = bulk_rows.rows(opened, file.path, shard.position)
        return [next(found).values["prompt"] for _ in range(shard.rows)]


@pytest.mark.parametrize("form", bulk_rows.FORMS)
@pytest.mark.parametrize("shard_rows", [1, 4, 9, 100])
def test_shards_hold_every_row_once_and_in_order(form: str, shard_rows: int, tmp_path: Path) -> None:
    file = plan_file(str(write_input(tmp_path, form)), shard_rows)
    assert [text for shard in file.shards for text in texts_of(file, shard)] == TEXTS
    assert [shard.number for shard in file.shards] == list(range(len(file.shards)))
    assert [shard.first for shard in file.shards] == [
        sum(shard.rows for shard in file.shards[:number]) for number in range(len(file.shards))
    ]
    assert max(shard.rows for shard in file.shards) <= shard_rows
    assert file.rows == len(TEXTS)
    assert file.columns == {"prompt": pyarrow.string()}


@pytest.mark.parametrize("form", bulk_rows.FORMS)
def test_a_shard_of_long_rows_ends_at_a_number_of_bytes(form: str, tmp_path: Path) -> None:
    file = plan_file(str(write_input(tmp_path, form)), 100, shard_bytes=120)
    assert len(file.shards) > 4
    assert [text for shard in file.shards for text in texts_of(file, shard)] == TEXTS


@pytest.mark.parametrize("form", bulk_rows.FORMS)
def test_planning_tells_how_far_it_is_up_to_all_that_it_reads(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_plan, "_PIECE", 64)
    path = str(write_input(tmp_path, form))
    *told, planned = planning(path, 4)
    assert sum(count for count in told if isinstance(count, int)) == reading(path)
    assert len(told) > 8
    assert planned == plan_file(path, 4)


def test_a_row_decides_columns_if_the_asked_target_can_be_judged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "assistant", "content": "Hi"}, {"role": "system", "content": "Be kind."}]
    path.write_text(json.dumps({"messages": messages, "more": 1}))
    assert plan_file(str(path), 100).columns == {}
    assert "more" in plan_file(str(path), 100, "response").columns


def test_a_row_has_the_same_id_however_the_file_is_cut(tmp_path: Path) -> None:
    path = str(write_input(tmp_path, ".jsonl"))
    ids = [
        [file.row_id(shard.first + index) for shard in file.shards for index in range(shard.rows)]
        for file in (plan_file(path, 3), plan_file(path, 50))
    ]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(TEXTS)


@given(st.tuples(*[st.integers(0, 1 << 40)] * 6))
def test_a_part_survives_the_form_of_a_data_sets_row(values: tuple[int, ...]) -> None:
    part = Part(values[0], Shard(*values[1:]))
    assert Part.from_row(part.to_row()) == part


def test_an_empty_text_file_has_no_shard_and_all_empty_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.jsonl").write_text("\n\n")
    empty = [plan_file(str(tmp_path / name), 10) for name in ("a.csv", "b.jsonl")]
    assert [file.shards for file in empty] == [[], []]
    with pytest.raises(DataError, match=r"needed: at least one row"):
        bulk_plan.check_distinct(empty)
    bulk_plan.check_distinct([*empty, plan_file(str(write_input(tmp_path, ".jsonl")), 10)])


def test_two_files_of_the_same_content_are_refused_since_their_ids_would_be_the_same(tmp_path: Path) -> None:
    first = write_input(tmp_path, ".jsonl")
    second = tmp_path / "again.jsonl"
    second.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match=r"again\.jsonl and .*rows\.jsonl have the same content"):
        bulk_plan.check_distinct([plan_file(str(path), 10) for path in (first, second)])
