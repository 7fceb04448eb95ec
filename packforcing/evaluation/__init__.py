"""Evaluation: what a video shows, measured from its pixels, over time and over cache policies."""
