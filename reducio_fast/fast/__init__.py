"""Fast twins of `reference/`, family by family, and the plan that picks what runs each layer."""
