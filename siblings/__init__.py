"""Other models on the same contract (segmenter.py): one file each."""
