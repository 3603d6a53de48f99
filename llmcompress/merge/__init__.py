"""Merging checkpoints: the command, its recipe and its report."""
