"""Decide who is notified of a message, and record it."""
