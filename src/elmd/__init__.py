"""ELMD: emotion-guided, LLM-based multimodal dialogue (Liu et al., ICMR '24), as a training framework."""

__version__ = "0.1.0"
