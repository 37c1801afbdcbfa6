"""The database: its tables, and everything that is read from it or written to it. Knows nothing of HTTP."""
