"""Cards: golden files, metadata that the Hub's own library reads back, nothing empty, snippets that run."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from reference_inputs import MLM, REFERENCE_CARDS, REFERENCE_DIR, RTD, render_reference
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_pretrain.hub.card import recipe_options, render_card, snippets, write_card
from hf_pretrain.hub.environment import Compute, Energy
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.record import PretrainingCard
from hf_pretrain.hub.text import cell, duration, metric_table, number, portable_options

MINIMAL = PretrainingCard(model_name="bare", model_class="BertForMaskedLM", objective=MLM)
UNKNOWN = PretrainingCard(
    model_name="unknown",
    model_class="BertForMaskedLM",
    objective=MLM,
    data={"sources": [], "documents": None, "tokenizer": ""},
    recipe={"max_steps": None},
    log_history=[{"step": 1, "epoch": 0.1}, {"train_loss": 2.0, "train_runtime": 3.0, "step": 1}],
    metrics_before={"eval_runtime": 1.0},
    metrics_after={"eval_runtime": 1.0, "epoch": 1.0},
    compute=Compute(seconds=10.0, tokens=None),
    versions={"torch": ""},
)
EVERY_CARD = [pytest.param(card, id=card.model_name) for card in (*REFERENCE_CARDS.values(), MINIMAL, UNKNOWN)]


def _sections(text: str) -> dict[str, str]:
    """Return heading -> what stands before the next heading, code blocks kept as text."""
    prose = re.sub(r"^```.*?^```$", lambda block: block[0].replace("#", "%"), text, flags=re.DOTALL | re.MULTILINE)
    pieces = re.split(r"^(#{1,6} .*)$", prose, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.mark.parametrize("name", REFERENCE_CARDS)
def test_the_reference_card_is_what_the_template_makes(name: str) -> None:
    golden = (REFERENCE_DIR / f"{name}.md").read_bytes()
    assert render_reference(name).encode() == golden, "after a wanted change run: python tests/hub/reference_inputs.py"


@pytest.mark.parametrize("name", REFERENCE_CARDS)
def test_the_reference_card_shows_pictures_that_exist_and_says_that_its_values_are_examples(name: str) -> None:
    text = render_reference(name)
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) >= 2
    assert all((REFERENCE_DIR / picture).is_file() for picture in pictures)
    assert "every number here is an example value, not a measurement" in text.split("##")[0]


@pytest.mark.parametrize("card", EVERY_CARD)
def test_nothing_is_empty(card: PretrainingCard) -> None:
    text = render_card(card)
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", text)
    assert "[](" not in text and "]()" not in text and "{{ " not in text
    assert "\n\n\n" not in text and not re.search(r"[ \t]$", text, flags=re.MULTILINE)
    assert [heading for heading, body in _sections(text).items() if not body.strip()] == []
    assert text.count("```") % 2 == 0


def compute_rows(compute: Compute) -> list[tuple[str, ...]]:
    """Return the rows of the table of what a run took, as the card has them."""
    lines = _sections(render_card(dataclasses.replace(MINIMAL, compute=compute)))["## Compute"].strip().splitlines()
    return [tuple(line.strip("| ").split(" | ")) for line in lines[2:]]


def test_a_section_without_facts_is_left_out() -> None:
    always = ["How to load", "Training procedure", "Citation"]
    assert [heading.strip("# ") for heading in _sections(render_card(MINIMAL))] == ["bare", *always]
    found = [heading.strip("# ") for heading in _sections(render_card(UNKNOWN))]
    assert found == ["unknown", *always[:2], "Compute", always[2]], "only the time was measured"


def test_the_hubs_library_reads_the_metadata_back(tmp_path: Path) -> None:
    data = ModelCard.load(write_card(REFERENCE_CARDS["rtd"], tmp_path)).data
    assert data.library_name == "transformers"
    assert data.tags == ["hf_pretrain", "rtd", "generated_from_trainer", "example"]
    assert (data.pipeline_tag, data.language, data.license) == ("feature-extraction", ["de"], "apache-2.0")
    assert data.base_model is None
    assert ModelCard(render_card(REFERENCE_CARDS["mlm"])).data.base_model == "google-bert/bert-base-uncased"


def test_the_model_index_holds_the_metrics_after_training_and_survives_a_round_trip() -> None:
    card = ModelCard(render_card(REFERENCE_CARDS["rtd"]))
    results = card.data.eval_results
    assert card.data.model_name == "reference-rtd"
    held_out = {result.metric_type: result.metric_value for result in results if result.dataset_type == "text"}
    assert held_out == {"mlm_loss": 6.3, "rtd_loss": 0.33, "disc_auc": 0.74, "disc_gain": 0.14}
    assert ModelCard(card.content).data.eval_results == results
    assert "model-index" not in ModelCard(render_card(MINIMAL)).data.to_dict()


def test_numpy_and_torch_values_become_plain_ones() -> None:
    card = dataclasses.replace(
        MINIMAL,
        metrics_after={"eval_mlm_loss": np.float32(1.5), "eval_mlm_accuracy": torch.tensor(0.25)},
        recipe={"learning_rate": np.float64(1e-6), "layers": (1, 2), "folder": Path("a/b")},
    )
    text = render_card(card)
    assert {result.metric_value for result in ModelCard(text).data.eval_results} == {1.5, 4.482, 0.25}
    recipe = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert recipe and yaml.safe_load(recipe[1]) == {"learning_rate": 1e-6, "layers": [1, 2], "folder": "a/b"}


def test_a_diverged_run_says_so_but_gives_the_hub_no_number() -> None:
    text = render_card(dataclasses.replace(MINIMAL, metrics_after={"eval_mlm_loss": float("nan"), "eval_auc": 0.5}))
    assert "| MLM loss | not finite |" in text
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["auc"]


def test_bookkeeping_is_no_metric() -> None:
    timing = ["runtime", "samples_per_second", "steps_per_second", "preparation_time", "num_tokens", "peak_memory_mib"]
    row = {
        "epoch": 1.0,
        **{f"eval_{name}": 1.0 for name in timing},
        "eval_masked_accuracy": 0.5,
        "eval_perplexity": 9.0,
    }
    assert [name for name, _ in metric_table({}, row)] == ["Metric", "Masked accuracy", "Perplexity"]


def test_what_was_measured_of_the_compute_is_told_and_speed_follows_from_it() -> None:
    compute = Compute(tokens=1000, seconds=4.0, peak_memory_mib=1536.0, parameters=7, trained_parameters=7)
    assert compute_rows(compute) == [
        ("Parameters", "7"),
        ("Tokens seen", "1,000"),
        ("Training time", "4 s"),
        ("Tokens per second", "250"),
        ("Peak memory", "1.5 GiB"),
    ]


def test_a_total_that_is_its_only_component_is_told_once() -> None:
    alone = {"eval_loss": 2.0, "eval_mlm_loss": 2.0}
    weighted = {"eval_loss": 52.0, "eval_mlm_loss": 2.0}
    assert [row[0] for row in metric_table({}, alone)] == ["Metric", "MLM loss", "MLM perplexity"]
    assert [row[0] for row in metric_table({}, weighted)] == ["Metric", "Total loss", "MLM loss", "MLM perplexity"]


def test_a_side_that_was_not_measured_has_no_column_and_a_missing_value_is_named() -> None:
    assert metric_table({}, {}) == []
    assert metric_table({}, {"eval_auc": 0.5}) == [("Metric", "After training"), ("AUC", "0.5")]
    assert metric_table({"eval_auc": 0.5, "eval_f1": 0.1}, {"eval_f1": 0.2}) == [
        ("Metric", "Before training", "After training"),
        ("F1", "0.1", "0.2"),
        ("AUC", "0.5", "not measured"),
    ]


def test_no_local_path_reaches_the_card() -> None:
    facts = {"base_model": "/home/someone/bert", "datasets": ["/data/x", "org/set"]}
    facts |= {"data": {"files": ["/home/someone/a.txt"]}, "recipe": {"train_file": "en=/home/someone/a.txt"}}
    text = render_card(dataclasses.replace(MINIMAL, **facts))
    assert "| Files | a.txt |" in text and "train_file: en=a.txt" in text
    assert "someone" not in text and "Pre-trained further from a local checkpoint" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets == ["org/set"]


ODD_NAMES = [
    *("a|b.txt", "<b>x</b>.txt", "<script>alert(1)</script>", "![x](http://t/p.png)", "[x](javascript:alert(1))"),
    *("*bold* ~~no~~ `code` $x$", "a_b __init__ _x_.py", "&lt;b&gt; &copy;", "# title", "1. x", "- y", "<!-- c"),
    *("back\\slash\\|", "two\nlines", 'it\'s "{x}" {{ y }} {% z %}', "```", "ünï 语.txt"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_users_name_is_shown_letter_by_letter(name: str) -> None:
    """Rendered with HTML allowed, as the Hub does: text, and no mark-up that the card has not."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = " ".join(name.split())
    row = {"eval_mlm_loss": 2.0, "eval_runtime": 1.0}
    sets = {f"eval_{name}_{key.removeprefix('eval_')}": value for key, value in row.items()}
    probe = Evaluation(
        task=name, dataset=name, split=name, metrics={name: 0.5}, method=name, baseline={name: 0.1}, baseline_name=name
    )
    facts = {
        "model_name": name,
        "data": {"sources": [name, name], name: name},
        "metrics_after": sets,
        "evaluations": [probe],
        "evaluation_name": name,
        "fresh_parameters": name,
        "recipe": {"train_file": [name, f"{name} " * 40]},
    }
    card = ModelCard(render_card(dataclasses.replace(MINIMAL, **facts)))
    odd = markdown.render(card.text)
    plain = markdown.render(ModelCard(render_card(dataclasses.replace(MINIMAL, **_renamed(facts, name)))).text)
    assert re.findall(r"<[^>]*>", odd) == re.findall(r"<[^>]*>", plain)
    text = html.unescape(re.sub(r"<[^>]*>", "", odd))
    assert text.count(shown) >= 10 and card.data.model_name == name


def _renamed(value: Any, name: str) -> Any:
    """Return facts in which a harmless name stands for an odd one."""
    if isinstance(value, dict):
        return {_renamed(key, name): _renamed(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, name) for item in value]
    if isinstance(value, Evaluation):
        return Evaluation(
            **{field.name: _renamed(getattr(value, field.name), name) for field in dataclasses.fields(value)}
        )
    return value.replace(name, "harmless") if isinstance(value, str) and value != "text-classification" else value


def test_the_hub_gets_a_few_rounded_numbers() -> None:
    quality = {f"eval_disc_{name}": 0.123456789 for name in ("accuracy", "precision", "recall", "auc", "gain")}
    losses = {"eval_loss": 56.123456789, "eval_mlm_loss": 6.123456789, "eval_rtd_loss": 1.0}
    silent = dataclasses.replace(RTD, headline=())
    card = dataclasses.replace(MINIMAL, objective=silent, metrics_after={**losses, **quality, "eval_fake_rate": 0.1})
    results = {each.metric_type: each.metric_value for each in ModelCard(render_card(card)).data.eval_results}
    assert results == {"mlm_loss": 6.123, "rtd_loss": 1.0, "mlm_perplexity": 456.4, "disc_auc": 0.1235}
    said = dataclasses.replace(
        card, objective=dataclasses.replace(RTD, headline=("disc_recall", "absent", "mlm_loss"))
    )
    results = [(each.metric_type, each.metric_value) for each in ModelCard(render_card(said)).data.eval_results]
    assert results == [("disc_recall", 0.1235), ("mlm_loss", 6.123)], "those of the method, in its order"
    assert "| Total loss | 56.12 |" in render_card(card), "the table of the card has all of them"
    alone = dataclasses.replace(MINIMAL, metrics_after={"eval_loss": 2.0})
    assert [each.metric_type for each in ModelCard(render_card(alone)).data.eval_results] == ["loss"]


def test_an_adapter_is_not_called_a_model() -> None:
    text = render_card(dataclasses.replace(MINIMAL, adapter="LORA", base_model="org/base", fine_tuning_class=""))
    assert "is an adapter (LORA) for a `BertForMaskedLM`, and **not a whole model**" in text
    assert "stock" not in text and "no other library" not in text
    assert 'BertForMaskedLM.from_pretrained("org/base")\nmodel.load_adapter(".")' in text
    assert ModelCard(text).data.library_name == "peft"


def test_what_began_anew_is_told() -> None:
    text = render_card(dataclasses.replace(MINIMAL, base_model="org/base", fresh_parameters="the head cls"))
    assert "with `hf_pretrain`; the head cls began anew." in text


@pytest.mark.usefixtures("own_pictures")
def test_weights_that_are_not_the_last_ones_are_called_so(tmp_path: Path) -> None:
    compute = Compute(steps=1500, planned_steps=3000)
    card = dataclasses.replace(
        REFERENCE_CARDS["mlm"], compute=compute, weights_step=1000, chosen_by="eval_mlm_accuracy"
    )
    text = render_card(card)
    assert "these are those of step 1,000 of 1,500, the best by MLM accuracy." in text
    assert "Not the end of the run" not in text
    picture = write_card(card, tmp_path / "a").with_name("plots") / "loss.png"
    last = write_card(REFERENCE_CARDS["mlm"], tmp_path / "b").with_name("plots") / "loss.png"
    assert picture.read_bytes() != last.read_bytes(), "the step is marked in the curves"


def test_text_of_the_user_does_not_break_a_table() -> None:
    text = render_card(dataclasses.replace(MINIMAL, data={"sources": ["a|b.txt", "two\nlines.txt"]}))
    assert "| Sources | a\\|b.txt, two lines.txt |" in text


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("train_file", ["/home/anna/client/x.txt", "client/*.txt", "client/"], ["x.txt", "*.txt", "client"]),
        ("train_file", ["en=/home/anna/en.txt", "en-de=client/x.en,client/x.de"], ["en=en.txt", "en-de=x.en,x.de"]),
        ("validation_file", ["C:\\Users\\anna\\x.txt", "~/x.txt", "file:///home/anna/x.txt"], ["x.txt"] * 3),
        ("model_name_or_path", "org/name", "org/name"),
        ("model_name_or_path", "../client/model", "model"),
        ("tokenizer_name", "client/deep/tokenizer", "tokenizer"),
        ("config_overrides", '{"vocab_file": "/home/anna/v.txt"}', '{"vocab_file": "v.txt"}'),
        ("description", "either/or, https://a.b/c/d", "either/or, https://a.b/c/d"),
        ("learning_rate", 1e-4, 1e-4),
    ],
)
def test_options_for_others_name_no_folder(name: str, value: Any, shown: Any) -> None:
    assert portable_options({name: value}) == {name: shown}


def test_a_recipe_is_what_differs_and_what_is_essential(tmp_path: Path) -> None:
    defaults = TrainingArguments(output_dir=str(tmp_path / "defaults"), use_cpu=True).to_dict()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, adam_epsilon=1e-6, learning_rate=5e-5, hub_model_id="secret/me"
    )
    options = {**arguments.to_dict(), "train_file": [str(tmp_path / "corpus.txt")]}
    recipe = recipe_options(options, defaults={**defaults, "train_file": None})
    assert recipe["adam_epsilon"] == 1e-6 and recipe["train_file"] == ["corpus.txt"]
    assert recipe["learning_rate"] == 5e-5 and recipe["seed"] == 42, "essential, though the defaults"
    assert not {"output_dir", "hub_model_id", "adam_beta1", "use_cpu"} & set(recipe)
    text = render_card(dataclasses.replace(MINIMAL, recipe=recipe))
    assert "secret" not in text and str(tmp_path) not in text


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "chef", "ate", "meal", "."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 12}
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, **WIDTHS}


def _run_snippets(card: PretrainingCard, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.chdir(folder)
    namespaces = []
    for code in snippets(write_card(card, folder).read_text(encoding="utf-8")):
        namespaces.append({})
        exec(compile(code, "snippet", "exec"), namespaces[-1])
    return namespaces


def test_the_snippets_of_the_rtd_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = ElectraConfig(embedding_size=8, **SIZES)
    generator = ElectraForMaskedLM(config)
    ElectraForPreTraining(config).save_pretrained(tmp_path)
    generator.save_pretrained(tmp_path / "pretraining" / "generator")
    _tokenizer().save_pretrained(tmp_path)
    encoder, head, parts, tuning = _run_snippets(REFERENCE_CARDS["rtd"], tmp_path, monkeypatch)
    assert encoder["hidden_states"].shape[-1] == 16
    assert head["replaced"].shape == (1, 12) and ((head["replaced"] > 0) & (head["replaced"] < 1)).all()
    assert isinstance(tuning["model"], ElectraForSequenceClassification) and tuning["loss"].isfinite()
    assert isinstance(parts["generator"], ElectraForMaskedLM)
    for name, value in generator.state_dict().items():
        torch.testing.assert_close(parts["generator"].state_dict()[name], value, rtol=0, atol=0)


def test_the_snippets_of_the_mlm_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    encoder, head, _ = _run_snippets(REFERENCE_CARDS["mlm"], tmp_path, monkeypatch)
    assert encoder["hidden_states"].shape == (1, 8, 16)
    assert len(head["predictions"]) == 5


def test_the_snippets_name_the_repository_and_the_class() -> None:
    objective = dataclasses.replace(RTD, usage="")
    parts = {"pretraining/heads": ("", "weights"), "pretraining/my-part": ("other.package.Model", "a part")}
    card = dataclasses.replace(MINIMAL, objective=objective, repo="me/bert", parts=parts)
    encoder, head, part = snippets(render_card(card))
    assert encoder.count('"me/bert"') == 2
    assert head.splitlines() == [
        "from transformers import BertForMaskedLM",
        "",
        'model = BertForMaskedLM.from_pretrained("me/bert")',
    ]
    assert part.splitlines() == [
        "from other.package import Model",
        "",
        'my_part = Model.from_pretrained("me/bert", subfolder="pretraining/my-part")',
    ]


def test_values_are_written_for_a_reader() -> None:
    assert [number(value) for value in (1234567, 0.123456, 1e-7, 44.98)] == ["1,234,567", "0.1235", "1e-07", "44.98"]
    assert [duration(value) for value in (0.5, 12.34, 59.99, 61, 3599.9, 7500, 100_000)] == [
        "0.5 s",
        "12.3 s",
        "60 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
        "1 d 3 h",
    ]
    assert cell(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_the_code_names_the_class_of_the_discriminator_at_hand():
    card = PretrainingCard(model_name="bare", model_class="BertForTokenClassification", objective=RTD)
    used = snippets(render_card(card))[1]
    assert "BertForTokenClassification.from_pretrained" in used
    assert "Electra" not in used and "{" not in used


@pytest.mark.parametrize(
    ("model_class", "own_code", "options"),
    [
        ("BertForMaskedLM", False, "num_labels=2)"),
        ("BertForTokenClassification", False, "num_labels=2, ignore_mismatched_sizes=True)"),
        ("TransformerXLForCausalLM", True, "num_labels=2, trust_remote_code=True)"),
    ],
)
def test_fine_tuning_opens_the_model_with_a_fresh_head(model_class: str, own_code: bool, options: str) -> None:
    auto_class = "AutoModelForSequenceClassification"
    card = dataclasses.replace(MINIMAL, repo="me/x", model_class=model_class, has_own_code=own_code)
    *_, code = snippets(render_card(dataclasses.replace(card, fine_tuning_class=auto_class)))
    assert f'{auto_class}.from_pretrained("me/x", {options}' in code
    assert auto_class not in render_card(card)


NEWS_AND_LAW = {"eval_news_mlm_loss": 2.0, "eval_news_runtime": 1.0, "eval_law_mlm_loss": 3.0, "eval_law_runtime": 1.0}


def test_several_held_out_sets_have_their_names_in_the_table_and_results_of_their_own() -> None:
    before = {key: value + 1 for key, value in NEWS_AND_LAW.items()}
    card = dataclasses.replace(MINIMAL, metrics_before=before, metrics_after=NEWS_AND_LAW)
    assert metric_table(before, NEWS_AND_LAW) == [
        ("Held-out set", "Metric", "Before training", "After training"),
        ("news", "MLM loss", "3", "2"),
        ("news", "MLM perplexity", "20.09", "7.389"),
        ("law", "MLM loss", "4", "3"),
        ("law", "MLM perplexity", "54.6", "20.09"),
    ]
    results = ModelCard(render_card(card)).data.eval_results
    assert [(result.dataset_config, result.metric_type, result.metric_value) for result in results] == [
        ("news", "mlm_loss", 2.0),
        ("news", "mlm_perplexity", 7.389),
        ("law", "mlm_loss", 3.0),
        ("law", "mlm_perplexity", 20.09),
    ]
    assert len({result.unique_identifier for result in results}) == 2


def test_a_run_that_goes_on_and_a_measurement_before_its_end_are_called_so() -> None:
    compute = Compute(steps=1500, planned_steps=3000)
    card = dataclasses.replace(MINIMAL, compute=compute, metrics_after={"eval_mlm_loss": 2.0, "step": 1000})
    text = render_card(card)
    assert "this is the model after 1,500 of 3,000 steps" in text and "| Optimizer steps | 1,500 of 3,000 |" in text
    assert "| Metric | At step 1,000 |" in text and "After training" not in text
    done = render_card(dataclasses.replace(card, compute=Compute(steps=1000, planned_steps=1000)))
    assert "Not the end" not in done and "| Metric | After training |" in done


def test_the_time_of_a_resumed_run_is_that_of_its_last_part_and_so_is_the_speed() -> None:
    rows = dict(compute_rows(Compute(tokens=9000, seconds=4.0, resumed_at_step=50, timed_tokens=1000)))
    assert rows["Training time, since the resume at step 50"] == "4 s"
    assert (rows["Tokens seen"], rows["Tokens per second"]) == ("9,000", "250")


def test_several_processes_are_counted_and_memory_is_that_of_one() -> None:
    rows = dict(compute_rows(Compute(processes=2, peak_memory_mib=512.0)))
    assert rows == {"Processes": "2", "Peak memory of a process": "0.5 GiB"}


def test_energy_is_told_where_it_was_measured() -> None:
    energy = Energy(kwh=0.5, emissions_kg=0.2, country="Iceland", scope="machine", sessions=2)
    compute = Compute(hardware="Example CPU", energy=energy)
    assert compute_rows(compute)[1:] == [
        ("Energy", "0.5 kWh of the whole machine, measured by CodeCarbon"),
        ("Emissions", "200 g CO2 equivalent, with the electricity of Iceland"),
    ]
    assert "in 2 sessions" in dict(compute_rows(dataclasses.replace(compute, resumed_at_step=5)))["Energy"]
    data = ModelCard(render_card(dataclasses.replace(MINIMAL, compute=compute))).data
    assert data.co2_eq_emissions == {
        "emissions": 200.0,
        "source": "CodeCarbon",
        "training_type": "pre-training",
        "geographical_location": "Iceland",
        "hardware_used": "Example CPU",
    }
    assert "co2" not in render_card(MINIMAL) and "Energy" not in render_card(MINIMAL)
