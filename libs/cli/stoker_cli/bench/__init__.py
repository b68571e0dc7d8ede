"""Measurements: `stoker bench NAME`, one module each."""
