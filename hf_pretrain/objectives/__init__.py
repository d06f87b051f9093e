"""Objectives: for each one its collator, losses, training arguments and Trainer."""
