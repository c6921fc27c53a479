"""Dropping inside the LLM: in models, against masking by hand."""
