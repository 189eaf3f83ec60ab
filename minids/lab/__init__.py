"""What the notebooks use."""
