"""GPU backends: one order of launches, filled with Triton's or Hopper's launches."""
