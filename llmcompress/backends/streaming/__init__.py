"""Summaries of rows that are seen once."""
