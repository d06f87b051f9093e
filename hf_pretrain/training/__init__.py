"""The Trainer of every method, and the program around it.

`trainer` is the contract. It holds objects of `checkpointing` (write a checkpoint, find the one to go on from),
`data/streaming/reader.py` (read a stream), `steps/` (compute a micro-batch, evaluate), `progress` (tokens, memory, the table on
the screen) and `hub/pushing.py` (upload to the Hub). `processes` is what the processes of a run have in common, and what ends a
run. `program` is a run from the command line to the report: `parsing` and `arguments` check the options, `output_folder` takes
the folder, `rehearsal` tries everything on made-up text; then the Trainer trains, exports and writes the card. `phases/` makes
one run of several Trainers. `method` is the record of a method, which the program runs.
"""
