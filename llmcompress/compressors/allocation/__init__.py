"""How one global budget is spread over the units: a file an allocation."""
