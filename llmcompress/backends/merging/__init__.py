"""Symmetries of networks: matching models by them, merging, and what lies between two models."""
