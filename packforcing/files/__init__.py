"""Files: weights read safely, Wan checkpoints, compressor files, video files."""
