"""Particles: their tables, their images, and how images are prepared for a model."""
