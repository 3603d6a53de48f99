"""Least squares, symmetric positive definite systems and sparse codes."""
