"""Rows from files and the hub: every accepted form, and a bad row named by file and line."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.config import Source
from lora_guard.data.sources import parse_line, read, read_file
from lora_guard.data.split import drop_overlap, fold
from lora_guard.errors import DataError
from lora_guard.taxonomy import Taxonomy

TAXONOMY = Taxonomy("mine", ("rude", "unfair"))
BEAVERTAILS = Taxonomy.load("beavertails")


def jsonl(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def test_a_row_labels_its_response_if_there_is_one_else_its_prompt(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "response": "b", "unsafe": True, "categories": {"rude": True, "unfair": None}, "source": "s"},
        {"prompt": "a", "response": None, "unsafe": None, "categories": {}, "extra": 1},
        {"prompt": "a"},
    )
    first, second, third = read_file(path, TAXONOMY)
    assert first.target == "response"
    assert first.labels(TAXONOMY)[:2] == [1, 1]
    assert first.source == "s"
    assert dict(first.categories) == {"rude": True}
    assert second.target == third.target == "prompt"
    assert all(label != label for label in second.labels(TAXONOMY))  # nan: nobody annotated it
    assert third.source == "rows"


def test_csv_cells_and_columns_of_other_names_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer,bad,rude,notes\n"Hi, there",,yes,1,x\nBye,"See\nyou",no,,y\n', "utf-8")
    first, second = read_file(path, TAXONOMY, {"prompt": "question", "response": "answer", "unsafe": "bad"})
    assert (first.prompt, first.response, first.harmful, dict(first.categories)) == (
        "Hi, there",
        None,
        True,
        {"rude": True},
    )
    assert (second.response, second.harmful, dict(second.categories)) == ("See\nyou", False, {})


def test_parquet_columns_can_be_mapped_too(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "unsafe": [True, None], "is_rude": [False, True]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    first, second = read_file(tmp_path / "rows.parquet", TAXONOMY, {"rude": "is_rude"})
    assert (first.harmful, dict(first.categories)) == (True, {"rude": False})
    assert (second.harmful, dict(second.categories)) == (None, {"rude": True})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "list; allowed: a JSON object"),
        ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "not JSON"),
        ("{}", "field 'prompt' is NoneType None; allowed: text"),
        ('{"prompt": 3}', "field 'prompt' is int 3"),
        ('{"prompt": "a", "response": ["b"]}', "field 'response' is list"),
        ('{"prompt": "a", "unsafe": "maybe"}', "field 'unsafe' is str; allowed: true, false or null"),
        ('{"prompt": "a", "unsafe": 0.5}', "field 'unsafe'"),
        ('{"prompt": "a", "categories": ["rude"]}', "field 'categories' is list"),
        ('{"prompt": "a", "categories": {"rud": true}}', "has no category 'rud'; did you mean 'rude'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": "fine"}, "", line)
    with pytest.raises(DataError, match=rf"rows.jsonl:3: .*{message.replace('[', '.')}"):
        read_file(path, TAXONOMY)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8"):
        read_file(path, TAXONOMY)


def test_lone_surrogates_are_read(tmp_path: Path) -> None:
    (example,) = read_file(jsonl(tmp_path / "rows.jsonl", '{"prompt": "a\\ud800b"}'), TAXONOMY)
    assert example.conversation().messages[0].content == "a\ufffdb"


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "rows.txt", "rows"])
def test_what_is_missing_or_of_another_kind_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read: No such file|allowed: .jsonl, .csv, .parquet"):
        read_file(tmp_path / name, TAXONOMY)


@pytest.mark.parametrize("name", ["folder.jsonl", "folder.csv", "folder.parquet"])
def test_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / name, TAXONOMY)


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", "\n\n"), ("rows.csv", "prompt,unsafe\n")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match="is empty; needed: at least one row"):
        read_file(tmp_path / name, TAXONOMY)


def test_files_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="is not Parquet"):
        read_file(tmp_path / "rows.parquet", TAXONOMY)
    (tmp_path / "rows.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(DataError, match="is not CSV in UTF-8"):
        read_file(tmp_path / "rows.csv", TAXONOMY)
    (tmp_path / "short.csv").write_text("prompt,unsafe\na\n", "utf-8")
    with pytest.raises(DataError, match=r"short.csv:2: row has another number of cells"):
        read_file(tmp_path / "short.csv", TAXONOMY)


@pytest.mark.parametrize("behind", ["b,0\nc,1\n", '"b",0\n"c",1\n'])
def test_a_quote_that_is_not_closed_is_refused_with_its_place_since_it_takes_in_the_rows_behind_it(
    behind: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'prompt,unsafe\na,0\n"never closed,1\n{behind}', "utf-8")
    with pytest.raises(DataError, match=r"rows\.csv: the row behind line 2 is not CSV: .*; needed: each quote closed"):
        read_file(path, TAXONOMY)


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,1\n", "utf-8")
    with pytest.raises(DataError, match=r"no column 'question'; the file has text, label"):
        read_file(path, TAXONOMY, {"prompt": "question"})
    with pytest.raises(DataError, match="columns name 'harm'; allowed: prompt, response, unsafe or a category"):
        read_file(path, TAXONOMY, {"harm": "label"})
    with pytest.raises(DataError, match=r"no column 'prompt'; the file has text, label"):
        read_file(path, TAXONOMY)


def test_rows_with_other_words_in_a_column_are_left_out(tmp_path: Path) -> None:
    kinds = ["a", "b", "c", "a", None]
    path = jsonl(tmp_path / "rows.jsonl", *({"prompt": str(n), "kind": kind} for n, kind in enumerate(kinds)))
    kept = read(Source(path=str(path), only={"kind": ["a", "c"]}), TAXONOMY)
    assert [example.prompt for example in kept] == ["0", "2", "3"]
    with pytest.raises(DataError, match=r"rows.jsonl: no row is of \{'kind': \['d'\]\}"):
        read(Source(path=str(path), only={"kind": ["d"]}), TAXONOMY)


def test_a_capped_source_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *({"prompt": str(n)} for n in range(50)))
    source = Source(path=str(path), rows=10)
    drawn = [int(example.prompt) for example in read(source, TAXONOMY, seed=1)]
    assert len(drawn) == 10
    assert drawn == sorted(drawn)
    assert drawn == [int(example.prompt) for example in read(source, TAXONOMY, seed=1)]
    assert drawn != [int(example.prompt) for example in read(source, TAXONOMY, seed=2)]


def test_beavertails_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    none = dict.fromkeys(BEAVERTAILS.categories, False)
    rows = [
        {"prompt": "a", "response": "b", "category": none | {"self_harm": True}, "is_safe": False},
        {"prompt": "a", "response": "c", "category": none, "is_safe": True},
    ]
    asked: list[Any] = []

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        asked.append((name, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="hub:PKU-Alignment/BeaverTails", split="330k_train", revision="abc")
    unsafe, safe = read(source, BEAVERTAILS)
    assert asked == [("PKU-Alignment/BeaverTails", {"split": "330k_train", "revision": "abc"})]
    assert (unsafe.harmful, safe.harmful) == (True, False)
    assert [name for name, label in unsafe.categories.items() if label] == ["self_harm"]
    assert unsafe.source == source.name == "PKU-Alignment/BeaverTails"
    read(Source(path="hub:PKU-Alignment/BeaverTails"), BEAVERTAILS)
    assert asked[1][1]["split"] == "30k_train"


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="hub data set 'a/b' cannot be loaded: no network"):
        read(Source(path="hub:a/b"), BEAVERTAILS)


def test_a_mapped_column_is_believed_before_one_that_happens_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,is_safe,bad,category\na,1,1,news\n", "utf-8")
    (example,) = read_file(path, TAXONOMY, {"unsafe": "bad"})
    assert example.harmful is True


def test_the_hubs_form_keeps_its_categories_in_parquet_and_under_mapped_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"question": "a", "response": "b", "category": {"rude": True, "unfair": None}, "is_safe": False}
    columns = {"prompt": "question"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    examples = [
        *read_file(tmp_path / "rows.parquet", TAXONOMY, columns),
        *read_file(jsonl(tmp_path / "rows.jsonl", row), TAXONOMY, columns),
        *read(Source(path="hub:a/b", columns=columns), TAXONOMY),
    ]
    assert [dict(example.categories) for example in examples] == [{"rude": True}] * 3
    assert [example.harmful for example in examples] == [True] * 3


def test_text_where_categories_should_be_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,categories\na,rude\n", "utf-8")
    with pytest.raises(DataError, match=r"rows.csv:2: field 'categories' is str; allowed: a mapping"):
        read_file(path, TAXONOMY)


def test_a_damaged_parquet_file_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [str(n) * 20 for n in range(5000)]}), path)
    damaged = bytearray(path.read_bytes())
    damaged[50:2000] = b"\xff" * 1950
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"rows.parquet' (cannot be read|is not Parquet): (?!None)"):
        read_file(path, TAXONOMY)
    offsets = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1]
    text = pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(b"\xff"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), path)
    with pytest.raises(DataError, match=r"is not Parquet: 'utf-8' codec can't decode"):
        read_file(path, TAXONOMY)


@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{}":,\\ud80tru enl1'), max_size=30).map(str.encode))
def test_any_line_is_an_object_or_one_line_of_error(line: bytes) -> None:
    message = ""
    try:
        assert isinstance(parse_line(line, "rows.jsonl:3"), dict)
    except DataError as error:
        message = str(error)
    assert not message or message.startswith("rows.jsonl:3: ")
    assert "\n" not in message


@given(st.sampled_from(["csv", "parquet"]), st.binary(max_size=80).map(lambda text: b"prompt,unsafe\n" + text))
def test_any_bytes_are_rows_or_one_line_of_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / f"rows.{kind}"
    path.write_bytes(content)
    message = ""
    try:
        assert read_file(path, TAXONOMY)
    except DataError as error:
        message = str(error)
    assert "\n" not in message


# Rows, unsafe rows and folded prompts as the data's own description counts them.
REAL = {
    "train/beavertails": (3509, 2344, 2659),
    "train/safe_rlhf": (2370, 1339, 1111),
    "train/beavertails_unsafe_prompts": (3745, 0, 3745),
    "train/do_not_answer": (5632, 193, 938),
    "train/diasafety": (11183, 5173, 7663),
    "train/aegis": (1097, 578, 1016),
    "train/benign": (10349, 0, 8535),
    "train/harmful_prompts": (9710, 9710, 9710),
    "train/benign_lookalikes": (899, 0, 899),
    "train/toxic_text": (65656, 16489, 65655),
    "eval/beavertails_30k_test": (3021, 1733, 2523),
    "eval/openai_moderation": (1680, 522, 1653),
    "eval/toxicchat_test": (2853, 362, 2774),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_data_sets_are_read_whole(shared_data: Path, name: str) -> None:
    examples = read_file(shared_data / f"{name}.jsonl", BEAVERTAILS)
    unsafe = sum(example.harmful is True for example in examples)
    assert (len(examples), unsafe, len({fold(example.prompt) for example in examples})) == REAL[name]


def test_no_real_training_prompt_is_evaluated_on(shared_data: Path) -> None:
    held_out = [e for name in REAL if name[:4] == "eval" for e in read_file(shared_data / f"{name}.jsonl", BEAVERTAILS)]
    for name in ("train/beavertails", "train/safe_rlhf", "train/do_not_answer", "train/aegis"):
        assert drop_overlap(read_file(shared_data / f"{name}.jsonl", BEAVERTAILS), held_out)[1] == 0
