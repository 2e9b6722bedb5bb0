"""Which prompts, how many rollouts each, how long: this floor starts with the data (`rlbal.prompts.data`)."""
