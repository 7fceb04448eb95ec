"""Files: weights read safely, Wan checkpoints, compressor files, video files.

`weights.py` reads any file of weights; `file_kinds.py` tells what one is by its tensors' names. `wan_names.py` chooses
a set of weights and gives it Wan's names, `wan_checkpoint.py` checks that it is a Wan, `compressor_file.py` is the
compressor's format, and `video.py` writes and reads videos.
"""
