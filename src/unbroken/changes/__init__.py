"""What differs between the run that was stored and the one that starts, and what follows."""
