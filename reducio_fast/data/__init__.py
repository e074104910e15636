"""Clips to learn from: the toy world, photographs under camera moves."""
