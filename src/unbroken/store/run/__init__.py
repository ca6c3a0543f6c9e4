"""One run, its directory and its single owner: identity, catalog, journal, retention, branches."""
