"""Upload a finished model directory to the Hugging Face hub.

Failure modes: results are lost, or the whole stage counts as failed without a word about them, because the hub refuses
an upload; files of two models end up in one repository; a directory is uploaded while it is replaced. Therefore the
directory is complete before its upload begins, an upload is one commit, and an error names the command that repeats it.
"""

import fnmatch
import glob
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]

from plaudit import atomic, demo_models
from plaudit.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, ConfigError, PlauditError
from plaudit.policy.reading import MODEL, reading
from plaudit.run.storage import MODEL_ENTRIES, WEIGHTS

NOT_UPLOADED = (".*", "*/.*", "checkpoints/*", "tensorboard/*", "wandb/*", "mlruns/*", "trackio/*")
"""Of a directory without a record of its result's files: hidden files, checkpoints, trackers' files."""
REPLACED = (*MODEL_ENTRIES, *WEIGHTS, "generation_config.json", "value_head.safetensors", "merged/*", "value_model/*")
"""Files of an earlier model, which would mix with those of a new one that lacks them."""
PASSING = frozenset({408, 409, 425, 429})
"""Statuses besides 5xx after which the same request may succeed."""
REQUEST_TIMEOUT_S = 120.0
"""Longest wait for a connection, or for the next bytes of an answer."""
XET_REFUSAL = "HTTP status client error"
"""hf_xet raises a `ConnectionError` with these words for 4xx answers."""
LOGIN = "set HF_TOKEN to a token with write access, or log in with `hf auth login`"


class HubUnavailable(PlauditError):
    """The hub is unreachable or answers with a passing error. Push again later (exit 75)."""

    exit_code = EXIT_UNAVAILABLE


class HubRejected(PlauditError):
    """The hub refuses the upload: without a change, a retry won't help (exit 65)."""

    exit_code = EXIT_REJECTED


def require_pushable(repo: str | None) -> None:
    """Check what can be checked before the hours of training, without asking the hub. None asks for no push.

    Raises:
        ConfigError: the name is none of a repository, there is no token, or the hub must not be used (HF_HUB_OFFLINE).
    """
    if repo is None:
        return
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repo!r} is no name of a repository: {_one_line(error)}") from None
    if huggingface_hub.is_offline_mode():
        raise ConfigError(f"push_to_hub={repo!r} needs the hub, and HF_HUB_OFFLINE=1 forbids its use: unset it")
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"push_to_hub={repo!r} needs a token of the hub: {LOGIN}")


def push_results(directory: Path, repo: str | None, *, private: bool) -> None:
    """Push a stage's finished results, if `repo` is given, and print the address.

    Raises:
        HubUnavailable, HubRejected: the message names the command that pushes the directory again.
    """
    if repo is None:
        return
    command = push_command(directory, repo, private=private)
    print(f"pushing to {repo}; should this be stopped, `{command}` does it again", flush=True)
    try:
        url = push(directory, repo, private=private or None)
    except (HubUnavailable, HubRejected) as error:
        error.add_note(f"the results are complete in {directory}; push them with: {command}")
        raise
    print(f"pushed: {url}", flush=True)


def push_command(directory: Path, repo: str, *, private: bool) -> str:
    """The shell command that pushes a directory."""
    return shlex.join(["plaudit", "push", str(directory), repo, *(["--private"] if private else [])])


def push(
    directory: Path,
    repo: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str | None = None,
) -> str:
    """Upload the model in a directory to `repo` in one commit; return the repository's address.

    The repository is created if it doesn't exist; `private` applies only then, and None leaves it to the hub. Files of
    an earlier model there that this one lacks are deleted in the same commit. The hub's address is `HF_ENDPOINT`, the
    token `HF_TOKEN` or the one of `hf auth login`, unless given.

    Raises:
        ConfigError: the directory holds no model, or its model was replaced during the upload.
        HubUnavailable, HubRejected: the hub did not take it. Its model is still the earlier one.
    """
    with reading(directory):
        names = files_of(directory)
        base = local_base(directory)
        if base is not None:
            print(
                f"the adapters belong to {base}, a directory of this machine: others need it too; push the merged "
                "model, or the base as well, and name it as base_model_name_or_path in adapter_config.json",
                file=sys.stderr,
            )
        api = HfApi(token=token)
        with _explaining(api.endpoint, repo):
            created = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=created.repo_id,
                folder_path=directory,
                allow_patterns=[glob.escape(name) for name in names],
                delete_patterns=list(REPLACED),
                commit_message=message or f"Upload {directory.name} with plaudit",
            )
    return str(created)


def files_of(directory: Path) -> list[str]:
    """The files of the model in a directory, relative to it, with `/`: those of its record if it has one.

    Raises:
        ConfigError: there is no model in the directory.
    """
    if not any((directory / name).is_file() for name in MODEL_ENTRIES):
        raise ConfigError(
            f"{directory} holds no model to push: it has neither {' nor '.join(MODEL_ENTRIES)}; name the output "
            "directory of a finished stage"
        )
    recorded = atomic.recorded_files(directory, MODEL)
    if recorded is not None:
        return [name for name in recorded if (directory / name).is_file()]
    found = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return [name for name in found if not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_UPLOADED)]


def local_base(directory: Path) -> str | None:
    """The base of the adapters in a directory, if it is a directory too, which a reader of the hub can't load."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return str(base) if base and Path(base).exists() else None


def front_matter(base: str | None, *, library: str, pipeline: str, tags: Sequence[str]) -> str:
    """A model card's YAML header. `base` is named only if it can be a model of the hub, which refuses other names."""
    known = {"base_model": base} if base is not None and not Path(demo_models.resolve(base)).exists() else {}
    front = {**known, "library_name": library, "pipeline_tag": pipeline, "tags": [*tags, "plaudit"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---"


@contextmanager
def _explaining(endpoint: str, repo: str) -> Iterator[None]:
    """Convert errors of huggingface_hub in the block to `HubUnavailable` and `HubRejected`."""
    session = get_session()
    before, session.timeout = session.timeout, REQUEST_TIMEOUT_S  # without it, a silent hub is waited for for ever
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        where = f"{repo} at {endpoint}"
        for cause in _causes(error):
            if isinstance(cause, HfHubHTTPError):
                raise _refused(cause, where) from error
            if isinstance(cause, HTTPError | OSError):
                reason = _one_line(cause) or type(cause).__name__
                if XET_REFUSAL in reason:
                    raise HubRejected(f"{where}: the hub refuses the upload ({reason:.200}); {LOGIN}") from error
                raise HubUnavailable(f"{where} is not reachable ({reason:.200})") from error
        raise HubRejected(f"{where} was not pushed: {_one_line(error):.300}") from error
    finally:
        session.timeout = before


def _refused(error: HfHubHTTPError, where: str) -> PlauditError:
    """The exception for an HTTP error of the hub."""
    status = error.response.status_code
    reason = error.server_message or str(error)
    line = f"{where}: the hub answers {status}: {_one_line(reason):.300}"
    if status in PASSING or status >= 500:
        return HubUnavailable(line)
    if status in (401, 403, 404):
        return HubRejected(f"{line}; {LOGIN}, and check the repository's name")
    return HubRejected(line)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, from the first to the last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
