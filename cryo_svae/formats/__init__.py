"""File formats: files to tables and arrays, and back. No torch here."""
