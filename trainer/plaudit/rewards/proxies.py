"""Select the proxy for a reward endpoint from the environment. Services on this machine never use a proxy.

`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, also in lower case, work as in curl. Each endpoint is handled
separately. Failure modes: a local service is reached through a company's proxy; a run fails on an invalid variable that
it doesn't need.
"""

import importlib.util
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from plaudit.errors import ConfigError

SOCKS = ("socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """A proxy's URL, and the environment variable that sets it."""

    url: str
    variable: str

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return f"the proxy {parts.scheme}://{parts.netloc.rpartition('@')[2]} ({self.variable})"


def proxy_for(url: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy for an endpoint, or None. Raises `ConfigError` if the variable's value is invalid."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_this_machine(host):
        return None
    variable, value = _named(parts.scheme, environment)
    if not value or _goes_around(host, parts.port, environment):
        return None
    proxy = Proxy(value if "://" in value else f"http://{value}", variable)
    _check(proxy, host)
    return proxy


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _named(scheme: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """The applicable variable and its value. Lower case takes precedence; an empty value turns the proxy off."""
    for name in (f"{scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            # CGI scripts receive a request's "Proxy" header as HTTP_PROXY.
            if variable in environment and not (variable == "HTTP_PROXY" and "REQUEST_METHOD" in environment):
                return variable, environment[variable].strip()
    return "", ""


def _goes_around(host: str, port: int | None, environment: Mapping[str, str]) -> bool:
    """Whether NO_PROXY covers the host: by name, domain, address range, or `*`."""
    listed = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    address = _address(host)
    for entry in filter(None, (entry.strip().lower() for entry in listed.replace(" ", ",").split(","))):
        if entry == "*":
            return True
        if address is not None and _covers(entry, address):
            return True
        name = entry.rpartition("://")[2]
        name, colon, wanted = name.partition(":")
        if colon and wanted.isdigit() and int(wanted) != port:
            continue
        domain = name.removeprefix("*").removeprefix(".")
        if domain and (host == domain or host.endswith(f".{domain}")):
            return True
    return False


def _covers(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def _check(proxy: Proxy, host: str) -> None:
    around = f"; or put {host} into NO_PROXY to go around the proxy"
    try:
        parts = urlsplit(proxy.url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    shown = proxy.url.rpartition("@")[2]
    if not usable:
        raise ConfigError(f"{proxy.variable}={shown} is no proxy's address; write http://HOST:PORT{around}")
    if parts.scheme in SOCKS:
        if importlib.util.find_spec("socksio") is None:
            raise ConfigError(
                f"{proxy.variable}={shown} is a SOCKS proxy, which needs a further package: "
                f"pip install 'httpx[socks]'{around}"
            )
    elif parts.scheme not in ("http", "https"):
        raise ConfigError(
            f"{proxy.variable}={shown} can't be used: a proxy begins with http://, https:// or socks5://{around}"
        )
