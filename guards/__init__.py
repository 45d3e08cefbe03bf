"""For runs of days: what stops them in good order, keeps others out, and tries everything once before the first step."""
