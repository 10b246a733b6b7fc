"""Data: audio files, manifests, text, data sets, and the synthesised corpus of the demo."""
