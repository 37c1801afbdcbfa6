"""What can go wrong in any part."""


class ConfigError(Exception):
    """A setting that cannot work. The message names the field, the value and what to do."""
