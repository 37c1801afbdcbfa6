"""Upload a finished model directory to the Hugging Face hub."""

from plaudit.errors import ConfigError
from plaudit.policy.reading import settle
from plaudit.run.hub import files_of, push, require_pushable
from plaudit.settings.push import PushConfig


def run(config: PushConfig) -> str:
    """Upload the directory in one commit; print and return the repository's address.

    Raises:
        ConfigError: the directory holds no model, or there is no token.
        HubUnavailable, HubRejected: the hub did not take it.
    """
    if not config.repo:
        raise ConfigError("repo is missing: plaudit push DIR REPO")
    require_pushable(config.repo)
    settle(config.directory)
    names = files_of(config.directory)
    size = sum((config.directory / name).stat().st_size for name in names)
    print(f"pushing {len(names)} files, {size / 2**20:,.1f} MiB, to {config.repo}", flush=True)
    url = push(config.directory, config.repo, private=config.private or None, message=config.message)
    print(f"pushed: {url}")
    return url
