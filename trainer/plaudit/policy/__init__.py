"""The policy: language model, value head, reference, and sampling from it."""
