"""GPU backends: one order of launches, with Triton's launches or Hopper's."""
