"""What a checkpoint is on disk: names, canonical JSON, digests, entries, the manifest."""
