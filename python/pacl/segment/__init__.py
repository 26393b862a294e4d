"""Zero-shot segmentation of images by words: dense tokens, class texts, scores, label maps and pictures."""
