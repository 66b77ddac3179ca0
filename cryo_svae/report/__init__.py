"""report.html: one self-contained page on what a job found."""
