"""Dynamic batching and the model. Nothing here depends on HTTP."""
