"""Checks that settings share: each raises `ConfigError` with the field, its value and the bound."""

from plaudit.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            require(value > 0, f"{name}={value} must be greater than 0")


def fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{name}={value} must lie between 0 and 1")
