"""The trainer: the stages of RLHF, joined by directories, rewarded over HTTP."""
