"""From files of text to training batches: corpus, tokens, infilling. Import the modules themselves:
corpus needs no torch, and the launcher uses it."""
