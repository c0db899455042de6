"""Modules that start product code with an injected fault in a separate process."""
