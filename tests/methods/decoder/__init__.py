"""Tests of methods that drop inside the LLM."""
