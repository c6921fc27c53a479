"""Training of the demo models: `python -m tools.demo.train` (pictures), then `python -m tools.demo.train_clips`."""
