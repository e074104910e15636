"""What a call means: the request, the parts that run it, one folder for each model family."""
