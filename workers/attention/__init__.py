"""Attention backends behind one interface, and the opaque op through which models call them."""
