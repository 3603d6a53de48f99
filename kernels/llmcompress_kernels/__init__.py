"""Fast products with factorised weights, as torch custom operators; depends on torch and triton alone."""
