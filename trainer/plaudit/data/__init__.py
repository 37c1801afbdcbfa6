"""Texts, prompts and ranked answers."""
