"""Zero-shot evaluation: datasets, protocols, measures, and the commands that run them."""
