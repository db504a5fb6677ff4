"""Who may call and how much: keys, rates, sizes and host names, each refused in OpenAI's envelope."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AuthenticationError
from servers import Running, serving, tiny_guard

from lora_guard import Guard
from lora_guard.serving.access import Rates

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return tiny_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def closed(guard: Guard) -> Iterator[Running]:
    with serving(guard, keys=("one", "two"), max_body_bytes=2000) as running:
        yield running


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return error


def test_each_key_opens_and_no_other_does(closed: Running) -> None:
    for key in ("one", "two"):
        assert closed.openai(key).moderations.create(input="Hello").results
    for key in ("three", "one ", "onetwo"):
        with pytest.raises(AuthenticationError) as error:
            closed.openai(key.strip() + "x").models.list()
        assert error.value.code == "invalid_api_key"
    assert closed.get("/v1/models", headers={"x-api-key": "two"}).status_code == 200
    assert closed.get("/v1/models", headers={"x-api-key": "three"}).status_code == 401
    # A wrong key is not saved by a right one in the other header.
    assert closed.get("/v1/models", headers={"authorization": "Bearer no", "x-api-key": "one"}).status_code == 401
    for header in ("", "one", "Basic one", "Bearer", "Bearer \u00fc"):
        response = closed.get("/v1/models", headers={"authorization": header.encode()})
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error_of(response)


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/chat/completions", "/classify", "/metrics", "/openapi.json"])
def test_everything_but_liveness_and_the_page_needs_a_key(closed: Running, path: str) -> None:
    assert closed.get(path).status_code == 401
    for free in ("/health", "/ready", "/"):
        assert closed.get(free).status_code == 200


def test_a_large_body_is_refused_announced_or_not(closed: Running) -> None:
    headers = {"authorization": "Bearer one", "content-type": "application/json"}
    body = json.dumps({"input": "x" * 3000}).encode()
    for content in (body, iter([body[:1500], body[1500:]])):
        response = httpx2.post(f"{closed.url}/v1/moderations", content=content, headers=headers, timeout=60)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"


def test_rates_hold_for_each_key_apart(guard: Guard) -> None:
    with serving(guard, keys=("one", "two"), requests_per_minute=2) as server:
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            answers = [server.get("/v1/models", headers=headers) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert int(answers[-1].headers["retry-after"]) >= 1
            assert error_of(answers[-1])["type"] == "rate_limit_error"


def test_a_bucket_refills_evenly_and_never_beyond_a_minutes_worth() -> None:
    rates = Rates(6)
    assert [rates.take("a", 0.0) for _ in range(7)] == [0] * 6 + [10]
    assert rates.take("a", 5.0) == 5
    assert rates.take("a", 10.0) == 0
    assert [rates.take("a", 1e6) for _ in range(7)] == [0] * 6 + [10]
    assert rates.take("b", 1e6) == 0


def test_a_page_under_another_name_cannot_reach_a_local_server(guard: Guard) -> None:
    with serving(guard) as server:
        response = server.get("/v1/models", headers={"host": "attacker.example"})
        assert response.status_code == 421
        assert error_of(response)["code"] == "wrong_host"
        form = httpx2.post(
            f"{server.url}/v1/moderations", content=b'{"input": "x"}', headers={"content-type": "text/plain"}
        )
        assert form.status_code == 400


def test_other_origins_are_let_in_only_where_named(guard: Guard) -> None:
    headers = {"origin": "https://app.example"}
    with serving(guard) as server:
        assert "access-control-allow-origin" not in server.get("/v1/models", headers=headers).headers
    with serving(guard, keys=("one",), cors_origins=["https://app.example"]) as server:
        asks = {**headers, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = httpx2.options(f"{server.url}/v1/moderations", headers=asks)
        assert preflight.status_code == 200
        allowed = server.get("/v1/models", headers={**headers, "authorization": "Bearer one"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"


def test_unknown_paths_and_methods_have_the_envelope(closed: Running) -> None:
    key = {"authorization": "Bearer one"}
    assert error_of(closed.get("/v2/nothing", headers=key))["code"] == "not_found"
    assert error_of(closed.get("/v1/moderations", headers=key))["code"] == "method_not_allowed"


def test_the_log_names_no_key_and_no_text(guard: Guard, caplog: Any, capsys: Any, tmp_path: Path) -> None:
    with caplog.at_level("DEBUG"), serving(guard, keys=("sk-private",), audit=tmp_path / "a.jsonl") as server:
        headers = {"authorization": "Bearer sk-private"}
        for path, body in (
            ("/v1/moderations", {"input": "secret words"}),
            ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "secret words"}]}),
            ("/v1/moderations?secret words", {"input": 3}),
        ):
            server.post(path, body, headers=headers)
        metrics = server.get("/metrics", headers=headers).text
    streams = capsys.readouterr()
    own = "".join(record.getMessage() for record in caplog.records if record.name.startswith(("lora_guard", "uvicorn")))
    for place in (own, streams.out, streams.err, metrics, (tmp_path / "a.jsonl").read_text()):
        assert "secret words" not in place
        assert "sk-private" not in place
