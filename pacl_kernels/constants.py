"""Numbers of the formula that every implementation shares."""

MIN_NORM = 1e-12  # a shorter patch or text has no direction: similarity 0, gradient 0
MIN_POOLED_NORM = 1e-6  # floor of the pooled patch's norm in the cosine form
LARGEST_SCORE = 2.0**120  # to which `upsample_argmax` clamps class scores
RUNNING_MAX_BELOW = 0.05  # temperature from which exp(s / τ) <= e^20 needs no running maximum, since |s| <= 1
