"""What runs a call: components, the executor, sampling, decoding, adapters, warm-up."""
