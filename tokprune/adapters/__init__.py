"""What the runtime asks of a Hugging Face VLM: families, towers, prompts, and how transformers spells things."""
