"""`pacl demo`: generated scenes, and a CLIP and an embedder that train on them in minutes."""
