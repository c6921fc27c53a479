"""Pictures of what was kept: overlays on images, tiles and frames, signal heat maps, and plots of results."""
