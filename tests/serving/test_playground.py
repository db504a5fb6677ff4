"""The playground in a real browser: tokens get the colour of their check, policies act, files come and go."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from guards import tiny_guard_folder
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import Running, serving, tiny_guard

from lora_guard import Guard

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.extras, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tiny_guard(tmp_path_factory.mktemp("guard"), threshold=1.0)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page, loaded; at the end it has reported no error and asked no other host for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    hosts: set[str] = set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: hosts.add("/".join(request.url.split("/")[:3])))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert [error for error in errors if "400 (Bad Request)" not in error] == []
    assert {host for host in hosts if host.startswith("http")} == {server.url}


def ask(page: Page, text: str = "Hello", tokens: int = 24) -> None:
    page.fill("#tokens", str(tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    expect(page.locator("#messages .message").last.locator(".note")).to_be_visible(timeout=60_000)


def slide(page: Page, slider: str, value: float) -> None:
    page.locator(slider).fill(str(value))


def test_tokens_are_coloured_by_the_check_that_covers_them(page: Page) -> None:
    ask(page)
    tokens = page.locator(".token:not(.legend *)")
    assert tokens.count() > 3
    for index in range(tokens.count()):
        heat = tokens.nth(index).evaluate("node => Number(node.style.getPropertyValue('--heat'))")
        assert 0 < heat < 1
    assert page.locator("#line circle").count() >= 24 / 4
    assert page.locator("#bars li").count() == 2
    expect(page.locator("#summary")).to_contain_text("No part of the answer would be withheld.")


def test_a_moved_threshold_shows_what_would_be_withheld(page: Page) -> None:
    ask(page)
    slide(page, "#response-threshold", 0)
    expect(page.locator("#summary")).to_contain_text("The answer would be withheld at")
    assert page.locator(".token.withheld").count() == page.locator(".message .token").count()
    slide(page, "#response-threshold", 1)
    assert page.locator(".token.withheld").count() == 0


def test_block_mode_withholds_prompt_and_answer(page: Page) -> None:
    page.select_option("#output-mode", "block")
    slide(page, "#response-threshold", 0)
    ask(page)
    assert page.locator(".message .token").count() == 0
    expect(page.locator(".note.flagged")).to_contain_text("Withheld")
    page.select_option("#input-mode", "block")
    slide(page, "#prompt-threshold", 0)
    ask(page)
    expect(page.locator(".note.flagged").last).to_contain_text("the prompt was flagged by the guard")


def test_an_earlier_answers_scores_can_be_shown_again(page: Page) -> None:
    ask(page, tokens=8)
    ask(page, tokens=24)
    expect(page.locator("#line")).to_contain_text("24 tokens")
    page.locator(".message.assistant").first.click()
    expect(page.locator("#line")).to_contain_text("8 tokens")


def test_a_request_that_fails_keeps_its_words(page: Page) -> None:
    page.fill("#tokens", "4096")
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    expect(page.locator(".note.flagged")).to_contain_text("max_tokens is 4096; allowed: at most 1024")
    expect(page.locator("#prompt")).to_have_value("Hello")


def test_a_key_is_asked_for_where_one_is_needed(browser: Browser, server: Running) -> None:
    with serving(server.guard, keys=("one",)) as closed:
        page = browser.new_page()
        page.goto(closed.url)
        expect(page.locator("#model")).to_have_text("This server needs an API key.")
        page.fill("#key", "two")
        page.press("#key", "Enter")
        expect(page.locator("#model")).to_have_text("This API key is unknown.")
        page.fill("#key", "one")
        page.press("#key", "Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        ask(page)
        page.close()


def test_markup_in_texts_stays_text(page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("#messages img").count() == 0
    expect(page.locator(".message.user")).to_have_text("<img src=x onerror=alert(1)>")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("rows.jsonl", '{"text": "one"}\n{"prompt": "two"}\n', ["one", "two"]),
        ("rows.csv", 'id,text\n1,"one, with ""quotes"""\n2,two\n', ['one, with "quotes"', "two"]),
        ("rows.txt", "one\n\ntwo, three\n", ["one", "two, three"]),
    ],
)
def test_a_file_is_judged_and_downloaded(page: Page, tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_text(content)
    page.click("#tab-batch")
    page.set_input_files("#file", tmp_path / name)
    page.click("#judge")
    expect(page.locator("#batch-state")).to_have_text("2 judged, 0 flagged.")
    assert page.locator("#verdicts td:nth-child(2)").all_inner_texts() == texts
    with page.expect_download() as download:
        page.click("#save-csv")
    table = list(csv.DictReader(download.value.path().read_text().splitlines()))
    assert [row["text"] for row in table] == texts
    assert {row["flagged"] for row in table} == {"false"}
    with page.expect_download() as download:
        page.click("#save-jsonl")
    rows = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    assert all(0 < row["score"] < 1 for row in rows)
    page.click("#by-score")
    scores = [float(text) for text in page.locator("#verdicts td:nth-child(4)").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)


def test_a_file_can_be_dropped(page: Page) -> None:
    page.click("#tab-batch")
    files = page.evaluate_handle(
        """() => {
            const held = new DataTransfer();
            held.items.add(new File(['{"text": "dropped"}\\n'], "rows.jsonl"));
            return held;
        }"""
    )
    page.dispatch_event("#batch", "drop", {"dataTransfer": files})
    expect(page.locator("#rows")).to_have_value('{"text": "dropped"}\n')


def test_a_server_that_takes_few_texts_at_once_judges_many_all_the_same(browser: Browser, tmp_path: Path) -> None:
    with serving(tiny_guard(tmp_path, threshold=1.0), max_items=3) as small:
        page = browser.new_page()
        page.goto(small.url)
        page.click("#tab-batch")
        texts = [f"text {number}" for number in range(20)]
        page.fill("#rows", "\n".join(texts))
        page.click("#judge")
        expect(page.locator("#batch-state")).to_have_text("20 judged, 0 flagged.")
        assert page.locator("#verdicts td:nth-child(2)").all_inner_texts() == texts
        page.close()


def test_a_bad_file_is_said(page: Page) -> None:
    page.click("#tab-batch")
    page.fill("#rows", '{"text": "one"}\n{"other": 1}')
    page.click("#judge")
    expect(page.locator("#batch-state")).to_contain_text("line 2 has no field")
    page.fill("#rows", '["one", "two"]')
    page.click("#judge")
    expect(page.locator("#batch-state")).to_contain_text("give one object a line")


def test_the_keyboard_reaches_everything(page: Page) -> None:
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#batch")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {
        "key",
        "prompt",
        "send",
        "clear",
        "input-mode",
        "output-mode",
        "prompt-threshold",
        "every",
        "system",
    } <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Browser, server: Running, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.url)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#tab-batch")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_a_guard_is_chosen_among_several_for_chat_and_batch(browser: Browser, server: Running, tmp_path: Path) -> None:
    other = Guard.load(tiny_guard_folder(tmp_path, categories=("x", "y", "z")), on=server.guard, precision="fp32")
    with serving(server.guard, others={"other": other}) as several:
        page = browser.new_page()
        page.goto(several.url)
        page.select_option("#guard", "other")
        expect(page.locator("#model")).to_have_text("")
        ask(page)
        assert set(page.locator("#bars .name").all_inner_texts()) == {"x", "y", "z"}
        page.close()


def test_one_guard_leaves_nothing_to_choose(page: Page) -> None:
    expect(page.locator("#choice")).to_be_hidden()
