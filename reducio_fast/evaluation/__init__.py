"""Whether a clip, or a model, is good: the toy world's report, reconstruction, the metrics of the paper's tables."""
