"""What the reward service and the ranking service share: starting, refusing, shutting down. No torch, no database."""
