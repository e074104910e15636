"""How much memory a stage needs, how to make it fit, and where its weights are meanwhile."""
