"""Which rows of the activations to keep."""
