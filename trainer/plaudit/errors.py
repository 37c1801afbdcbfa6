"""What can go wrong in any part."""


class ConfigError(Exception):
    """A setting that cannot work. The message names the field, the value and what to do."""


class NotFinite(Exception):
    """A loss, a figure or a weight is NaN or infinite. Nothing that holds one is saved."""


class NotAsSaved(Exception):
    """What was written, read again, is something else. It does not take the place of what was there."""
