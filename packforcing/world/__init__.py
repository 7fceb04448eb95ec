"""The synthetic world that the demo models draw: captions, scenes, drawing."""
