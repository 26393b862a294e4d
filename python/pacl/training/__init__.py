"""`pacl train`: the embedder on your pairs and frozen towers."""
