"""In which order gradients are summed over micro-batches and ranks."""
