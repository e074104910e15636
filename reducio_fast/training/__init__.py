"""Training recipes and the loop that runs them: `reducio` trains both networks, `tiny` makes the embedded model."""
