"""The domain: what is decided. Nothing in here imports Flask or RQ."""
