"""Proxy variables, and a reward service: its health, its label and its revision."""

import os
from collections.abc import Iterator, Mapping

from plaudit.doctor.findings import Finding, note, ok, wrong
from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, RewardRejected, RewardUnavailable
from plaudit.rewards.proxies import proxy_for
from plaudit.rewards.settings import RewardSettings

HUB = "https://huggingface.co"


def check_proxies(reward_url: str | None, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Which proxy the reward service and the hub are reached through, and whether its variable makes sense."""
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    there = [name for lower in names for name in (lower, lower.upper()) if environment.get(name)]
    if not there:
        yield ok("proxies", "no variable names one")
        return
    for url in (HUB, *([reward_url] if reward_url else [])):
        try:
            proxy = proxy_for(url, environment)
        except ConfigError as error:
            yield wrong("proxies", f"{url}: {error}", f"unset {str(error).partition('=')[0]}, or correct it")
            continue
        through = f"is reached through {proxy}" if proxy else "is reached without a proxy"
        yield note("proxies", f"{', '.join(there)}: {url} {through}")


def check_reward(url: str, label: str | None, revision: str | None, timeout_s: float) -> Iterator[Finding]:
    """Connect as PPO does: health, label, order of rewards; and compare the revision."""
    try:
        settings = RewardSettings.of(
            url=(url,), label=label, patience_s=timeout_s, request_timeout_s=timeout_s, connect_timeout_s=timeout_s
        )
        with RewardClient(settings) as client:
            info = client.connect()
    except RewardUnavailable as error:
        yield wrong(
            "reward",
            f"{url} does not answer: {error}",
            "plaudit-reward --model DIR --port 8000, or another --reward-url",
        )
    except (RewardRejected, ConfigError) as error:
        yield wrong(
            "reward", f"{url} refuses: {error}", "give --label one of the service's labels, or the right --reward-url"
        )
    else:
        labels = f"its labels are {', '.join(info.labels)}" if info.labels else "it has no labels"
        if revision is not None and revision != client.revision:
            yield wrong(
                "reward",
                f"{url} serves the revision {client.revision}, not {revision}",
                "plaudit-reward --model the directory of that revision",
            )
        else:
            yield ok("reward", f"{url} answers; {labels}; its revision is {client.revision}")
