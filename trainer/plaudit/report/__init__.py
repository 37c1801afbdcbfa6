"""Metrics of an evaluation, the report page and model cards."""
