"""The shared arithmetic: a plain reference of each operation and, where it pays, a fused kernel."""
