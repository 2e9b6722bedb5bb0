"""Compute spent, and what more of it would buy."""
