"""From a scheduled batch to sampled tokens: persistent buffers, KV cache, the model runner."""
