"""Piece formats: ways to turn a piece into bytes, and the bytes into something to call."""
