"""`pacl compare`: runs, embedders and results side by side, as one page."""
