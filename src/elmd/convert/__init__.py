"""Public checkpoints in formats that transformers cannot read -> folders that it can."""
