"""One resume: which checkpoint, what it says, loaded into the live objects."""
