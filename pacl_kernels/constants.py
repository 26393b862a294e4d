"""Constants of the formula that all implementations share."""

MIN_NORM = 1e-12  # patches and texts below it have no direction: similarity 0, gradient 0
MIN_POOLED_NORM = 1e-6  # floor of the norm of the pooled patch in the cosine form
LARGEST_SCORE = 2.0**120  # `upsample_argmax` clamps class scores to ± this
RUNNING_MAX_BELOW = 0.05  # from this τ on, exp(s / τ) <= e^20 needs no running maximum, since |s| <= 1
