"""Reducio, fast: text and an image in, a short clip out."""
