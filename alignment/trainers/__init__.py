"""Trainers: subclasses of TRL's that feed the objectives the right numbers. Knows nothing of YAML or argv."""
