"""The pages of the four doors, and that on adapters, run from top to bottom on made-up text; so does the Python of the guides."""

import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from helpers.tiny_text import write_models, write_text
from hf_pretrain.cli import METHODS, main
from hf_pretrain.names import described_recipes

DOCS = Path(__file__).parents[1] / "docs"
DOORS = ("adapt", "from_scratch", "make_it_small", "compare")
# Lines of an 80-column terminal in two screens.
TWO_SCREENS = 100
SHORT = (
    "--max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --save_strategy no --use_cpu true"
)
SIZES = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64"
SIZES += " --max_position_embeddings 64"


def blocks(page):
    """The commands and the Python of a page, in their order."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for python, indented in re.findall(
        r"^```python\n(.*?)^```$|((?:^    [^\n]*\n)+)", text, flags=re.DOTALL | re.MULTILINE
    ):
        if python:
            yield "python", python
        for line in indented.replace("\\\n", " ").splitlines():
            if line.strip().startswith("hf-pretrain "):
                yield "command", line


def shortened(command):
    """The arguments of a command, for a tiny model and two steps."""
    argv = shlex.split(command)[1:]
    method = described_recipes()[argv[0]][0] if argv[0] in described_recipes() else argv[0]
    if method not in (*METHODS, "adapt"):
        return argv
    if "--num_train_epochs" in argv:
        start = argv.index("--num_train_epochs")
        del argv[start : start + 2]
    argv = [*argv, *SHORT.split()]
    if method != "distil-task":
        argv += ["--block_size", "32"]
    if method not in ("distil", "distil-task", "adapt") and not {"--model_name_or_path", "--encoder_name_or_path"} & {
        *argv
    }:
        argv += SIZES.split() + ([] if "--tokenizer_name" in argv else ["--vocab_size", "300"])
    return argv


@pytest.mark.parametrize("page", DOORS)
def test_a_page_is_two_screens(page):
    assert len((DOCS / f"{page}.md").read_text(encoding="utf-8").splitlines()) <= TWO_SCREENS


# PEFT asks for it by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [*DOORS, "adapters"])
def test_the_commands_and_the_python_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    write_text(tmp_path)
    for name in ("books.txt", "train.en", "train.de"):
        shutil.copy(tmp_path / "corpus.txt", tmp_path / name)
    write_models(tmp_path, layers=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = {"__name__": "document"}
    ran = []
    for kind, text in blocks(page):
        text = text.replace("answerdotai/ModernBERT-base", "modernbert")
        text = text.replace("sentence-transformers/all-MiniLM-L6-v2", "sentence-encoder")
        ran.append(kind)
        if kind == "python":
            exec(compile(text, page, "exec", dont_inherit=True), names)
        else:
            assert main(shortened(text)) == 0, f"{text}\n{capsys.readouterr().err[-2000:]}"
    assert ran.count("command") >= 2
    assert "python" in ran or page == "make_it_small"


# The Python of the guides, which names models that a reader has trained.

RUNS = {
    "my-electra": "rtd --model_type electra --vocab_size 300",
    "my-unilm": "encoder --config unilm_small --vocab_size 300",
    "my-gpt-bert": "encoder --objectives mlm clm --vocab_size 300",
    "my-gpt": "clm --vocab_size 300",
    "my-xlnet": "plm --model_type xlnet --vocab_size 300",
    "my-t5": "t5_small --vocab_size 300",
    "my-transformer-xl": "recurrent-lm --tokenizer_type wordpiece --vocab_size 300 --tgt_len 16 --mem_len 16 --hidden_size 32 "
    "--num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --max_steps 2 --save_strategy no --use_cpu true",
}
TEXTS = [
    "The cat was fine today.",
    "The ship was poor today.",
    "The garden was fine today.",
    "The river was poor today.",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the models that the guides name, each trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder)
    write_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        for name, command in RUNS.items():
            given = f"hf-pretrain {command} --train_file corpus.txt --output_dir {name}"
            argv = shlex.split(given)[1:] if "recurrent" in command else shortened(given)
            assert main(argv) == 0, name
    pairs = [
        {"sentence_good": TEXTS[0], "sentence_bad": "The cat were fine today.", "UID": "agreement", "field": "syntax"}
    ]
    (folder / "blimp").mkdir()
    (folder / "blimp" / "agreement.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8"
    )
    return folder


def opened(auto_class, name):
    return {"model": auto_class.from_pretrained(name), "tokenizer": AutoTokenizer.from_pretrained(name)}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_python_of_the_page_on_transfer_runs(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    parts = [text for kind, text in blocks("transfer") if kind == "python"]
    tune, task, several, generative, adapters, search, head, probe, compare, likelihood, few_shot, tasks = parts
    names = opened(AutoModelForSequenceClassification, "teacher")
    rows = [{**names["tokenizer"](text), "labels": i % 2} for i, text in enumerate(TEXTS)]
    names |= {"train": datasets.Dataset.from_list(rows), "dev": datasets.Dataset.from_list(rows)}
    exec(tune, names)
    assert names["trainer"].args.layerwise_learning_rate_decay == 0.8
    lines = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(TEXTS * 5)]
    Path("sst2.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("tasks.yaml").write_text("sst2: {type: classification, text: text, train_file: sst2.jsonl}", encoding="utf-8")
    exec(task.replace("my-encoder", "my-bert"), {})
    assert AutoModelForSequenceClassification.from_pretrained("my-classifier").config.id2label == {0: "0", 1: "1"}
    exec(several, {})
    assert AutoModelForSequenceClassification.from_pretrained("my-multitask/sst2").config.id2label == {0: "0", 1: "1"}
    shutil.rmtree("my-classifier")
    shutil.rmtree("my-multitask")
    names = {"texts": TEXTS * 5, "labels": [0, 1] * 10}
    exec(search.replace("my-encoder", "my-bert").replace("(-1, -2, -3, -4)", "(-1, -2)"), names)
    exec(head.replace("my-encoder", "my-bert"), names)
    names = opened(AutoModel, "my-bert") | {
        "texts": TEXTS * 5,
        "others": TEXTS,
        "labels": [0, 1] * 10,
        "answers": [0, 1] * 2,
    }
    exec(probe, names)
    assert 0 <= names["score"].accuracy <= 1
    names = opened(AutoModelForMaskedLM, "my-bert")
    discriminator = opened(AutoModelForPreTraining, "my-electra")
    names |= {"discriminator": discriminator["model"]}
    exec(compare, names)
    assert len(names["pairs"]) == 1 and names["pairs"][0].good == TEXTS[0]
    decoder = opened(AutoModelForCausalLM, "my-gpt")
    rows = datasets.Dataset.from_dict({"sentence1": TEXTS, "sentence2": TEXTS[::-1], "label": [0, 1, 0, 1]})
    names = {"train": rows, "dev": rows}
    exec(generative.replace("openai-community/openai-gpt", "my-gpt"), names)
    assert {"eval_task_loss", "eval_lm_loss"} <= set(names["trainer"].evaluate())
    exec(adapters, names)
    names = decoder | {"texts": TEXTS}
    exec(likelihood.replace("window=1024, stride=512", "window=8, stride=4"), names)
    assert names["found"].perplexity > 1
    reviews = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
    names = decoder | {"train": reviews, "dev": reviews[:2], "passages": TEXTS}
    exec(few_shot.replace("shots=4", "shots=1"), names)
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews), encoding="utf-8")
    task = {
        "task": "hellaswag",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "reviews.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["good", "poor"],
        "doc_to_target": "label",
        "metric_list": [{"metric": name, "higher_is_better": True} for name in ("acc", "acc_norm")],
    }
    names = decoder | {"tasks": [task]}
    exec(tasks.replace('["lambada_openai", "hellaswag"]', "tasks").replace("my-model", "my-gpt"), names)
    assert "hellaswag" in Path("my-gpt", "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_on_cards_runs(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for _, text in (block for block in blocks("model_cards") if block[0] == "python"):
        exec(text, {})
    card = (trained / "my-electra" / "README.md").read_text(encoding="utf-8")
    assert "SST-2" in card and "0.91" in card and "most frequent class" in card


def test_the_python_of_the_page_on_objectives_runs(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    parts = [text for kind, text in blocks("objectives") if kind == "python"]
    assert len(parts) == 7
    xlnet = opened(AutoModelForCausalLM, "my-xlnet")
    for text in parts:
        names = {"texts": TEXTS} | (xlnet if "log_likelihood" in text else {})
        exec(text, names)
        if "scorer" in names:
            assert [word.word for word in names["words"]][:3] == ["The", "chef", "ate"]
