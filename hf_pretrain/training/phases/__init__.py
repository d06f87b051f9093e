"""A run as a list of phases: other text, masks, objectives and block lengths in turn, with pieces of one learning rate.

`course` is what a Trainer knows of its phase: where it lies in the run, and the rate at each step. `plan` makes it from the
list in a recipe, and refuses what a phase cannot change. `branch` finds the checkpoint that a branch starts from. `running`
trains one phase after the other: each has a Trainer of its own, which goes on from the checkpoint at the border.
"""
