"""Where the hooks live: each stage of a pruned forward, from the encoder to the KV cache."""
