"""Graphs and groups."""
