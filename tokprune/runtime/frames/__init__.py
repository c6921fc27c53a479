"""Frames stage at run time: scores of a video's frames for the question, by a scorer or by the VLM itself."""
