"""Curation of raw videos into a list of clips: detects shots, measures scores, then selects clips by percentile."""
