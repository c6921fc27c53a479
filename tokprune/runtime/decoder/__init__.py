"""The decoder stage: tokens dropped in front of layers of the LLM."""
