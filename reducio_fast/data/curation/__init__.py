"""From raw videos to a list of clips: shots, motion, text, scores; thresholds afterwards, by percentile."""
