"""The training recipe of the embedded default model. Only the `train` command imports it."""
