"""The card shows the phases: a table, a band each behind the curves, and held-out numbers by phase."""

from matplotlib.figure import Figure

from hf_pretrain.hub.plots import draw_phases
from hf_pretrain.hub.text import phase_metrics, phase_table

PHASES = [
    {
        "name": "warm",
        "start": 0,
        "end": 4,
        "text": ["/data/a.txt"],
        "mlm_probability": 0.3,
        "block_size": 24,
        "rate": "0%:0, 5%:1",
    },
    {
        "name": "decay",
        "start": 4,
        "end": 1200,
        "text": ["b.txt"],
        "mlm_probability": 0.05,
        "block_size": 48,
        "rate": "1",
    }
    | {"rope_theta": 160_000},
]


def test_the_table_has_a_row_a_phase_without_folders():
    header, *rows = phase_table(PHASES)
    assert header == ("Phase", "Steps", "Text", "Mask rate", "Block size", "Rate", "RoPE θ")
    assert rows[0] == ("warm", "1 to 4", "a.txt", "0.3", "24", "0%:0, 5%:1", "–")
    assert rows[1] == ("decay", "5 to 1,200", "b.txt", "0.05", "48", "1", "160,000")
    assert phase_table([]) == []


def test_held_out_numbers_stand_by_the_phase_that_they_are_of():
    log = [
        {"step": step, "eval_loss": loss, "eval_mlm_loss": loss, "eval_runtime": 1.0}
        for step, loss in ((0, 4.0), (2, 3.9), (4, 3.0), (1200, 2.0))
    ]
    header, *rows = phase_metrics(log, PHASES)
    assert header == ("Metric", "Begin, as in warm", "End of warm", "End of decay")
    assert ("MLM loss", "4", "3", "2") in rows
    # A branch has no begin of its own.
    assert phase_metrics(log, PHASES[1:])[0] == ("Metric", "End of decay")


def test_each_phase_is_a_band_with_its_name():
    panel = Figure().subplots()
    draw_phases(panel, [("warm", 0, 4), ("a name that is much too long for a band", 4, 10)])
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in panel.patches]
    assert spans == [(0, 4), (4, 10)]
    assert panel.patches[0].get_facecolor() != panel.patches[1].get_facecolor()
    names = [text.get_text() for text in panel.texts]
    assert names[0] == "warm" and names[1].endswith("…") and len(names[1]) <= 22


def test_a_run_shows_them(tmp_path):
    from helpers.phased_runs import PhasedRun, Text
    from hf_pretrain.hub.record import read_record

    text = Text(tmp_path)
    phases = [{"name": "one", "steps": 2, "rate": 1}, {"name": "two", "steps": 2, "rate": 0.5, "block_size": 12}]
    run = PhasedRun(text, tmp_path / "run", phases)
    card, record = (run.folder / "README.md").read_text(), read_record(run.folder)
    assert "### Phases" in card and "| two | 3 to 4 | first.txt |" in card and "End of one" in card
    assert [(phase["name"], phase["start"], phase["end"]) for phase in record.phases] == [("one", 0, 2), ("two", 2, 4)]
    assert not record.metrics_before and record.metrics_after and "warmup_steps" not in record.recipe
    assert record.compute.steps == 4 and record.compute.resumed_at_step is None
    rows = [row for row in run.trainer.state.log_history if "train_runtime" in row]
    assert len(rows) == 1 and record.compute.seconds == rows[0]["train_runtime"] > 0
