"""One module for each implementation of the two fused functions; `dispatch.py` says what such a module holds."""
