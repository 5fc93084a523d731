"""Table 2's systems that are networks of their own (§4.2): DialoGPT and Livebot, each a `base.Baseline`."""
