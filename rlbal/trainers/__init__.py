"""The training loop: TRL trainers extended through a few narrow seams."""
