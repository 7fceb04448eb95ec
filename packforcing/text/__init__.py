"""Wan 2.1's text encoder: words to embeddings, by UMT5-XXL's encoder half."""
