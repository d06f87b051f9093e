"""Programs one after the other: `plan.py` reads and checks the stages, `running.py` runs them and notes what has ended."""
