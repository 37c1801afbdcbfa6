"""The model hub: whether it can be reached, or offline mode is on; and its cache."""

import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from plaudit.doctor.findings import Finding, note, ok, wrong

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
LEAST_FREE_GIB = 1.0


def check_hub(timeout_s: float, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Reach the hub, unless a variable says that it is not to be used; then look at the cache."""
    offline = [name for name in OFFLINE if environment.get(name, "0").upper() in ("1", "TRUE", "ON", "YES")]
    url = environment.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if offline:
        yield note("hub", f"{', '.join(offline)} is set: only cached and local models and data are used")
    else:
        reason = _unreachable(url, timeout_s)
        if reason is None:
            yield ok("hub", f"{url} answers")
        else:
            yield wrong(
                "hub",
                f"{url} can't be reached: {reason}",
                "export HF_HUB_OFFLINE=1 to use only local and cached models, HTTPS_PROXY to go through a proxy, or "
                "HF_ENDPOINT to name a mirror",
            )
    yield from check_cache(environment)


def check_cache(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether the hub's cache can be written to."""
    home = environment.get("HF_HOME") or str(
        Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "huggingface")
    )
    cache = Path(environment.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    place = next(parent for parent in (cache, *cache.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield wrong(
            "hub",
            f"the cache {cache} can't be written to: {error.strerror}",
            "export HF_HOME=DIRECTORY, one that you can write to and that has space",
        )
        return
    yield ok("hub", f"the cache {cache} can be written to")


def _unreachable(url: str, timeout_s: float) -> str | None:
    """Why the hub gives no answer; None if it does, whatever the answer is."""
    request = urllib.request.Request(f"{url}/api/models?limit=1", method="HEAD")
    try:
        # An opener of its own: the shared one keeps the proxies of its first use.
        with urllib.request.build_opener().open(request, timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        # A proxy that refuses, or a gateway that can't go on, is no hub.
        return None if error.code < 500 and error.code != 407 else f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return str(getattr(reason, "strerror", None) or reason or type(error).__name__)
