"""Pushing to a stand-in of the hub: what arrives, what is left out, and what each failure says."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness.foreign.hub import READER, TOKEN, Hub
from harness.tiny_models import tiny_gpt2
from plaudit import cli
from plaudit.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, ConfigError
from plaudit.policy.adapters import add_lora
from plaudit.run.hub import HubRejected, HubUnavailable, front_matter, push, require_pushable
from plaudit.run.runtime import exclusive
from plaudit.run.storage import replaced_model
from plaudit.settings.policy import LoraSettings
from plaudit.settings.sft import SFTConfig

# huggingface_hub still gives files to its HTTP client by a deprecated argument.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def model(policy_dir: Path, tmp_path: Path) -> Path:
    """A model directory as a stage leaves it, with checkpoints and logs beside the result."""
    directory = tmp_path / "out"
    with exclusive(directory), replaced_model(directory) as beside:
        shutil.copytree(policy_dir, beside, dirs_exist_ok=True)
        (beside / "README.md").write_text("---\ntags: [plaudit]\n---\n# A model\n")
        tiny_gpt2(seed=1).save_pretrained(beside / "merged")
    (directory / "checkpoints/step-000001").mkdir(parents=True)
    (directory / "checkpoints/step-000001/state.pt").write_bytes(b"state")
    (directory / "metrics.jsonl").write_text("{}\n")
    return directory


def files_in(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def held(hub: Hub, repo: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[repo].items() if name != ".gitattributes"}


def test_the_hub_gets_the_results_files_byte_for_byte_in_one_commit(hub: Hub, model: Path, policy_dir: Path) -> None:
    assert push(model, "me/policy", private=True) == f"{hub.url}/me/policy"
    merged = {f"merged/{name}": data for name, data in files_in(model / "merged").items()}
    card = (model / "README.md").read_bytes()
    assert held(hub, "me/policy") == {**files_in(policy_dir), **merged, "README.md": card}
    assert hub.private == {"me/policy": True}
    assert len(hub.commits) == 1


def test_a_large_file_arrives_in_parts(hub: Hub, model: Path) -> None:
    hub.multipart_from = 10_000
    push(model, "me/policy")
    assert held(hub, "me/policy")["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert len(hub.parts) > 2


def test_a_directory_of_other_programs_is_pushed_without_checkpoints_and_hidden_files(
    hub: Hub, model: Path, policy_dir: Path
) -> None:
    (model / ".model.files").unlink()
    push(model, "me/policy")
    merged = {f"merged/{name}" for name in files_in(model / "merged")}
    assert set(held(hub, "me/policy")) == {*files_in(policy_dir), *merged, "README.md", "metrics.jsonl"}


def test_a_new_model_replaces_the_old_one_and_leaves_other_files(hub: Hub, model: Path, tmp_path: Path) -> None:
    push(model, "me/policy")
    hub.repos["me/policy"]["LICENSE"] = b"mine"
    adapters = tmp_path / "adapters"
    add_lora(tiny_gpt2(), LoraSettings(r=2)).save_pretrained(adapters)
    (adapters / "README.md").unlink()  # peft's own, with the base's directory in it
    push(adapters, "me/policy")
    assert set(held(hub, "me/policy")) == {
        *("adapter_config.json", "adapter_model.safetensors", "LICENSE", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert len(hub.commits) == 2


def test_a_second_push_uploads_only_what_has_changed(hub: Hub, model: Path) -> None:
    push(model, "me/policy")
    (model / "README.md").write_text("---\ntags: [plaudit]\n---\n# Another card\n")
    hub.requests.clear()
    push(model, "me/policy")
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert hub.commits[-1][2] == ["file README.md"]


def test_hf_xet_uploads_too(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = tmp_path / "cas"
    push(model, "me/policy")
    weights = (model / "model.safetensors").read_bytes()
    assert held(hub, "me/policy")["model.safetensors"].decode() == sha256(weights).hexdigest()
    assert list((hub.xet / "xet/xorbs").rglob("*"))
    hub.fail("xet-write-token", 403)
    (model / "model.safetensors").write_bytes(weights + b"more")
    with pytest.raises(HubRejected, match="refuses the upload"):
        push(model, "me/policy")


# Failures


@pytest.mark.parametrize(
    ("path", "status", "kind", "words"),
    [
        ("repos/create", 401, HubRejected, "the hub answers 401: no, says the hub; set HF_TOKEN"),
        ("repos/create", 403, HubRejected, "the hub answers 403: no, says the hub; set HF_TOKEN"),
        ("repos/create", 503, HubUnavailable, "the hub answers 503: no, says the hub"),
        ("commit", 403, HubRejected, "the hub answers 403"),
        ("commit", 413, HubRejected, "the hub answers 413"),
        ("commit", 500, HubUnavailable, "the hub answers 500"),
        ("commit", None, HubUnavailable, "is not reachable (peer closed connection"),
        ("objects/batch", 401, HubRejected, "the hub answers 401"),
        ("/storage/", 403, HubRejected, "the hub answers 403"),
        ("validate-yaml", 400, HubRejected, "the hub answers 400"),
    ],
)
def test_a_refused_push_is_one_line_and_changes_neither_side(
    hub: Hub, model: Path, path: str, status: int | None, kind: type[Exception], words: str
) -> None:
    before = files_in(model)
    hub.fail(path, status, "no, says the hub", times=100)
    with pytest.raises(kind) as caught:
        push(model, "me/policy")
    assert f"me/policy at {hub.url}" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(model) == before
    assert hub.commits == []
    hub.failures.clear()
    push(model, "me/policy")  # nothing of the failure is in the way
    assert len(hub.commits) == 1


def test_a_passing_error_in_the_middle_is_retried(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail("/storage/", 503, "wait")
    hub.fail("preupload", None)
    push(model, "me/policy")
    assert held(hub, "me/policy")["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_a_token_that_may_only_read_is_refused(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubRejected, match="you must use a write token"):
        push(model, "me/policy")


def test_a_hub_that_is_not_there_is_unavailable(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable, match=r"me/policy at http://127\.0\.0\.1:9 is not reachable"):
        push(model, "me/policy")


def test_what_would_fail_after_the_training_is_refused_before_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    require_pushable(None)
    require_pushable("me/policy")
    with pytest.raises(ConfigError, match="push_to_hub='me/my policy' is no name of a repository"):
        require_pushable("me/my policy")
    with pytest.raises(ConfigError, match="hub_private=True without push_to_hub"):
        SFTConfig(hub_private=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=1 forbids"):
        require_pushable("me/policy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(ConfigError, match="needs a token of the hub: set HF_TOKEN"):
        require_pushable("me/policy")
    assert hub.requests == []


def test_a_directory_without_a_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither config\.json nor adapter_config\.json"):
        push(tmp_path, "me/policy")


def test_adapters_of_a_local_base_say_who_else_needs_it(
    hub: Hub, policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = add_lora(tiny_gpt2(), LoraSettings(r=2))
    adapted.peft_config["default"].base_model_name_or_path = str(policy_dir)
    adapted.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    push(tmp_path, "me/policy")
    assert f"the adapters belong to {policy_dir}, a directory of this machine" in capsys.readouterr().err


def test_a_card_names_a_base_only_if_the_hub_can_have_it(policy_dir: Path) -> None:
    def base_in(base: str | None) -> bool:
        return "base_model" in front_matter(base, library="peft", pipeline="text-generation", tags=())

    assert [base_in(base) for base in ("gpt2", "me/policy", str(policy_dir), "imdb-gpt2-mini", None)] == [
        *(True, True, False, False, False)
    ]


# The command line


def test_the_command_pushes_a_directory(hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["push", str(model), "me/policy", "--private", "--message", "First"]) == 0
    assert f"pushed: {hub.url}/me/policy" in capsys.readouterr().out
    assert (hub.private["me/policy"], hub.commits[0][1]) == (True, "First")
    assert cli.run(["push", str(model)]) == 2
    assert "plaudit push DIR REPO" in capsys.readouterr().err


def train(reviews: Path, policy_dir: Path, output: Path) -> list[str]:
    flags = ["--model", str(policy_dir), "--data", str(reviews), "--output-dir", str(output), "--max-length", "32"]
    return ["sft", *flags, "--optimizer.max-steps", "1", "--push-to-hub", "me/policy", "--hub-private"]


@pytest.mark.parametrize(("status", "code"), [(403, EXIT_REJECTED), (503, EXIT_UNAVAILABLE), (None, EXIT_UNAVAILABLE)])
def test_a_stage_whose_push_fails_has_its_whole_result_and_says_how_to_push_it(
    hub: Hub,
    reviews: Path,
    policy_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: int | None,
    code: int,
) -> None:
    hub.fail("commit", status, "not now")
    output = tmp_path / "sft"
    assert cli.run(train(reviews, policy_dir, output)) == code
    line = capsys.readouterr().err.splitlines()[-1]
    command = f"plaudit push {output} me/policy --private"
    assert line.startswith("plaudit sft: me/policy at ")
    assert line.endswith(f"the results are complete in {output}; push them with: {command}")
    assert json.loads((output / "sft.json").read_text())["perplexity"] > 0
    assert not (output / "checkpoints").exists()
    assert cli.run(command.split()[1:]) == 0
    assert held(hub, "me/policy") == {name: data for name, data in files_in(output).items() if not name.startswith(".")}


def test_the_standard_environment_names_hub_and_token(hub: Hub, model: Path) -> None:
    """In a process of its own, where nothing is set but the environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "plaudit.cli", "push", str(model), "me/policy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert held(hub, "me/policy")["model.safetensors"] == (model / "model.safetensors").read_bytes()
