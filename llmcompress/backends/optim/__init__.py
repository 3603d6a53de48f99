"""Optimisers for training what was compressed, and robust aggregation of its gradients."""
