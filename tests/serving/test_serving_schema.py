"""The API's own description: complete, with examples, and true of every answer, also to requests made to break it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from servers import Running, serving, tiny_guard

from lora_guard import Guard

pytestmark = pytest.mark.extras

ROUTES = {
    "/v1/chat/completions": "post",
    "/v1/moderations": "post",
    "/api/v1/text/contents": "post",
    "/classify": "post",
    "/beta/litellm_basic_guardrail_api": "post",
    "/v1/models": "get",
    "/health": "get",
    "/ready": "get",
    "/metrics": "get",
}
STATUSES = {200, 400, 401, 404, 405, 413, 421, 429, 503, 504}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return tiny_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def server(guard: Guard) -> Iterator[Running]:
    with serving(guard, default_completion_tokens=4, max_completion_tokens=8) as running:
        yield running


def test_every_route_is_described_with_its_errors_and_an_example(server: Running) -> None:
    description = server.get("/openapi.json").json()
    assert {path: next(iter(methods)) for path, methods in description["paths"].items()} == ROUTES
    schemas = description["components"]["schemas"]
    for path, method in ROUTES.items():
        operation = description["paths"][path][method]
        assert operation["description"]
        for kind, form in operation["responses"]["200"]["content"].items():
            assert "example" in form, (path, kind)
        if method == "post":
            assert {"200", "400", "401", "413", "429", "503", "504"} <= set(operation["responses"])
            body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            assert schemas[body]["examples"]


def test_the_sample_answers_have_the_form_of_answers(server: Running) -> None:
    description = server.get("/openapi.json").json()
    for path, method in ROUTES.items():
        for kind, form in description["paths"][path][method]["responses"]["200"]["content"].items():
            if kind == "application/json":
                schema = {**form["schema"], "components": description["components"]}
                jsonschema_rs.validator_for(schema).validate(form["example"])


def test_keys_are_described_where_there_are_some(guard: Guard) -> None:
    with serving(guard, keys=("sk-mine",)) as closed:
        description = closed.get("/openapi.json", headers={"authorization": "Bearer sk-mine"}).json()
    assert description["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, method in ROUTES.items():
        is_open = path in ("/health", "/ready")
        assert description["paths"][path][method]["security"] == ([] if is_open else [{"key": []}, {"header": []}])


def test_the_examples_are_answered(server: Running) -> None:
    description = server.get("/openapi.json").json()
    for path, method in ROUTES.items():
        if method == "post":
            schema = description["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
            name = schema["$ref"].rsplit("/", 1)[1]
            for example in description["components"]["schemas"][name]["examples"]:
                response = server.post(path, {**example, "max_tokens": 4} if "messages" in example else example)
                assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ROUTES)
def test_answers_are_as_described(server: Running, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][ROUTES[path].upper()]

    @settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def answers(case: Any) -> None:
        # What JSON Schema cannot say, such as that the last message is the user's, is refused beyond it.
        case.call_and_validate(base_url=server.url, timeout=60, excluded_checks=[positive_data_acceptance])

    answers()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=10), children, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["input", "model", "messages", "stream", "temperature", "stop", "moderation", "lora_guard", "contents", "texts"]
)
BODIES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(FIELDS, JSON, max_size=4).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=300)
@given(
    path=st.sampled_from([*ROUTES, "/", "/nothing"]),
    method=st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE"]),
    body=BODIES,
    kind=st.sampled_from(["application/json", "application/json", "text/plain", "multipart/form-data", ""]),
)
def test_a_malformed_request_has_a_defined_answer(
    server: Running, path: str, method: str, body: bytes, kind: str
) -> None:
    headers = {"content-type": kind}
    response = httpx2.request(method, server.url + path, content=body, headers=headers, timeout=60)
    assert response.status_code in STATUSES
    if response.status_code != 200:
        assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
