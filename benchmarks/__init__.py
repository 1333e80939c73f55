"""Measured: this implementation against a straightforward one of the same method, with the same weights."""
