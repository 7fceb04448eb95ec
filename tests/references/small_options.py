"""Options of a small video on the command line."""

# Blocks of one latent frame at 64x64: a second of work, with mid blocks.
SMALL_VIDEO = [
    *("--width", "64", "--height", "64", "--block", "1"),
    *("--sink", "1", "--recent", "1", "--top-k", "2", "--steps", "2"),
]
