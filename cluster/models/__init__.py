"""Acquiring models: download, verify, convert, keep in the cache. File formats are workers.checkpoint's."""
