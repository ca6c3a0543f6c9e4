"""Where batches come from, and how each source finds its position again."""
