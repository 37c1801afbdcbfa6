"""The reward service: one process that loads a classifier and answers rewards over HTTP."""
