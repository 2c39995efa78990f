"""Model files on disk: reading GGUF, writing Hugging Face checkpoint folders, and finding one by name.

Pure file to file: nothing here imports torch, starts a model or draws on a terminal.
"""
