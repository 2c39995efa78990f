"""Continuous batching and the block pool: bookkeeping without tensors."""
