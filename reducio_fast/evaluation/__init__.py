"""Metrics, the analytic detector and the report: how good the clips are."""
