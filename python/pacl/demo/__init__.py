"""`pacl demo`: a world, a CLIP and an embedder that train in minutes."""
