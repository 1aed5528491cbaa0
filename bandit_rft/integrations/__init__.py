"""bandit_rft's operations inside other people's trainers: `trl` for TRL's GRPOTrainer, `verl` for verl's actor.

What they compute stays what it was, to float rounding; where it could not, they refuse. Each module imports its trainer
when it is used, not when it is imported.
"""
