"""rlbal: RL fine-tuning of language models that decides how much each reward, prompt and token counts."""

__version__ = "0.1.0"
