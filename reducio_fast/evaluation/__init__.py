"""Whether a clip, or a model, is good: the toy world's report, reconstruction."""
