"""`python -m elmd.doctor …`: what a configuration needs and what of it is missing, before hours are spent."""
