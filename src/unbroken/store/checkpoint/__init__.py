"""One checkpoint folder: written, committed by one rename, read and verified."""
