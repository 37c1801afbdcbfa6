"""The settings: one frozen dataclass for each stage, validated on construction."""
