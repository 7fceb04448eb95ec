"""The synthetic world that the demo models draw: captioned videos with ground truth, of any length, from a seed.

`captions.py` has the attributes and what is said of them, `scenes.py` what moves where, `shapes.py` the shapes'
geometry, and `drawing.py` makes frames.
"""
