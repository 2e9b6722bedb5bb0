"""Reward functions with TRL's signature. They work in plain TRL as they are; none of them imports torch.

`completions` and every dataset column are lists with one entry per row; the result is one float (or None) per row.
"""
