"""The program itself, in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.__main__ import api_keys, main, parse_settings

Start = Callable[..., "subprocess.Popen[str]"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "plaudit.reward_service", *arguments]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **extra: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**extra)
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def ready_line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    stdout: IO[str] = process.stdout  # type: ignore[assignment]
    line = stdout.readline()
    assert line, process.communicate()[1]
    answer: dict[str, Any] = json.loads(line)
    return answer


def test_it_serves_tells_where_reloads_on_sighup_and_ends_cleanly(tmp_path: Path, start: Start) -> None:
    model = tiny_classifier_dir(tmp_path / "model")
    ready_file = tmp_path / "ready.json"
    process = start("--model", str(model), "--port", "0", "--ready-file", str(ready_file), REWARD_LABEL="POSITIVE")
    ready = ready_line(process)
    assert (ready["checked"]["batches"], ready["checked"]["longest_tokens"]) == ("packed", 64)
    assert ready["checked"]["apart"] <= ready["checked"]["allowed"] == 1e-5
    assert json.loads(ready_file.read_text()) == {"url": ready["url"], "pid": process.pid}
    body = {"items": [{"prompt": "this movie", "response": " was great"}]}
    answer = httpx.post(f"{ready['url']}/v1/rewards", json=body).json()
    assert len(answer["rewards"]) == 1
    assert (answer["revision"], answer["label"]) == (ready["revision"], "POSITIVE")
    tiny_classifier_dir(model, seed=1)
    process.send_signal(signal.SIGHUP)
    reloaded = ready_line(process)
    assert (reloaded["event"], reloaded["revision"] != ready["revision"]) == ("reloaded", True)
    again = httpx.post(f"{ready['url']}/v1/rewards", json=body).json()
    assert again["revision"] == reloaded["revision"]
    assert again["rewards"] != answer["rewards"]
    process.send_signal(signal.SIGTERM)
    drained = ready_line(process)
    assert (drained["event"], drained["accepted"], drained["answered"]) == ("drained", 0, 0)
    assert process.wait(60) == 0
    assert process.communicate() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model is missing"),
        (["--model", "./nowhere"], "there is no directory ./nowhere"),
        (["--model", "{model}", "--label", "HAPPY"], "no label 'HAPPY'; its labels are NEGATIVE, POSITIVE"),
        (["--model", "{model}", "--port", "70000"], "--port 70000"),
        (["--model", "{model}", "--dtype", "int8", "--devices", "cuda:0"], "int8 runs on CPUs only"),
        (["--model", "{model}", "--devices", "cuda:0"], "--devices cuda:0 can't be used"),
        (["--model", "{model}", "--devices", "gpu"], "--devices gpu can't be used"),
        (["--model", "{model}", "--max-tokens", "2"], "--max-tokens 2 leaves no room for text beside the 2 tokens"),
        (["--model", "wei\udcc3\udc9f"], "can't be encoded in this locale"),
        (["--model", "{model}", "--port", "{busy}"], "choose another --port"),
        (["--model", "{model}", "--api-key-file", "/nowhere"], "--api-key-file /nowhere can't be read"),
        (["--model", "{model}", "--host", "no.such.host.invalid"], "not an address of this machine"),
    ],
)
def test_what_cannot_work_is_one_clear_line(
    classifier_dir: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        status = main([a.format(model=classifier_dir, busy=busy.getsockname()[1]) for a in arguments])
    signal.signal(signal.SIGTERM, before)
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("plaudit-reward: ")
    assert err.count("\n") == 1


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from plaudit.reward_service.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=False).returncode
        == 0
    )


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufefffirst\n\nsecond\n", encoding="utf-8")  # some editors begin a file with a byte-order mark
    monkeypatch.setenv("REWARD_API_KEY", "third")
    assert api_keys(parse_settings(["--model", "m", "--api-key-file", str(file)])) == ["third", "first", "second"]


def test_a_key_never_comes_from_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--model", "m", "--api-key", "secret"])
    assert caught.value.code == 2
    capsys.readouterr()


def test_every_flag_is_also_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODEL", "m")
    monkeypatch.setenv("REWARD_DEVICES", "cuda:0,cuda:1")
    monkeypatch.setenv("REWARD_DETERMINISTIC", "true")
    settings = parse_settings(["--port", "1"])
    assert (settings.model, settings.devices, settings.deterministic) == ("m", ("cuda:0", "cuda:1"), True)
    assert settings.port == 1
