"""From configuration to runs: the only home of Hydra."""
