"""Checks shared by all settings. Each raises `ConfigError` with the field, its value and the bound."""

from plaudit.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def positive(config: object, *names: str) -> None:
    """Raises `ConfigError` unless each named field is None or greater than 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            require(value > 0, f"{name}={value} must be greater than 0")


def fraction(config: object, *names: str) -> None:
    """Raises `ConfigError` unless each named field is None or lies between 0 and 1, both included."""
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 <= value <= 1, f"{name}={value} must lie between 0 and 1")


def check_push(config: object) -> None:
    """Raises `ConfigError` for a private repository (`hub_private`) that nothing is pushed to (`push_to_hub`)."""
    repo, private = getattr(config, "push_to_hub", None), getattr(config, "hub_private", False)
    require(repo is not None or not private, "hub_private=True without push_to_hub: name the repository")
