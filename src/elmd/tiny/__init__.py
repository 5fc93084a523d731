"""The tiny world, and the small stand-ins for public checkpoints that are trained on it."""
