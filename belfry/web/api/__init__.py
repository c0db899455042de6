"""The JSON API, a module a subject."""
