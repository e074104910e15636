"""The recipe of the embedded model, one file per component."""
