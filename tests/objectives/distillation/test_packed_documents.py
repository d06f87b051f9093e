"""Documents that share a row without seeing each other: as in rows of their own, in every loss."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, DebertaV2Config, ModernBertConfig, RobertaConfig

from helpers.distilled import ALL, SIZES, bert, pair
from helpers.method_matrix import tiny_examples, tiny_teacher, tiny_tokenizer
from hf_pretrain.cli import main
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.objectives.distillation import DataCollatorForDistillation

# Of document lengths, two rows; the second ends in padding.
ROWS = ((5, 9, 4), (7, 3))


def documents():
    dataset = EpochDataset(tiny_examples(200, seed=0))
    by_length = {len(dataset[i]["input_ids"]): dataset[i] for i in range(len(dataset))}
    return [[by_length[length] for length in row] for row in ROWS]


def apart(rows):
    """A batch with a row a document."""
    return DataCollatorForDistillation(tiny_tokenizer())([one for row in rows for one in row])


def together(rows):
    """The batch with a row a document, and the same tokens, masked in the same way, in rows of several documents."""
    alone, width, number = apart(rows), max(sum(map(len_of, row)) for row in rows), 0
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100, "document_ids": -1, "position_ids": 0}
    batch = {name: torch.full((len(rows), width), fill) for name, fill in fills.items()}
    for r, row in enumerate(rows):
        places = [(d, column) for d, one in enumerate(row) for column in range(len_of(one))]
        numbers, columns = torch.tensor(places).T
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name][r, : len(places)] = alone[name][number + numbers, columns]
        batch["document_ids"][r, : len(places)] = numbers
        batch["position_ids"][r, : len(places)] = columns
        number += len(row)
    return alone, batch | {"target_positions": (batch["labels"] != -100).flatten().nonzero().squeeze(1)}


def len_of(example):
    return len(example["input_ids"])


def model(config, **sizes):
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config(**{**SIZES, "initializer_range": 0.2, **sizes}))


PAIRS = {
    "bert": lambda: (bert(seed=1), bert(num_hidden_layers=4, hidden_size=48)),
    # Positions begin behind the padding token.
    "roberta": lambda: (bert(seed=1), model(RobertaConfig, num_hidden_layers=4, max_position_embeddings=40)),
    # Some layers see a window alone.
    "modernbert": lambda: tuple(
        model(ModernBertConfig, num_hidden_layers=n, local_attention=4, global_attn_every_n_layers=2, pad_token_id=0)
        for n in (2, 4)
    ),
    "deberta": lambda: tuple(
        model(
            DebertaV2Config,
            num_hidden_layers=n,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            hidden_dropout_prob=0.0,
        )
        for n in (2, 4)
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_losses_counts_and_gradients_are_those_of_rows_of_their_own(name):
    student, teacher = PAIRS[name]()
    options = {"student": student, "teacher": teacher, "layer_map": "1,3"}
    joined, (alone, packed) = pair(*ALL, **options), together(documents())
    losses = joined(**packed).losses
    for loss, expected in joined(**alone).losses.items():
        torch.testing.assert_close(losses[loss].sum.sum(), expected.sum.sum(), rtol=1e-5, atol=1e-5, msg=loss)
        torch.testing.assert_close(losses[loss].count.sum(), expected.count.sum(), msg=loss)
        assert losses[loss].sum.shape == (len(ROWS),)
        gradients = []
        for batch in (alone, packed):
            joined.zero_grad()
            joined(**batch).losses[loss].sum.sum().backward()
            gradients.append({n: p.grad.clone() for n, p in joined.named_parameters() if p.grad is not None})
        scale = max(g.abs().max() for g in gradients[0].values())
        for parameter, gradient in gradients[0].items():
            assert (gradient - gradients[1][parameter]).abs().max() <= 1e-5 * scale, (loss, parameter)


@pytest.mark.parametrize("name", PAIRS)
def test_counts_from_the_batch_are_those_of_the_losses(name):
    student, teacher = PAIRS[name]()
    joined = pair(*ALL, student=student, teacher=teacher, layer_map="1,3")
    for batch in together(documents()):
        counted, losses = joined.count_targets(batch), joined(**batch).losses
        for loss, count in counted.items():
            assert float(count) == pytest.approx(float(losses[loss].count.sum()), rel=1e-6), loss


def test_the_program(tmp_path):
    """From text to a card, and from a cache of the teacher too."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(f"w{(i * j) % 37}" for j in range(1, 4 + i % 9)) for i in range(80)))
    command = [
        "distil",
        "--teacher_name_or_path",
        tiny_teacher(AutoModelForMaskedLM).name,
        "--student_layers",
        "first",
    ]
    command += ["--train_file", str(corpus), "--block_size", "24", "--block_mode", "isolated_documents"]
    command += ["--max_steps", "2", "--report_to", "none", "--bf16", "false", "--distillation_method", "distilbert"]
    caching = ["--cache_top_k", "8", "--static_masks", "2", "--cosine_weight", "0"]
    for name, options in (("live", ["--attention_weight", "0.1"]), ("cached", caching)):
        assert main([*command, *options, "--output_dir", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "model.safetensors").is_file()
