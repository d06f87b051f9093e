"""Teachers that are sentence-transformers folders; the library itself is the oracle of what a folder computes."""

import json
import os

import datasets
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertModel

from helpers.distilled import bert, collator, examples
from helpers.method_matrix import NO_DROPOUT, build, collate, relative_difference, tiny_data, tiny_tokenizer
from hf_pretrain.cli import main
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.hub.card import snippets
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import (
    DistillationTrainer,
    DistillationTrainingArguments,
    StudentArguments,
    join,
)
from hf_pretrain.objectives.distillation.arguments import OF_SENTENCES
from hf_pretrain.objectives.distillation.sentence_embeddings import nearest_agreement
from hf_pretrain.training.output_folder import check_replaceable

POOLED = {
    "mean": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    "cls": {"pooling_mode_cls_token": True},
    "max": {"pooling_mode": "max"},
    "mean_sqrt_len_tokens": {"pooling_mode_mean_sqrt_len_tokens": True},
    "weightedmean": {"pooling_mode_weightedmean_tokens": True},
    "lasttoken": {"pooling_mode": "lasttoken"},
    "cls+mean": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
    "max+cls": {"pooling_mode": ["max", "cls"]},
}
NO_LOSS = {f"{name}_weight": 0.0 for name in OF_SENTENCES}
# The tiny teacher has six layers of width 48.
EQUAL, NARROW = {"student_layers": "every_other"}, {"num_hidden_layers": 2, "hidden_size": 32}


def save_teacher(folder, pooling="mean", *, normalizes=True, max_length=24, others=(), **sizes):
    """A folder as older versions of sentence-transformers wrote it."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 6, "max_position_embeddings": 64} | sizes
    bert(BertModel, seed=5, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *others, *["Normalize"] * normalizes]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds[1:], start=1))]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    contents = {
        "modules.json": listed,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": sizes["hidden_size"], **POOLED[pooling]},
        "config_sentence_transformers.json": {"prompts": {"query": "w1 w2"}, "similarity_fn_name": "dot"},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def built(tmp_path, teacher, student=EQUAL, **options):
    options = {"distillation_method": "embedding", "embedding_weight": 0.0, "cosine_weight": 0.0} | options
    # The tiny options of the shared tests compare layers too.
    options |= dict.fromkeys(("hidden_weight", "attention_weight", "relation_vv_weight"), 0.0)
    unset = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    unset |= dict.fromkeys(("max_position_embeddings", "model_type", "model_name_or_path"))
    if "student_layers" not in student:
        unset |= {"num_attention_heads": 4, "intermediate_size": 64}
    model_options = unset | {"teacher_name_or_path": teacher, "config_overrides": NO_DROPOUT} | student
    return build(distil, tmp_path / "run", model_options=model_options, **options)


def texts_of(rows):
    """The texts of examples without their special tokens."""
    return [tiny_tokenizer().decode(row["input_ids"][1:-1]) for row in rows]


def encoded(folder, texts, **options):
    return torch.tensor(
        SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False, **options)
    )


class TestLosses:
    @pytest.mark.parametrize(
        ("pooling", "normalizes", "student"),
        [
            ("mean", True, EQUAL),
            ("mean", True, NARROW),
            ("cls", False, EQUAL),
            ("weightedmean", False, NARROW),
            ("cls+mean", True, NARROW),
            ("max+cls", False, EQUAL),
        ],
    )
    def test_they_compare_what_both_folders_compute(self, tmp_path, pooling, normalizes, student):
        """The losses are those of the vectors of the two folders, in the words of their definitions."""
        teacher = save_teacher(tmp_path / "teacher", pooling, normalizes=normalizes)
        trainer = built(tmp_path, teacher, student, **dict.fromkeys(NO_LOSS, 1.0))
        trainer.save_model()
        rows = [tiny_data().train_dataset[i] for i in range(7)]
        theirs, ours = (encoded(folder, texts_of(rows)) for folder in (teacher, trainer.args.output_dir))
        with torch.no_grad():
            losses = trainer.model.eval()(**collate(trainer, rows)).losses
        means = {name: float(loss.sum.sum() / loss.count.sum()) for name, loss in losses.items()}
        cosines = [torch.nn.functional.cosine_similarity(v[:, None], v[None], dim=-1) for v in (ours, theirs)]
        expected = {
            "sentence_cosine": float((1 - torch.nn.functional.cosine_similarity(ours, theirs)).mean()),
            "sentence_mse": float((ours - theirs).square().mean()),
            "sentence_similarity": float((cosines[0] - cosines[1]).square().sum() / 42),
        }
        assert means == pytest.approx(expected, rel=2e-4)
        assert means["sentence_cosine"] > 1e-3

    def test_vectors_of_any_width_have_similarities_without_a_projection(self, tmp_path):
        options = NO_LOSS | {"sentence_similarity_weight": 1.0}
        trainer = built(tmp_path, save_teacher(tmp_path / "teacher"), NARROW, **options)
        assert not trainer.model.projections
        trainer.save_model()
        assert encoded(trainer.args.output_dir, ["w1 w2"]).shape == (1, 32)

    def test_there_is_nothing_to_learn_of_a_copy(self, tmp_path):
        whole = {"student_layers": "first", "num_hidden_layers": 6}
        trainer = built(tmp_path, save_teacher(tmp_path / "teacher"), whole, **dict.fromkeys(NO_LOSS, 1.0))
        with torch.no_grad():
            output = trainer.model.eval()(**collate(trainer, examples()))
        for name, loss in output.losses.items():
            assert float(loss.sum.abs().max()) < 1e-6, name
        assert output.metrics["sentence_agreement"].sum.tolist() == [1.0] * 6

    def test_texts_and_pairs_of_texts_are_counted(self, tmp_path):
        trainer = built(tmp_path, save_teacher(tmp_path / "teacher"), **dict.fromkeys(NO_LOSS, 1.0))
        batch = collate(trainer, examples(5))
        counts = {name: int(count) for name, count in trainer.model.count_targets(batch).items()}
        assert counts == {"sentence_cosine": 5, "sentence_mse": 5, "sentence_similarity": 20}
        losses = trainer.model(**batch).losses
        assert counts == {name: int(loss.count.sum()) for name, loss in losses.items()}

    def test_the_gradient_is_of_texts_not_of_batches(self, tmp_path):
        """One step of six texts, and one of three times two, of other lengths each."""
        teacher = save_teacher(tmp_path / "teacher")
        found = []
        for size in (6, 2):
            options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
            trainer = built(tmp_path, teacher, NARROW, sentence_mse_weight=3.0, **options)
            trainer.train()
            found.append(trainer.recorder.gradients[0])
        assert found[0].keys() == found[1].keys() and "projections.sentence.weight" in found[0]
        assert relative_difference(found[1], found[0]) < 1e-5

    def test_the_nearest_text(self):
        teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        student = teacher.clone()
        student[0] = torch.tensor([-1.0, 1.0])
        agreement = nearest_agreement(student, teacher)
        assert agreement.sum.tolist() == [0, 0, 1, 1] and agreement.count.tolist() == [1] * 4
        assert nearest_agreement(student[:2], teacher[:2]).count.sum() == 0

    def test_a_student_comes_nearer_to_its_teacher(self, tmp_path):
        options = {"max_steps": 80, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
        trainer = built(tmp_path, save_teacher(tmp_path / "teacher"), NARROW, **options)
        before = trainer.evaluate()["eval_sentence_cosine_loss"]
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_sentence_cosine_loss"] < 0.3 * before
        assert after["eval_sentence_agreement"] > 0.5


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(" ".join(f"w{(i * j) % 37}" for j in range(1, 3 + i % 9)) for i in range(120)))
    return [
        "--train_file",
        str(path),
        "--document_separator",
        "line",
        "--block_size",
        "20",
        "--validation_fraction",
        "0.1",
    ]


def run(teacher, output, *options):
    speed = ["--max_steps", "3", "--report_to", "none", "--bf16", "false", "--logging_steps", "1"]
    return main(["distil", "--teacher_name_or_path", teacher, "--output_dir", str(output), *speed, *map(str, options)])


class TestPrograms:
    def test_a_student_is_a_model_of_sentence_transformers(self, tmp_path, corpus, monkeypatch, capsys):
        teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
        assert run(teacher, out, *corpus, "--distillation_method", "embedding", "--student_layers", "every_other") == 0
        shown = capsys.readouterr().out
        assert "SentenceTransformer(" in shown and "Same nearest text as the teacher" in shown
        student = SentenceTransformer(str(out), device="cpu")
        assert [type(module).__name__ for module in student] == ["Transformer", "Pooling", "Normalize"]
        assert student.max_seq_length == 24 and student.similarity_fn_name == "dot"
        assert student.prompts["query"] == "w1 w2"
        # Its vectors are the means of the stock encoder's states.
        ids = tiny_tokenizer()("w3 w7 w9", return_tensors="pt")["input_ids"]
        mean = AutoModel.from_pretrained(out).eval()(input_ids=ids).last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(mean).detach()
        torch.testing.assert_close(encoded(out, ["w3 w7 w9"]), expected, atol=1e-5, rtol=1e-4)
        # No example has two texts: none is longer than the longest line.
        assert yaml.safe_load((out / "recipe.yaml").read_text())["sentence_cosine_weight"] == 1.0
        card = (out / "README.md").read_text()
        header = (
            "- sentence-transformers",
            "library_name: sentence-transformers",
            "pipeline_tag: sentence-similarity",
        )
        for text in (*header, "zhang2024jasper"):
            assert text in card, text
        assert "Encoder only" not in card
        code = next(code for code in snippets(card) if "SentenceTransformer" in code)
        monkeypatch.chdir(out)
        found = {}
        exec(code, found)
        assert found["similarities"].shape == (2, 2)

    def test_every_example_is_one_text(self, tmp_path, corpus):
        teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
        assert run(teacher, out, *corpus, "--distillation_method", "embedding", "--student_layers", "first") == 0
        data = json.loads((out / "pretraining" / "run.json").read_text())["card"]["data"]
        assert data["blocks"] + data.get("held_out_blocks", 0) >= 110, data

    @pytest.mark.parametrize(
        "options", [["--student_layers", "last"], ["--num_hidden_layers", "2", "--hidden_size", "24"]]
    )
    def test_other_losses_keep_the_files_too(self, tmp_path, corpus, options):
        teacher, out = save_teacher(tmp_path / "teacher", "cls"), tmp_path / "out"
        assert run(teacher, out, *corpus, "--distillation_method", "minilmv2", *options) == 0
        student = SentenceTransformer(str(out), device="cpu")
        assert [type(module).__name__ for module in student] == ["Transformer", "Pooling", "Normalize"]
        assert student[1].pooling_mode == "cls" and student.max_seq_length == 24
        assert student.get_embedding_dimension() == AutoModel.from_pretrained(out).config.hidden_size
        check_replaceable(out)

    def test_a_checkpoint_is_exported_with_its_files(self, tmp_path, corpus):
        teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
        sizes = ["--num_hidden_layers", "2", "--hidden_size", "32", "--num_attention_heads", "4", "--save_steps", "3"]
        assert run(teacher, out, *corpus, "--distillation_method", "embedding", *sizes) == 0
        assert main(["export", str(out / "checkpoint-3"), "--output_dir", str(tmp_path / "export")]) in (0, None)
        texts = ["w3 w7 w9", "w1"]
        torch.testing.assert_close(encoded(tmp_path / "export", texts), encoded(out, texts))
        assert encoded(out, texts).shape == (2, 48)

    def test_a_student_reads_no_more_than_its_positions(self, tmp_path):
        trainer = built(
            tmp_path, save_teacher(tmp_path / "teacher", max_length=60), NARROW | {"max_position_embeddings": 32}
        )
        trainer.save_model()
        assert SentenceTransformer(trainer.args.output_dir, device="cpu").max_seq_length == 32


class TestInPython:
    def test_a_dataset_of_texts_and_the_name_of_a_teacher(self, tmp_path):
        teacher = save_teacher(tmp_path / "teacher")
        texts = [f"w{i} w{i % 7} w{i % 5}" for i in range(30)]
        args = DistillationTrainingArguments(
            output_dir=str(tmp_path / "out"),
            distillation_method="embedding",
            max_steps=2,
            bf16=False,
            report_to="none",
        )
        trainer = DistillationTrainer(
            StudentArguments(student_layers="last"),
            args,
            teacher=teacher,
            data_args=DataArguments(block_size=24),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
        )
        # One example a text, not one of several.
        assert len(trainer.train_dataset) == 30
        trainer.train()
        trainer.save_model()
        assert encoded(tmp_path / "out", texts[:2]).shape == (2, 48)


class TestBaseModel:
    def test_a_teacher_of_the_hub_is_the_base(self, tmp_path):
        trainer = built(tmp_path, save_teacher(tmp_path / "teacher"))
        assert "base_model" not in trainer.card_facts()
        trainer.model.teacher_name = "sentence-transformers/all-MiniLM-L6-v2"
        assert trainer.card_facts()["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"


class TestRefusals:
    def test_a_teacher_without_a_pooling(self, tmp_path):
        teacher = save_teacher(tmp_path / "teacher")
        os.remove(tmp_path / "teacher" / "modules.json")
        with pytest.raises(InputError, match=r"no modules\.json, so the sentence_cosine loss .*save_pretrained"):
            built(tmp_path, teacher)

    def test_a_module_that_is_not_known(self, tmp_path, caplog):
        teacher = save_teacher(tmp_path / "teacher", others=["Dense"])
        with pytest.raises(InputError, match="has Dense: give a model of a Transformer"):
            built(tmp_path, teacher)
        # Other losses do not need it; the student has no files that would compute something else.
        relations = NO_LOSS | {"distillation_method": "minilmv2"}
        trainer = built(tmp_path, teacher, **relations, relation_kk_weight=1.0)
        trainer.save_model()
        assert not os.path.exists(os.path.join(trainer.args.output_dir, "modules.json"))

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("modules.json", "{", "modules.json .* is no JSON"),
            ("modules.json", "[{}]", "lists no modules"),
            (
                "1_Pooling/config.json",
                '{"pooling_mode": "median"}',
                "pooling_mode='median' is unknown: choose of cls, ",
            ),
            ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case"),
        ],
    )
    def test_files_that_cannot_be_followed(self, tmp_path, file, content, message):
        teacher = save_teacher(tmp_path / "teacher")
        (tmp_path / "teacher" / file).write_text(content)
        with pytest.raises(InputError, match=message):
            built(tmp_path, teacher)

    def test_a_teacher_that_reads_less(self, tmp_path):
        with pytest.raises(InputError, match="block_size=24 is more than the teacher reads: set block_size=9 or less"):
            built(tmp_path, save_teacher(tmp_path / "teacher", max_length=9))

    @pytest.mark.parametrize("mode", ["tokens", "isolated_documents"])
    def test_rows_of_several_texts(self, tmp_path, corpus, mode, capsys):
        options = [*corpus, "--distillation_method", "embedding", "--student_layers", "first", "--block_mode", mode]
        assert run(save_teacher(tmp_path / "teacher"), tmp_path / "out", *options) == 2
        assert "several texts into a row" in capsys.readouterr().err

    def test_models_without_their_modules(self):
        args = DistillationTrainingArguments(output_dir="unused", bf16=False, distillation_method="embedding")
        with pytest.raises(
            InputError, match=r"sentence_cosine loss needs sentence_modules: give SentenceModules\.read"
        ):
            join(bert(BertModel, seed=1), bert(BertModel), args)
        batch = collator()(examples())
        found = join(bert(BertModel, seed=1), bert(BertModel), args, sentence_modules=SentenceModules())(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        assert float(found.losses["sentence_cosine"].sum.detach().min()) > 0


def test_the_recipe_of_minilm_fits_a_teacher_of_any_depth(tmp_path, corpus):
    """It names no layer: the last is the twelfth of BERT-Base, and the sixth of a teacher of six."""
    teacher = save_teacher(tmp_path / "teacher", num_hidden_layers=3, num_attention_heads=4)
    sizes = ["--num_hidden_layers", 2, "--hidden_size", 48, "--num_attention_heads", 4, "--intermediate_size", 32]
    speed = ["--eval_strategy", "no", "--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 4]
    assert run(teacher, tmp_path / "out", *corpus, "--config", "minilmv2", *sizes, *speed) == 0
