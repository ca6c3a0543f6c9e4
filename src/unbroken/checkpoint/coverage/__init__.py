"""What a run depends on and nobody registered: found, saved, compared or named."""
