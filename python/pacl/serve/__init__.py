"""`pacl serve`: a local page that shows where images match words, on the standard library's HTTP server."""
