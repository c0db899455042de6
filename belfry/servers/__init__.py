"""Servers, channels, roles and members: who may see, post in and be notified of what."""
