"""Zero-shot segmentation of images by words: dense tokens, class texts, scores and label maps, pictures of them."""
