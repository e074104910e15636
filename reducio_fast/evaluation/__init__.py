"""Quality of clips and models: the toy world's report, reconstruction, and the metrics of the paper's tables."""
