"""Training of the two networks at any size: latents, the transformer's recipe, the autoencoder's."""
