"""The server on Ray Serve: guards by name, put in while it runs; a replica that dies is replaced; access as alone."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from guards import tiny_guard_folder

from lora_guard import Conversation, Guard
from lora_guard.errors import ConfigError
from lora_guard.serving.config import ServeConfig

ray = pytest.importorskip("ray", reason="needs the extra 'scale'; make test-extras installs it")
with warnings.catch_warnings(action="ignore"):  # its own code's
    from ray import serve
from lora_guard.scale.deployment import Extra, Settings, application  # noqa: E402

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
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "120"  # a busy machine starts it slowly
    with socket.create_server(("127.0.0.1", 0)) as free:
        found = int(free.getsockname()[1])
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": found})
    yield found
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def url(port: int, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    run(folders, Extra(guards={"more": str(folders["second"])}), audit(tmp_path_factory))
    return f"http://127.0.0.1:{port}"


def audit(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "audit.jsonl"


def run(folders: dict[str, Path], extra: Extra, log: Path) -> None:
    server = ServeConfig.model_validate({"model_name": "main", "audit": log})
    bound = application(Settings(guard=str(folders["first"]), server=server))
    serve.run(with_extra(bound, extra), name="guard")


def with_extra(bound: Any, extra: Extra) -> Any:
    """The application with another ``user_config``, as a YAML file of ``serve deploy`` gives it."""
    deployment = bound._bound_deployment
    settings = deployment.init_args
    return deployment.options(user_config=extra.model_dump()).bind(*settings)


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
    body = {"model": "more", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 6, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 4


def test_guards_are_put_in_and_taken_away_while_the_replica_runs(
    url: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    process = replica_process()
    extra = Extra(guards={"main": str(folders["third"]), "new": str(folders["first"])})
    run(folders, extra, audit(tmp_path_factory))
    assert [card["id"] for card in httpx2.get(f"{url}/v1/models", timeout=60).json()["data"]] == ["main", "new"]
    assert score(url, "main") == ("main", pytest.approx(alone(folders["third"]), abs=1e-5))
    assert score(url, "new") == ("new", pytest.approx(alone(folders["first"]), abs=1e-5))
    assert score(url, "more")[0] == "main"
    run(folders, Extra(), audit(tmp_path_factory))
    assert score(url, "main") == ("main", pytest.approx(alone(folders["first"]), abs=1e-5))
    assert replica_process() == process


def test_each_replica_has_an_audit_log_of_its_own(url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    score(url, "main")
    (log,) = tmp_path_factory.getbasetemp().glob("audit.*.jsonl")
    assert log.read_text("utf-8").count("\n") >= 1


def test_a_replica_whose_process_dies_is_replaced(url: str, folders: dict[str, Path]) -> None:
    process = replica_process()
    os.kill(process, 9)
    expected = alone(folders["first"])
    for _ in range(240):
        try:
            found = httpx2.post(f"{url}/v1/moderations", json={"model": "main", "input": TEXT}, timeout=60)
            if found.status_code == 200:
                break
        except httpx2.TransportError:
            pass
        time.sleep(0.25)
    assert score(url, "main")[1] == pytest.approx(expected, abs=1e-5)
    assert replica_process() != process


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(ConfigError, match="can be reached by other machines"):
        application(Settings(server=ServeConfig.model_validate({"host": "0.0.0.0"})))


def replica_process() -> int:
    """The process of the one replica that runs, by the title that Ray gives it."""
    titles = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    (found,) = [pid for pid, title in titles.items() if title.startswith("ray::ServeReplica:guard:lora-guard")]
    return found
