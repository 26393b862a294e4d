"""Zero-shot evaluation on data sets: what they are, how they are measured, and the measuring."""
