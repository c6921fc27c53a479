"""How much faster, where the time goes, what it costs: FLOPs, latency, memory, presets of known models, planning."""
