"""What a job computes on: threads of the processor, and several processes."""
