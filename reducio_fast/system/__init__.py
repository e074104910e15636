"""This machine and this process: errors, devices, variables, clocks, the cache folder, files written whole."""
