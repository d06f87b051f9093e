"""Trains with branches on each of several ranks; see `tests/hub/test_branches.py`."""

import json
import os

from helpers.loopback_hub import connected
from helpers.method_matrix import build, programs


def main(folder):
    rank = int(os.environ["RANK"])
    url = (folder / "url").read_text()
    with connected(url):
        for name, options in json.loads((folder / "runs.json").read_text()).items():
            checkpoint = options.pop("from", None)
            trainer = build(programs()["mlm"], folder / "run", per_device_train_batch_size=2, **options)
            trainer.train(resume_from_checkpoint=checkpoint and str(folder / "run" / checkpoint))
            rows = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
            (folder / f"{name}-{rank}.json").write_text(json.dumps(rows))
