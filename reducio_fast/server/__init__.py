"""Clips as a service: the demo page in the browser."""
