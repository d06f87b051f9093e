"""How many held-out examples an evaluation measures where no option says it: by the tokens that the whole run trains on."""

from types import SimpleNamespace

from helpers.method_matrix import tiny_examples
from hf_pretrain.data.examples import held_out
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.training.steps.evaluation import Evaluation


def measured(*, max_steps, total=None, has_text=True):
    args = SimpleNamespace(max_eval_tokens=None, max_minutes=None, max_steps=max_steps, num_train_epochs=1)
    args = SimpleNamespace(**vars(args), world_size=2, train_batch_size=2, gradient_accumulation_steps=1)
    trainer = SimpleNamespace(
        args=args,
        course=None if total is None else SimpleNamespace(total=total),
        train_dataset=EpochDataset(tiny_examples(50, seed=1)) if has_text else None,
        eval_dataset=EpochDataset(tiny_examples(200, seed=2)),
        reads_instead_of_text="",
    )
    count, known = Evaluation(trainer).measured_examples()
    assert known == 200
    return count


def test_every_phase_measures_what_the_whole_run_would(monkeypatch):
    """Else the numbers of two phases would be of other text."""
    monkeypatch.setattr(held_out, "LEAST_TOKENS", 10)
    whole = measured(max_steps=400)
    assert measured(max_steps=100) < whole < 200
    assert [measured(max_steps=steps, total=400) for steps in (100, 400)] == [whole] * 2


def test_all_is_measured_where_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(held_out, "LEAST_TOKENS", 10)
    assert measured(max_steps=100, has_text=False) == 200
