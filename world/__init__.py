"""The built-in world: scenes to train and test on without a download, and the CLIP that knows their names."""
