"""Recipes and the loop that runs them; `tiny` makes the embedded model."""
