"""Products with the inverse of an empirical Fisher matrix."""
