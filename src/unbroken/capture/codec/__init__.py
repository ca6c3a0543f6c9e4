"""State trees <-> typed JSON and raw tensor bytes."""
