"""Chunks from other nodes' storage agents, and for them."""
