"""The recipe of the embedded model, one file a component."""
