"""Publish, collect and send what is new, as server-sent events."""
