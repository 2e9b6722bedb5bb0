"""Rewards: finding the functions (`loading`), running them (`suite`), and workers that can be killed (`sandbox`)."""
