"""The shared arithmetic: what two methods or more compute alike."""
