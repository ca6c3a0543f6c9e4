"""One optimizer step: its forward and backward passes, its window, and memory for it."""
