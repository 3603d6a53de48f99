"""Matrix manifolds, groups, and networks that respect them."""
