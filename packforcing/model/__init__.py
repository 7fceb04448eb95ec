"""The models: causal Wan, compressor, VAE, attention."""
