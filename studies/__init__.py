"""Questions put to a finished run, a command each: scores of published sets, pictures, ablations, meaning, speed."""
