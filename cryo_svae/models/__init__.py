"""The engines: tensors in, tensors out; no files, no prints."""
