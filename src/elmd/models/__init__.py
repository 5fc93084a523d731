"""The networks: language model, visual projector, adapters, vision encoder; and ELMD, which is made of them."""

#: What a trained model's folder holds of it: a file and a folder, each only where it was trained.
PROJECTOR, ADAPTER = "projector.safetensors", "adapter"
