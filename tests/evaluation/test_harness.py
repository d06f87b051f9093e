"""lm-evaluation-harness over every kind of model, against its own adapter of stock models."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig

from helpers.scored_texts import decoder, encoder_decoder, framed, masked_lm, unframed, wordpiece
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation import harness
from hf_pretrain.evaluation.harness import evaluate_lm, harness_model
from hf_pretrain.evaluation.likelihood import BidirectionalLM, FewShotTask, LikelihoodScorer


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    harness._lm_class.cache_clear()
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'hf-pretrain\[harness\]'"):
        evaluate_lm(decoder(), unframed(eos_token="x39"), "lambada_openai")


PAIRS = [
    ("the cat", " sat unhappiness"),
    ("the cats ", "sat."),
    ("", "the dog sat"),
    ("the dog\n", "x5"),
    ("the cat", " dog"),
    ("the cat", " sat"),
    (" ".join(f"x{i}" for i in range(30)), " sat ."),
]
LONG = "the cat sat . the dogs sat unhappiness x1 x2 x3 x4 x5 x6 x7 x8 the cats . x9 x10 x11 x12 the dog"


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


def beginning():
    """A tokenizer that begins texts, as Llama's does."""
    tokenizer = unframed(bos_token="x38", eos_token="x39", pad_token="x37")
    token = ("x38", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="x38 $A", special_tokens=[token])
    return tokenizer


def causal(kind):
    model = decoder(kind)
    tokenizer = beginning() if kind == "llama" else unframed(eos_token="x39", pad_token="x37")
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def asked(*args):
    return [SimpleNamespace(args=arg if isinstance(arg, tuple) else (arg,)) for arg in args]


def hflm(model, tokenizer, **options):
    from lm_eval.models.huggingface import HFLM

    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    # With its cache, of inputs that two requests share, it reads a shorter continuation at the first column of a longer one.
    return HFLM(
        logits_cache=False,
        pretrained=model,
        tokenizer=tokenizer,
        backend=backend,
        max_length=options.pop("max_length", 20),
        **options,
    )


class TestAgainstTheHarness:
    @pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_log_likelihoods_of_causal_models(self, lm_eval, kind, batch_size):
        model, tokenizer = causal(kind)
        expected = hflm(model, tokenizer, batch_size=batch_size).loglikelihood(asked(*PAIRS), disable_tqdm=True)
        found = harness_model(model, tokenizer, batch_size=batch_size).loglikelihood(asked(*PAIRS))
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]

    def test_log_likelihoods_of_an_encoder_decoder(self, lm_eval):
        model, tokenizer = encoder_decoder("t5"), framed("t5")
        tokenizer.eos_token = "[SEP]"
        pairs = [pair for pair in PAIRS if pair[0]]
        expected = hflm(model, tokenizer, batch_size=2, max_length=64).loglikelihood(asked(*pairs), disable_tqdm=True)
        found = harness_model(model, tokenizer).loglikelihood(asked(*pairs))
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]

    @pytest.mark.parametrize("window", [8, 20])
    def test_long_texts(self, lm_eval, window):
        model, tokenizer = causal("gpt2")
        texts = [LONG, "the cat", ""]
        expected = hflm(model, tokenizer, batch_size=2, max_length=window).loglikelihood_rolling(
            asked(*texts), disable_tqdm=True
        )
        found = harness_model(model, tokenizer, window=window).loglikelihood_rolling(asked(*texts))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_what_is_written(self, lm_eval, kind):
        model, tokenizer = causal(kind)
        until = ["sat"]
        requests = [
            *(((text), {"until": until, "max_gen_toks": 8}) for text in ("the cat", "x1 x2 x3", "x4", LONG)),
            ("the dog", {"until": ".", "max_gen_toks": 4, "do_sample": False}),
        ]
        expected = hflm(model, tokenizer, batch_size=1).generate_until(asked(*requests), disable_tqdm=True)
        for batch_size in (1, 8):
            lm = harness_model(model, tokenizer, batch_size=batch_size)
            assert lm.generate_until(asked(*requests)) == expected
        assert len(set(expected)) > 2 and until[0] == "sat"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(number):
    return [{"text": f"x{i % 30} the", "right": i % 2, "last": f"x{(i + 3) % 30}"} for i in range(number)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of each type over files."""
    folder = tmp_path_factory.mktemp("tasks")
    files = {
        "train": write_rows(folder / "train.jsonl", questions(7)[1::2]),
        "test": write_rows(folder / "test.jsonl", questions(6)),
    }
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "training_split": "train",
        "doc_to_text": "{{text}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["cat sat", "dog"], "doc_to_target": "right"}

    def metrics(*names):
        return {"metric_list": [{"metric": name, "higher_is_better": True} for name in names]}

    last = {"doc_to_target": "{{' ' + last}}"}
    generating = {"until": ["."], "max_gen_toks": 3}
    return [
        {"task": "choice", **common, **choice, **metrics("acc", "acc_norm")},
        {"task": "choice_2", **common, **choice, **metrics("acc"), "num_fewshot": 1},
        {"task": "last_word", **common, **last, "output_type": "loglikelihood", **metrics("perplexity", "acc")},
        {
            "task": "text",
            **common,
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "output_type": "loglikelihood_rolling",
            **metrics("word_perplexity", "bits_per_byte"),
        },
        {
            "task": "written",
            **common,
            **last,
            "output_type": "generate_until",
            **metrics("exact_match"),
            "generation_kwargs": generating,
        },
    ]


class TestTasks:
    def test_results_are_those_of_the_harness(self, lm_eval, tasks):
        model, tokenizer = causal("gpt2")
        expected = lm_eval.simple_evaluate(
            hflm(model, tokenizer, batch_size=1),
            tasks=[dict(task) for task in tasks],
            bootstrap_iters=0,
            log_samples=False,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        )["results"]
        before = torch.random.get_rng_state()
        found = evaluate_lm(model, tokenizer, tasks)
        assert torch.equal(before, torch.random.get_rng_state())
        wanted = {
            "choice": {"acc", "acc_norm"},
            "choice_2": {"acc"},
            "last_word": {"perplexity", "acc"},
            "text": {"word_perplexity", "bits_per_byte"},
            "written": {"exact_match"},
        }
        for task, names in wanted.items():
            assert set(found.metrics[task]) == names
            for name in names:
                assert found.metrics[task][name] == pytest.approx(expected[task][f"{name},none"], rel=1e-5)
        records = {record.task: record for record in found.evaluations}
        assert set(records) == set(wanted)
        assert records["choice"].metrics == {
            "accuracy": found.metrics["choice"]["acc"],
            "acc_norm": found.metrics["choice"]["acc_norm"],
        }
        assert (records["choice"].task_type, records["text"].task_type) == ("multiple-choice", "text-generation")
        assert (records["choice"].dataset, records["choice"].split, records["choice"].num_examples) == (
            "choice",
            "test",
            6,
        )
        assert "1-shot, causal scores" in records["choice_2"].method and "0-shot" in records["choice"].method

    @pytest.mark.parametrize("kind", ["masked", "t5", "bidirectional"])
    def test_every_kind_answers_what_is_no_writing(self, lm_eval, tasks, kind):
        tokenizer = framed("t5") if kind == "t5" else wordpiece()
        size = len(tokenizer)
        table = torch.linspace(-1, 1, size * size).reshape(size, size).sin() * 3
        half = BidirectionalLM(lambda ids, mask: table[ids], lambda ids, mask: table.T[ids])
        model = {"masked": masked_lm, "t5": lambda: encoder_decoder("t5"), "bidirectional": lambda: half}[kind]()
        found = evaluate_lm(model, tokenizer, tasks[:1] + tasks[2:4], shots=0, limit=4, batch_size=3, window=None)
        right = []
        for row in questions(4):
            scores = LikelihoodScorer(model, tokenizer).score([(row["text"], " cat sat"), (row["text"], " dog")])
            right.append(int(scores.log_likelihoods.argmax()) == row["right"])
        assert found.metrics["choice"]["acc"] == np.mean(right)
        assert found.metrics["text"]["word_perplexity"] > 1
        assert all(record.num_examples == 4 for record in found.evaluations)
        assert all(kind in record.method for record in found.evaluations if kind != "t5")

    def test_a_task_of_writing_is_refused_by_the_name_of_the_model(self, lm_eval, tasks):
        with pytest.raises(InputError, match="model=BertForMaskedLM is masked and generates no text"):
            evaluate_lm(masked_lm(), wordpiece(), tasks[4])

    def test_what_cannot_be_evaluated_is_refused(self, lm_eval, tasks, monkeypatch):
        model, tokenizer = causal("gpt2")
        empty = lm_eval.tasks.TaskManager(include_defaults=False)
        monkeypatch.setattr(harness, "_task_manager", lambda has_tasks: empty)
        with pytest.raises(InputError, match="shots=2 but the task 'choice' takes no examples"):
            evaluate_lm(model, tokenizer, tasks[0] | {"num_fewshot": 0}, shots=2)
        with pytest.raises(InputError, match="no_such_task"):
            evaluate_lm(model, tokenizer, "no_such_task")
        with pytest.raises(InputError, match="tasks is empty"):
            evaluate_lm(model, tokenizer, [])
        with pytest.raises(InputError, match="limit=0"):
            evaluate_lm(model, tokenizer, "lambada_openai", limit=0)

    def test_prompts_are_those_of_the_harness_byte_by_byte(self, lm_eval, tasks, tmp_path, monkeypatch):
        """With one example to draw there is one prompt."""
        train = questions(8)[7:]
        files = {
            "train": write_rows(tmp_path / "one.jsonl", train),
            "test": tasks[0]["dataset_kwargs"]["data_files"]["test"],
        }
        config = tasks[0] | {"dataset_kwargs": {"data_files": files}, "description": "the cats: "}
        asked_for = []
        monkeypatch.setattr(
            LikelihoodScorer,
            "score",
            lambda self, pairs, score=LikelihoodScorer.score: asked_for.extend(pairs) or score(self, pairs),
        )
        evaluate_lm(*causal("gpt2"), config, shots=1)
        task = FewShotTask(
            template="{text}",
            options=["cat sat", "dog"],
            label="right",
            train=train,
            shots=1,
            description="the cats: ",
        )
        own = [
            (task.prompt(row, number), task.delimiter + option)
            for number, row in enumerate(questions(6))
            for option in task.choices(row)
        ]
        assert sorted(asked_for) == sorted(own)
