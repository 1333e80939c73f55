"""Measured: this implementation against a straightforward one of the same method, with the same weights."""

import export  # noqa: F401  makes the root's files the package `uhr_bat`
