"""The smallest recipe, and ways to change it: for tests of what recipes may say."""

from rlbal.recipe import Recipe, apply_override, parse_recipe, parse_yaml

SMALL = """\
output_dir: runs/small
model:
  tiny: {}
data:
  source: reasoning_gym
  task: chain_sum
rewards:
  functions:
    correct:
      function: reward_fns.accuracy:exact_match
"""


def small(*overrides: str) -> Recipe:
    """The small recipe with `key.sub=value` overrides."""
    values = parse_yaml(SMALL)
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values)
