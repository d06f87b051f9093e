"""What holds of replaced token detection for every pair: levels, rates, labels, and independence of the company in a batch."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers.method_matrix import NO_DROPOUT, TINY, VOCAB_SIZE, build, relative_difference, tiny_tokenizer
from helpers.replaced_tokens import DEBERTA, PROGRAM, batch_of, favour, originals, run
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.replaced_token_detection import (
    ReplacedTokenDetectionForPreTraining,
    ReplacedTokenDetectionModelArguments,
    build_model,
)

# One of each kind: shared, disentangled and projected tables; every head; the decoder with positions.
PAIRS = {
    "electra": {},
    "electra-gdes": {"embedding_sharing": "gdes", "discriminator_head": "deberta_v3"},
    "bert-narrow": {"model_type": "bert", "generator_size": 0.5},
    # Its own classifier starts with large weights.
    "modernbert": {
        "model_type": "modernbert", "generator_size": 1.0, "config_overrides": None, "discriminator_head": "electra",
    },
    "deberta": DEBERTA,
}  # fmt: skip


@pytest.fixture(params=PAIRS)
def pair(request, tmp_path):
    return build(PROGRAM, tmp_path, model_options=PAIRS[request.param])


def loss_and_gradients(model, batch):
    """Return the losses by example and the gradients of their weighted sum, in evaluation mode: no dropout."""
    model.eval().zero_grad(set_to_none=True)
    output = model(**batch)
    (output.losses["mlm"].sum.sum() + 50 * output.losses["rtd"].sum.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def roughen(model):
    """Move the model away from its initial values, at which almost any error is small."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_levels_of_the_untrained_pair(pair):
    metrics = pair.evaluate()
    assert metrics["eval_mlm_loss"] == pytest.approx(math.log(VOCAB_SIZE), rel=0.01)
    assert metrics["eval_rtd_loss"] == pytest.approx(math.log(2), rel=0.02)


class TestSelection:
    """Of the recipe as it stands, on 4096 rows of 512 tokens."""

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, tmp_path_factory):
        collator = build(PROGRAM, tmp_path_factory.mktemp("run")).data_collator
        ids = np.random.default_rng(0).integers(5, VOCAB_SIZE, (4096, 512))
        ids[:, 0], ids[:, -1] = 2, 3
        return collator([{"input_ids": row, "example_id": i, "epoch": 0} for i, row in enumerate(ids)])

    def test_each_position_is_as_likely_as_any_other(self, batch):
        selected = batch["labels"] != IGNORED
        assert (selected.sum(1) == round(0.15 * 512)).all() and not selected[:, [0, -1]].any()
        blocks = selected[:, 1:-1].unflatten(1, (10, 51)).double().mean(dim=(0, 2))
        assert blocks.max() / blocks.min() < 1.05

    def test_no_target_stands_twice(self, batch):
        assert torch.equal(batch["target_positions"], (batch["labels"].flatten() != IGNORED).nonzero().flatten())

    def test_eighty_five_percent_are_masked_and_the_others_left(self, batch):
        seen, labels = (batch[name].flatten()[batch["target_positions"]] for name in ("input_ids", "labels"))
        is_masked = seen == tiny_tokenizer().mask_token_id
        deviation = math.sqrt(0.85 * 0.15 / len(seen))
        assert float(is_masked.double().mean()) == pytest.approx(0.85, abs=3 * deviation)
        assert torch.equal(seen[~is_masked], labels[~is_masked])


def test_equal_texts_are_masked_and_filled_differently(tmp_path):
    """Masks or samples that are drawn by place in the batch, or anew on each rank from one seed, would be equal."""
    trainer = build(PROGRAM, tmp_path)
    row = {"input_ids": [2, *range(10, 32), 3], "epoch": 0}
    batch = trainer.data_collator([{**row, "example_id": i} for i in range(8)])
    masks = {tuple(row) for row in (batch["labels"] != IGNORED).tolist()}
    assert len(masks) == 8 and len(batch["sample_uniforms"].unique()) == len(batch["sample_uniforms"])
    alone = trainer.data_collator([{**row, "example_id": 5}])
    assert torch.equal(alone["labels"][0], batch["labels"][5])
    row_of = batch["target_positions"] // batch["input_ids"].shape[1]
    assert torch.equal(alone["sample_uniforms"], batch["sample_uniforms"][row_of == 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_generator_gives_half_its_mass_is_written_half_the_time(tmp_path, dtype):
    """In a training step under autocast, where Gumbel noise in bf16 would write it nearly always."""
    overrides = json.dumps({**json.loads(NO_DROPOUT), "vocab_size": 2000})
    model = build(PROGRAM, tmp_path, model_options={"config_overrides": overrides}).model.train()
    model.excluded_tokens.zero_()
    with torch.no_grad():
        for parameter in model.generator.generator_predictions.parameters():
            parameter.zero_()
        model.generator.get_output_embeddings().bias[777] = math.log(1999)
    ids = torch.full((250, 24), 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, 9)}
    batch["target_positions"] = torch.arange(ids.numel())
    batch["sample_uniforms"] = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        replaced = model(**batch).replaced_ids
    assert float((replaced == 777).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_without_right_guesses_everything_selected_is_replaced(tmp_path):
    """Each example repeats one word, and the generator would say the word number 10 always."""
    trainer = build(PROGRAM, tmp_path, model_options={"disallow_correct": True}, mlm_probability=0.5)
    favour(trainer.model, 10)
    batch = batch_of(trainer, 40)
    selected = batch["labels"] != IGNORED
    output, seen = run(trainer.model, batch)
    assert torch.equal(output.score_labels == 1, selected)
    is_ten = originals(trainer, batch) == 10
    assert (is_ten & selected).any() and (seen["input_ids"][selected & ~is_ten] == 10).all()


def test_layers_of_the_generator_do_not_feel_the_discriminator(tmp_path):
    """Not through tied tables either, and with dropout."""
    gradients = []
    for weight in (0.0, 50.0):
        trainer = build(PROGRAM, tmp_path / str(weight), model_options={"config_overrides": None}, rtd_weight=weight)
        trainer.train()
        gradients.append(trainer.recorder.gradients[0])
    own = [name for name in gradients[0] if name.startswith("generator.") and ".electra.embeddings." not in name]
    assert any(gradients[0][name].any() for name in own)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in own)
    table = "generator.electra.embeddings.word_embeddings.weight"
    assert not torch.equal(gradients[0][table], gradients[1][table])


def test_the_output_matrix_sees_the_targets_alone(pair):
    """So the memory of the logits grows with what is selected, not with the text."""
    model, batch, shapes = pair.model, batch_of(pair), []
    decoder = next(m for m in model.generator.modules() if isinstance(m, nn.Linear) and m.out_features == VOCAB_SIZE)
    handle = decoder.register_forward_hook(lambda module, args, logits: shapes.append(logits.shape))
    run(model, batch)
    handle.remove()
    assert [shape.numel() for shape in shapes] == [len(batch["target_positions"]) * VOCAB_SIZE]


def test_the_order_of_a_batch_changes_nothing(pair):
    """Ragged rows by length against the same rows as they came: what is drawn, what is lost, every gradient."""
    roughen(pair.model)
    examples = [pair.train_dataset[i] for i in range(12)]
    order = sorted(range(12), key=lambda i: len(examples[i]["input_ids"]))
    batch, by_length = (pair.data_collator(rows) for rows in (examples, [examples[i] for i in order]))
    output, gradients = loss_and_gradients(pair.model, batch)
    ordered, other_gradients = loss_and_gradients(pair.model, by_length)
    assert torch.equal(ordered.replaced_ids, output.replaced_ids[order])
    for name, loss in output.losses.items():
        torch.testing.assert_close(ordered.losses[name].sum, loss.sum[order], rtol=1e-5, atol=1e-5)
    assert relative_difference(gradients, other_gradients) < 1e-5


class TestIsolatedDocuments:
    LENGTHS = ((9, 6, 4), (5, 14))

    def documents(self):
        """Return rows of documents, each with masked ids, labels and the uniforms of its targets."""
        generator, rows = torch.Generator().manual_seed(1), []
        for lengths in self.LENGTHS:
            rows.append([])
            for length in lengths:
                ids = torch.randint(5, VOCAB_SIZE, (length,), generator=generator)
                is_target = torch.arange(length) % 3 == 1
                uniforms = torch.rand(int(is_target.sum()), generator=generator)
                rows[-1].append((ids.masked_fill(is_target, 4), ids.masked_fill(~is_target, IGNORED), uniforms))
        return rows

    def batch(self, rows):
        """Return rows as the collator writes them; with one document each, without a word about documents."""
        width = max(sum(len(ids) for ids, _, _ in row) for row in rows)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "document_ids": -1, "position_ids": 0}
        batch = {name: torch.full((len(rows), width), fill) for name, fill in fills.items()}
        for place, row in enumerate(rows):
            lengths = torch.tensor([len(ids) for ids, _, _ in row])
            values = {
                "input_ids": torch.cat([ids for ids, _, _ in row]),
                "attention_mask": torch.ones(int(lengths.sum()), dtype=torch.long),
                "labels": torch.cat([labels for _, labels, _ in row]),
                "document_ids": torch.arange(len(row)).repeat_interleave(lengths),
                "position_ids": torch.cat([torch.arange(int(length)) for length in lengths]),
            }
            for name, value in values.items():
                batch[name][place, : len(value)] = value
        batch["target_positions"] = (batch["labels"].flatten() != IGNORED).nonzero().flatten()
        batch["sample_uniforms"] = torch.cat([uniforms for row in rows for _, _, uniforms in row])
        if all(len(row) == 1 for row in rows):
            del batch["document_ids"], batch["position_ids"]
        return batch

    def test_packed_equals_separate(self, pair):
        roughen(pair.model)
        packed, gradients = loss_and_gradients(pair.model, self.batch(self.documents()))
        expected = {}
        for number, row in enumerate(self.documents()):
            start, sums = 0, {"mlm": 0.0, "rtd": 0.0}
            for document in row:
                alone, own = loss_and_gradients(pair.model, self.batch([[document]]))
                stop = start + len(document[0])
                assert torch.equal(packed.replaced_ids[number, start:stop], alone.replaced_ids[0])
                torch.testing.assert_close(packed.scores[number, start:stop], alone.scores[0], rtol=1e-5, atol=1e-5)
                sums = {name: sums[name] + loss.sum.item() for name, loss in alone.losses.items()}
                expected = {name: value + expected.get(name, 0) for name, value in own.items()}
                start = stop
            for name, total in sums.items():
                assert packed.losses[name].sum[number].item() == pytest.approx(total, rel=1e-5)
        assert relative_difference(expected, gradients) < 1e-5

    def test_editing_a_document_moves_no_bit_of_the_others(self, pair):
        roughen(pair.model)
        rows, edited = self.documents(), self.documents()
        edited[0][1][0][3] = 5 + (edited[0][1][0][3] - 4) % (VOCAB_SIZE - 5)
        before, after = (run(pair.model, self.batch(documents))[0] for documents in (rows, edited))
        inside = torch.zeros_like(before.replaced_ids, dtype=torch.bool)
        inside[0, 9:15] = True
        for name in ("replaced_ids", "scores"):
            moved = getattr(before, name) != getattr(after, name)
            assert not moved[~inside].any() and moved[inside].any(), name


class TestResizedTables:
    def model_of(self, **options):
        torch.manual_seed(1)
        return build_model(ReplacedTokenDetectionModelArguments(**{**TINY, **options}), tiny_tokenizer())

    @pytest.mark.parametrize("sharing", ["tied", "gdes"])
    def test_models_that_were_resized_are_tied_as_any(self, sharing):
        model = self.model_of(embedding_sharing="none")
        for part in (model.generator, model.discriminator):
            part.resize_token_embeddings(64)
        options = {"embedding_sharing": sharing}
        again = ReplacedTokenDetectionForPreTraining.from_models(model.generator, model.discriminator, **options)
        table = again.generator.get_input_embeddings().weight
        ours = again.discriminator.get_input_embeddings()
        assert again.generator.get_output_embeddings().weight is table and len(table) == 64
        assert (ours.weight if sharing == "tied" else ours.base_weight) is table

    def test_a_pair_is_not_resized_halfway(self):
        """Swapping the table of one model in place would leave the other, and the output layer, on the old one."""
        model = self.model_of()
        with pytest.raises(InputError, match="before they are joined"):
            model.resize_token_embeddings(64)
        tables = [part.get_input_embeddings().weight for part in (model.generator, model.discriminator)]
        assert tables[0] is tables[1] is model.generator.get_output_embeddings().weight and len(tables[0]) == 60
