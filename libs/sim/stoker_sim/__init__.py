"""Stoker in virtual time: its logic as it is, the world around it drawn from a seed."""
