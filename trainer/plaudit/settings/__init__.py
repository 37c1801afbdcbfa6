"""One frozen dataclass a stage, checked when it is built."""
