"""The training recipe of the embedded default model. Nothing outside this package imports it, except the `train` command."""
