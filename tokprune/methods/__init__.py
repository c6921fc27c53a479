"""The methods, a folder per stage, a file per method. They see tensors, never a model."""
