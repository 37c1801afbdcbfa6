"""One run on a GPU that measures everything: see docs/evidence/gpu.md."""
