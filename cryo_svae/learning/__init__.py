"""A model is trained on particles, kept in a file, and asked about particles."""
