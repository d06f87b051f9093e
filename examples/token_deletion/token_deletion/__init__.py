"""Token deletion detection, a method of pre-training in a package of its own; docs/adding_an_objective.md walks through it."""
