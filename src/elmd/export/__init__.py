"""`python -m elmd.export …`: a trained model as a folder of its own, to share and to load."""
