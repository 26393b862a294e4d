"""`pacl train`: train the embedder on image-caption pairs and frozen towers."""
