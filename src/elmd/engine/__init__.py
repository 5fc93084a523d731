"""What any chain of stages needs, and nothing of ELMD: files, artifacts, stages, the chain."""
