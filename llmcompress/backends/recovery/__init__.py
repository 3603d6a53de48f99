"""Rank-r factors from full, partial or corrupted entries, and from linear measurements."""
