"""The `reducio-fast` command: one file per sub-command."""
