"""Sequence layers: linear recurrences."""
