"""Clips as a service: the HTTP server, batches of prompts, the demo page in the browser."""
