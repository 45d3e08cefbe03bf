"""Files on disk, as others made them: datasets, lists of names, CLIP weights, SAN checkpoints; and a folder of yours."""
