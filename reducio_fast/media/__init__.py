"""Clips and images as files and arrays: reading, writing, cropping, comparison."""
