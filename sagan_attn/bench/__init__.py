"""How long attention on maps takes and how much memory: ours, and what would be used instead, side by side."""
