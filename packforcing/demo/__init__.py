"""The demo models, which come with the library, and their text encoder."""
