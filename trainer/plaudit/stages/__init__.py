"""One module a stage, each readable from top to bottom."""
