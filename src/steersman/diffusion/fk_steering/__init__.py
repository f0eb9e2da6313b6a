"""FK steering."""
