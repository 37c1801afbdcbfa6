"""Figures of an evaluation, and the pages that show them."""
