"""Reading checkpoints: GGUF conversion, model resolution."""
