"""Which samples make which batch: a pure function of seed, epoch and position."""
