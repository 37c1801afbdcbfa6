"""A new reward model reaches every service, and nobody goes on before it has."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from harness.tiny_models import tiny_classifier_dir
from plaudit import errors
from plaudit.errors import ConfigError
from plaudit.rewards.errors import RewardRejected, RewardUnavailable
from plaudit.run import serving

URLS = ("http://one:8000", "http://two:8000")


def info(revision: str) -> dict[str, object]:
    limits = {"max_items": 1, "max_text_chars": 1, "max_body_bytes": 1, "max_tokens": 1}
    return {"id": "m", "revision": revision, "labels": ["score"], "limits": limits}


class Services:
    """Two services of the old model, which a reload with the right key makes serve the new one."""

    def __init__(self, *, away: int = 0, found: str = "sha256:new") -> None:
        self.serves = dict.fromkeys(("one", "two"), "sha256:old")
        self.reloads: list[str] = []
        self._away = away
        self._found = found

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if host == "two" and self._away:
            self._away -= 1
            raise httpx.ConnectError("connection refused", request=request)
        if request.url.path == "/v1/model:reload":
            if request.headers.get("authorization") != "Bearer k":
                problem = {"type": "t", "title": "t", "status": 403, "detail": "an administrator's key is needed"}
                return httpx.Response(403, json=problem)
            self.reloads.append(host)
            self.serves[host] = self._found
        return httpx.Response(200, json=info(self.serves[host]))


def reload_all(
    services: Callable[[httpx.Request], httpx.Response], key: str | None = "k", patience_s: float = 5.0
) -> None:
    transport = httpx.MockTransport(services)
    serving.reload_all(URLS, "sha256:new", key=key, patience_s=patience_s, transport=transport)


def test_each_service_reads_the_model_again_and_only_once() -> None:
    services = Services()
    reload_all(services)
    assert services.reloads == ["one", "two"]
    reload_all(services)
    assert services.reloads == ["one", "two"]


def test_a_service_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "FIRST_WAIT_S", 0.001)
    services = Services(away=3)
    reload_all(services)
    assert services.serves["two"] == "sha256:new"


def test_a_service_that_stays_away_ends_it_with_75() -> None:
    with pytest.raises(RewardUnavailable, match="http://two:8000: connection refused") as caught:
        reload_all(Services(away=1000), patience_s=0.1)
    assert caught.value.exit_code == errors.EXIT_UNAVAILABLE
    assert "http://one" not in str(caught.value)


def test_a_service_of_another_directory_is_never_taken_for_a_new_one() -> None:
    with pytest.raises(RewardUnavailable, match="two:8000 serves sha256:other: does it read the loop's directory"):
        reload_all(Services(found="sha256:other"), patience_s=0.1)


def test_a_wrong_key_is_told_at_once() -> None:
    with pytest.raises(RewardRejected, match=r"is refused \(403\): an administrator's key is needed"):
        reload_all(Services(), key="wrong")


def test_what_is_published_has_the_models_revision_and_nothing_of_the_one_before(tmp_path: Path) -> None:
    one, two = (tiny_classifier_dir(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    served = tmp_path / "served"
    (one / "added_vocabulary.txt").write_text("words")
    serving.publish(one, served)
    assert serving.revision_of(served) == serving.revision_of(one)
    before = (served / "config.json").stat().st_mtime_ns
    serving.publish(one, served)
    assert (served / "config.json").stat().st_mtime_ns == before
    serving.publish(two, served)
    assert serving.revision_of(served) == serving.revision_of(two) != serving.revision_of(one)
    assert not (served / "added_vocabulary.txt").exists()


def test_a_model_that_no_loop_put_there_is_replaced_whole(tmp_path: Path) -> None:
    model, served = (tiny_classifier_dir(tmp_path / name, seed=seed) for seed, name in enumerate(("model", "served")))
    (served / "vocab.txt").write_text("of another tokenizer")
    serving.publish(model, served)
    assert serving.revision_of(served) == serving.revision_of(model)


def test_the_key_is_the_files_first_line_or_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serving.ADMIN_KEY_VARIABLE, raising=False)
    assert serving.admin_key(None) is None
    monkeypatch.setenv(serving.ADMIN_KEY_VARIABLE, "of the environment")
    assert serving.admin_key(None) == "of the environment"
    file = tmp_path / "key"
    file.write_text("first\nsecond\n")
    assert serving.admin_key(file) == "first"
    file.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        serving.admin_key(file)
    with pytest.raises(ConfigError, match="can't be read"):
        serving.admin_key(tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no process that its parent has died")
def test_a_service_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from plaudit.run.service_process import ranking_service\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "with ranking_service(here / 'r.db', here, api_key='k', ready_timeout_s=100) as url:\n"
        "    print(url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode().strip()
        with httpx.Client(base_url=url, timeout=60) as http:
            assert http.get("/livez").is_success
            parent.kill()
            # It answers what is open and then closes the port.
            asks = iter(lambda: http.get("/livez", headers={"connection": "close"}).is_success, None)
            with pytest.raises(httpx.TransportError):
                all(asks)
