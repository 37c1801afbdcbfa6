"""The ranking service: people put answers in order, on a page that loses nothing. No torch."""
