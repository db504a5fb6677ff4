"""The server on Ray Serve: guards by name, put in while it runs; a replica that dies is replaced; access as alone."""

import asyncio
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from clusters import local_cluster
from guards import tiny_guard_folder

from lora_guard import Conversation, Guard
from lora_guard.errors import ArtifactError, ConfigError, ResourceError
from lora_guard.serving.config import ServeConfig

ray = pytest.importorskip("ray", reason="needs the extra 'scale'; make test-extras installs it")
with warnings.catch_warnings(action="ignore"):  # its own code's
    from ray import serve
    from ray.serve.context import _get_global_client  # what `serve deploy` ends in, without a dashboard
    from ray.serve.schema import ServeDeploySchema
from lora_guard.scale.deployment import Replica, Settings, application  # noqa: E402

# Ray leaves sockets and processes to its own exit, and warns of its own next versions.
pytestmark = [
    pytest.mark.extras,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

TEXT = "Tell me about number 7"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Guards on the same tiny chat model."""
    kinds: dict[str, dict[str, Any]] = {
        "first": {"adapter_kind": "alora", "threshold": 1.0},
        "second": {"adapter_kind": "lora", "strength": 1.5, "threshold": 1.0},
        "third": {"adapter_kind": "alora", "strength": 2.0, "threshold": 1.0},
    }
    return {name: tiny_guard_folder(tmp_path_factory.mktemp(name), **kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a Ray Serve proxy on this machine."""
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "120"  # a busy machine starts it slowly
    with socket.create_server(("127.0.0.1", 0)) as free:
        found = int(free.getsockname()[1])
    with local_cluster():
        with suppress(TimeoutError):  # after a minute; the proxy goes on starting, and an application waits for it
            serve.start(http_options={"host": "127.0.0.1", "port": found})
        yield found
        serve.shutdown()


@pytest.fixture(scope="module")
def url(port: int, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the application with ``first`` as its default and ``second`` beside it."""
    found = f"http://127.0.0.1:{port}"
    deploy(found, folders, tmp_path_factory, more="second")
    return found


def deploy(url: str, folders: dict[str, Path], factory: pytest.TempPathFactory, **guards: str) -> None:
    """Deploy the application as ``serve deploy`` does with a YAML file, and wait for its guards."""
    application = described(folders, factory, **{name: str(folders[guard]) for name, guard in guards.items()})
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
    expected = ["main", *(name for name in guards if name != "main")]
    until(lambda: answered(url, "/v1/models", lambda found: [card["id"] for card in found["data"]] == expected))


def described(folders: dict[str, Path], factory: pytest.TempPathFactory, **guards: str) -> dict[str, Any]:
    """The application in the YAML file's form."""
    server = {"model_name": "main", "audit": str(factory.getbasetemp() / "audit.jsonl")}
    return {
        "name": "guard",
        "import_path": "lora_guard.scale.deployment:application",
        "args": {"guard": str(folders["first"]), "server": server},
        "deployments": [{"name": "lora-guard", "user_config": {"guards": guards}}],
    }


def score(url: str, model: str) -> tuple[str, float]:
    found = httpx2.post(f"{url}/v1/moderations", json={"model": model, "input": TEXT}, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()["model"], found.json()["results"][0]["score"]


def alone(folder: Path) -> float:
    return Guard.load(folder).moderate(Conversation.of(TEXT)).score


def test_the_routes_of_the_server_answer_with_the_guard_that_a_request_names(
    url: str, folders: dict[str, Path]
) -> None:
    assert httpx2.get(f"{url}/ready", timeout=60).json() == {"status": "ready"}
    assert [card["id"] for card in httpx2.get(f"{url}/v1/models", timeout=60).json()["data"]] == ["main", "more"]
    assert score(url, "main") == ("main", pytest.approx(alone(folders["first"]), abs=1e-5))
    assert score(url, "gpt-4o") == ("main", pytest.approx(alone(folders["first"]), abs=1e-5))
    assert score(url, "more") == ("more", pytest.approx(alone(folders["second"]), abs=1e-5))


def test_an_answer_is_streamed_through_the_proxy(url: str) -> None:
    messages = [{"role": "user", "content": TEXT}]
    body = {"model": "more", "messages": messages, "max_tokens": 24, "temperature": 0, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 4


def test_guards_are_put_in_and_taken_away_while_the_replica_runs(
    url: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    process = replica_process()
    deploy(url, folders, tmp_path_factory, main="third", new="first")
    assert score(url, "main") == ("main", pytest.approx(alone(folders["third"]), abs=1e-5))
    assert score(url, "new") == ("new", pytest.approx(alone(folders["first"]), abs=1e-5))
    assert score(url, "more")[0] == "main"
    deploy(url, folders, tmp_path_factory)
    assert score(url, "main") == ("main", pytest.approx(alone(folders["first"]), abs=1e-5))
    assert replica_process() == process


def test_a_replica_that_serves_keeps_its_guards_where_new_ones_cannot_be_had(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain = Replica.__bases__[0]  # without Ray's wrapper
    replica = plain(Settings(guard=str(folders["first"])))
    guards = replica._service.guards
    broken = {"guards": {"new": str(folders["second"]), "broken": "/nowhere/guard"}}
    with pytest.raises(ArtifactError, match="/nowhere/guard"):
        asyncio.run(replica.reconfigure(broken))
    asyncio.run(replica.reconfigure({"guards": {"more": str(folders["second"])}}))
    for mistaken in (broken, {"guard": {}}):
        asyncio.run(replica.reconfigure(mistaken))
        assert "the guards stay as they were" in caplog.messages[-1]
        assert guards.names == ["tiny", "more"]
    assert not [name for name, _ in replica._guard.engine.base.model.named_parameters() if "_2." in name]
    asyncio.run(replica.reconfigure({}))
    assert guards.names == ["tiny"]


def test_each_replica_has_an_audit_log_of_its_own(url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    score(url, "main")
    (log,) = tmp_path_factory.getbasetemp().glob("audit.*.jsonl")
    assert log.read_text("utf-8").count("\n") >= 1


def test_a_replica_whose_process_dies_is_replaced(url: str, folders: dict[str, Path]) -> None:
    process = replica_process()
    os.kill(process, 9)
    until(lambda: answered(url, "/ready"))
    assert score(url, "main")[1] == pytest.approx(alone(folders["first"]), abs=1e-5)
    assert replica_process() != process


def test_replicas_go_by_the_requests_under_way_between_the_least_and_the_most_that_are_asked_for() -> None:
    server = ServeConfig.model_validate({"queue": 40, "drain": 7})
    asked = Settings(least_replicas=2, most_replicas=7, requests_per_replica=3.5, cpus=2, gpus=0.5, server=server)
    deployment = application(asked)._bound_deployment  # as Ray has checked and understood it
    config, scaling = deployment._deployment_config, deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 7, 3.5)
    assert deployment._replica_config.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert (config.max_ongoing_requests, config.graceful_shutdown_timeout_s) == (40, 7)
    assert config.health_check_timeout_s > config.health_check_period_s > 0


def test_a_replica_whose_engine_hangs_or_is_dead_is_unhealthy(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica.__bases__[0](Settings(guard=str(folders["first"])))  # without Ray's wrapper
    worker = replica._service.worker
    worker.start()
    asyncio.run(replica.check_health())
    with monkeypatch.context() as hanging:
        hanging.setattr(worker._shared, "busy_since", time.monotonic() - 2 * replica._config.guard_deadline)
        with pytest.raises(ResourceError, match="the engine takes no requests"):
            asyncio.run(replica.check_health())
    asyncio.run(replica.check_health())
    monkeypatch.setattr(worker, "_wait", lambda: False)  # the thread ends as it would by an error
    worker.retire(replica._guard)
    worker._thread.join()
    with pytest.raises(ResourceError, match="the engine takes no requests"):
        asyncio.run(replica.check_health())


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(ConfigError, match="can be reached by other machines"):
        application(Settings(server=ServeConfig.model_validate({"host": "0.0.0.0"})))


def answered(url: str, path: str, as_expected: Callable[[Any], bool] = lambda found: True) -> bool:
    """Whether a route answers, and as expected."""
    try:
        found = httpx2.get(f"{url}{path}", timeout=60)
    except httpx2.TransportError:
        return False
    return found.status_code == 200 and as_expected(found.json())


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; a test that waits in vain is stopped from outside."""
    while not condition():
        time.sleep(0.1)


def replica_process() -> int:
    """The process of the one replica that runs, by the title that Ray gives it."""
    titles = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    (found,) = [pid for pid, title in titles.items() if title.startswith("ray::ServeReplica:guard:lora-guard")]
    return found
