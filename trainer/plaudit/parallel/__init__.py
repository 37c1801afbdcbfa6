"""One process or several, with whole or split weights."""
