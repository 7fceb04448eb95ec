"""Making a video: what fits, how it is prepared, and the loop."""
