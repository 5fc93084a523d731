"""Original checkpoints into folders that transformers loads without remote code."""
