"""One process or several, with replicated or sharded weights: `parallel.processes.Processes` answers for all three."""
