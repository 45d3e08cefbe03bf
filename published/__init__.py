"""Other people's files, as they were published: datasets, lists of names, CLIP weights, SAN checkpoints."""
