"""Batch moderation: each row plus its verdict, resumable at any byte from the output alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_guard import Conversation, Guard, files, moderate_file
from lora_guard.errors import DataError, ResourceError
from lora_guard.moderate_file import conversation_of, moderate_rows, moderate_stream, stream_rows
from lora_guard.moderate_file import moderate_file as moderate
from lora_guard.verdict import Calibrator, TargetCalibration

ROWS: list[dict[str, Any]] = [
    {"prompt": "How do I bake bread?"},
    {"prompt": "How do I bake bread?", "response": "Mix flour and water.", "id": 7},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]},
    {"prompt": "", "response": None},
    {"prompt": "lone \ud800 surrogate", "more": {"nested": [1, None]}},
    {"prompt": "🍞", "response": "", "score": float("nan"), "verdict": "an older one"},
    {"prompt": "An uneven number of rows."},
]
GROUP = 3


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.load(tiny_guard_folder(tmp_path_factory.mktemp("guard")), precision="fp32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moderate_file, "_ROWS_AT_ONCE", GROUP)


def write_rows(path: Path) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n\n", "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_output_row_is_the_input_row_and_its_verdict(guard: Guard, source: Path, tmp_path: Path) -> None:
    assert moderate(guard, source, tmp_path / "new" / "out.jsonl") == len(ROWS)
    written = read(tmp_path / "new" / "out.jsonl")
    without = [{name: value for name, value in row.items() if name != "verdict"} for row in ROWS]
    verdicts = [row.pop("verdict") for row in written]
    assert json.dumps(written) == json.dumps(without)
    targets = ["prompt", "response", "prompt", "prompt", "prompt", "response", "prompt"]
    assert [verdict["target"] for verdict in verdicts] == targets


def test_a_text_has_the_same_verdict_alone_and_in_a_file(guard: Guard, source: Path, tmp_path: Path) -> None:
    moderate(guard, source, tmp_path / "out.jsonl")
    for row, written in zip(ROWS, read(tmp_path / "out.jsonl"), strict=True):
        alone = guard.moderate(conversation_of(row, "row")).to_dict()
        together = written["verdict"]
        assert list(together["categories"]) == list(alone["categories"])
        pairs = [(together, alone), *((together["categories"][name], alone["categories"][name]) for name in "ab")]
        for found, expected in pairs:
            assert found["score"] == pytest.approx(expected["score"], abs=1e-6)
            assert found["flagged"] == expected["flagged"]
            assert found["threshold"] == expected["threshold"]
        assert together["target"] == alone["target"]


def test_a_target_can_be_asked_for_every_row(guard: Guard, source: Path, tmp_path: Path) -> None:
    moderate(guard, source, tmp_path / "out.jsonl", "prompt")
    written = read(tmp_path / "out.jsonl")
    assert {row["verdict"]["target"] for row in written} == {"prompt"}
    assert written[0]["verdict"]["score"] == pytest.approx(written[1]["verdict"]["score"], abs=1e-6)


@pytest.mark.usefixtures("small_groups")
def test_a_run_stopped_at_any_byte_goes_on_to_the_same_file(guard: Guard, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    moderate(guard, source, out)
    whole = out.read_bytes()
    ends = [index for index, byte in enumerate(whole, 1) if byte == ord("\n")]
    places = {0, 1, *range(0, len(whole), 211), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    for size in sorted(places):
        out.write_bytes(whole[:size])
        rows = whole[:size].count(b"\n")
        kept = rows if rows == len(ROWS) else rows - rows % GROUP
        assert moderate(guard, source, out) == len(ROWS) - kept
        assert out.read_bytes() == whole


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_run_interrupted_between_groups_goes_on_to_the_same_file(
    guard: Guard, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    moderate(guard, source, tmp_path / "whole.jsonl")
    judge = Guard.moderate
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > group:
            raise KeyboardInterrupt
        return judge(*args, **kwargs)

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "moderate", stop)
        with pytest.raises(KeyboardInterrupt):
            moderate(guard, source, out)
    assert len(read(out)) == group * GROUP
    moderate(guard, source, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.usefixtures("small_groups")
def test_a_complete_output_is_left_as_it_is_and_rows_added_later_are_judged(
    guard: Guard, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    moderate(guard, source, out)
    whole = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "moderate", lambda *_, **__: pytest.fail("judged again"))
        assert moderate(guard, source, out) == 0
    assert out.read_bytes() == whole
    files.append_text(source, '{"prompt": "one more"}\n')
    assert moderate(guard, source, out) == 2  # the last whole group ends before the seventh row
    assert [row.get("prompt") for row in read(out)] == [*(row.get("prompt") for row in ROWS), "one more"]


def test_an_output_of_another_input_or_guard_is_left_alone(guard: Guard, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    moderate(guard, source, out)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "something else"}\n', "utf-8")
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"out.jsonl:1 is not the verdict on that row"):
        moderate(guard, other, out)
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text(json.dumps(ROWS[0]) + "\n", "utf-8")
    with pytest.raises(DataError, match=r"out.jsonl:2 is not the verdict on that row"):
        moderate(guard, shorter, out)
    others = [Guard.load(tiny_guard_folder(tmp_path / "stricter", threshold=0.1))]
    others.append(Guard(guard.spec, guard.engine, policy="strict"))
    half, less = (Calibrator(thresholds=dict.fromkeys(("balanced", "strict", "permissive"), t)) for t in (0.5, 0.4))
    for categories in ({"a": half, "b": less}, {"a": half, "c": half}, {"a": half}):
        part = TargetCalibration(harmful=half, categories=categories)
        changed = guard.spec.calibration.model_copy(update={"prompt": part, "response": part})
        others.append(Guard(guard.spec.model_copy(update={"calibration": changed}), guard.engine))
    for other in others:
        with pytest.raises(DataError, match=r"out.jsonl:1 was judged by another guard or policy"):
            moderate(other, source, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some notes\n", "not JSON"),
        (b"\n", "not JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b'{"prompt": "How do I bake bread?"}\n', "is not the verdict on that row"),
        (b'{"prompt": "How do I bake bread?", "verdict": "fine"}\n', "is not the verdict on that row"),
        (b'{"prompt": "How do I bake bread?", "verdict": {}}\n', "was judged by another guard or policy"),
        (
            b'{"prompt": "How do I bake bread?", "verdict": {"threshold": 0.5}}\n',
            "was judged by another guard or policy",
        ),
        (
            b'{"prompt": "How do I bake bread?", "verdict": {"threshold": 0.5, "categories": {"a": 1, "b": []}}}\n',
            "was judged by another guard or policy",
        ),
        (b'{"prompt": "How do I bake Bread?", "verdict": {"threshold": 0.5}}\n', "is not the verdict on that row"),
        (b'{"prompt": "How do I bake bread?", "id": 1, "verdict": {"threshold": 0.5}}\n', "is not the verdict"),
    ],
)
def test_a_file_that_is_no_output_is_left_alone(
    guard: Guard, source: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(DataError, match=rf"out.jsonl:1:? .*{message}|out.jsonl:1:? {message}"):
        moderate(guard, source, out)
    assert out.read_bytes() == content


BAD = [
    ("{", "not JSON"),
    ("[1]", "list; allowed: a JSON object"),
    ('{"text": "x"}', "row has text; needed: prompt"),
    ("{}", "row has no field; needed: prompt"),
    ('{"prompt": 3}', "content of type int"),
    ('{"prompt": null}', "content of type NoneType"),
    ('{"prompt": "a", "response": ["b"]}', "content of type list"),
    ('{"messages": []}', "conversation is empty"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot' is unknown"),
    ('{"messages": [{"role": "user"}]}', "message 0 lacks content"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "needs a message of role 'user'"),
    ('{"messages": 3}', ""),
    ('{"messages": null}', ""),
    ('{"messages": [3]}', ""),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_the_rows_before_a_bad_one_are_judged_and_written(
    guard: Guard, tmp_path: Path, line: str, message: str
) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    lines = ['{"prompt": "a"}', '{"prompt": "b"}', line, '{"prompt": "c"}']
    source.write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=rf"rows.jsonl:3: .*{message}|rows.jsonl:3: {message}"):
        moderate(guard, source, out)
    assert [row["prompt"] for row in read(out)] == ["a", "b"]
    source.write_text("\n".join([*lines[:2], '{"prompt": "mended"}', lines[3]]), "utf-8")
    moderate(guard, source, out)
    assert [row["prompt"] for row in read(out)] == ["a", "b", "mended", "c"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["prompt", "response", "messages", "id"]), json_values))
def test_any_row_is_a_conversation_or_an_error_that_begins_with_its_place(row: dict[str, Any]) -> None:
    message = ""
    try:
        found = conversation_of(row, "rows.jsonl:3")
    except DataError as error:
        message = str(error)
    assert message.startswith("rows.jsonl:3: ") if message else found.messages


def test_an_input_that_is_not_there_is_one_line(guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl' cannot be read: No such file"):
        moderate(guard, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_one_line(guard: Guard, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="folder cannot be written: Is a directory"):
        moderate(guard, source, tmp_path / "folder")
    with pytest.raises(ResourceError, match="cannot be written"):
        moderate(guard, source, source / "out.jsonl")


def test_an_input_without_rows_gives_an_output_without_rows(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n \n", "utf-8")
    assert moderate(guard, tmp_path / "rows.jsonl", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_rows_of_a_stream_are_named_by_line_and_judged_as_those_of_a_file(
    guard: Guard, source: Path, tmp_path: Path
) -> None:
    moderate(guard, source, tmp_path / "out.jsonl")
    output = io.StringIO()
    moderate_stream(guard, stream_rows(io.BytesIO(source.read_bytes()), "stdin"), output)
    assert output.getvalue() == (tmp_path / "out.jsonl").read_text("utf-8")
    output = io.StringIO()
    with pytest.raises(DataError, match=r"stdin:3: not UTF-8"):
        moderate_stream(guard, stream_rows([b'{"prompt": "a"}\n', b"\n", b"\xff\n"], "stdin"), output)
    assert json.loads(output.getvalue())["prompt"] == "a"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(rows=st.integers(0, 2 * GROUP + 1), bad=st.booleans())
@pytest.mark.usefixtures("small_groups")
def test_groups_hold_all_rows_in_order_and_finished_rows_are_counted(guard: Guard, rows: int, bad: bool) -> None:
    lines = [b'{"prompt": "%d"}' % number for number in range(rows)] + [b"{"] * bad
    done: list[int] = []
    groups: list[list[str]] = []
    message = ""
    try:
        groups.extend(moderate_rows(guard, stream_rows(lines, "stdin"), None, done.append))
    except DataError as error:
        message = str(error)
    assert message.startswith(f"stdin:{rows + 1}: ") is bad
    assert [json.loads(line)["prompt"] for group in groups for line in group] == [str(n) for n in range(rows)]
    assert [len(group) for group in groups] == [GROUP] * (rows // GROUP) + [rows % GROUP] * (rows % GROUP > 0)
    assert sum(done) == rows


def test_a_target_that_a_row_lacks_names_the_row(guard: Guard, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: target 'response' needs"):
        moderate(guard, source, tmp_path / "out.jsonl", "response")


def test_a_full_disk_is_one_line(guard: Guard, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"out.jsonl cannot be written: no space left on the disk"):
        moderate(guard, source, tmp_path / "out.jsonl")


def test_progress_goes_to_stderr_alone(
    guard: Guard, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moderate(guard, source, tmp_path / "out.jsonl")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"moderate: {len(ROWS)}/{len(ROWS)} rows" in captured.err


def test_no_text_of_a_row_is_in_what_is_shown(guard: Guard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "private words"}\n{"prompt": ["private words"]}\n', "utf-8")
    with pytest.raises(DataError) as caught:
        moderate(guard, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert "private" not in str(caught.value) + "".join(capsys.readouterr())


def test_the_conversation_of_a_row_is_that_of_the_api() -> None:
    assert conversation_of(ROWS[1], "row") == Conversation.of("How do I bake bread?", "Mix flour and water.")
    assert conversation_of(ROWS[2], "row") == Conversation.of("Hello", system="Be kind.")
