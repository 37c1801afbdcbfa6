"""Batching and the model. Knows nothing of HTTP."""
