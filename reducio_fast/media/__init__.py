"""Clips and images as files and arrays: read, write, cut, compare."""
