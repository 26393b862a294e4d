"""A local page that looks at images by words: `pacl serve`, on the standard library's HTTP server."""
