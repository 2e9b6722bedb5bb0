"""Pure maths of how rewards become advantages: no transformers, no TRL, no state that logs."""
