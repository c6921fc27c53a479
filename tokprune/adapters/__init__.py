"""The only place that knows models: how visual tokens enter a Hugging Face VLM, and how to take some of them out."""
