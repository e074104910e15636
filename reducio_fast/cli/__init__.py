"""The `reducio-fast` command: one file a sub-command."""
