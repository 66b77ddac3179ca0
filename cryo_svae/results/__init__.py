"""From estimates to classes, averages and files."""
