"""Made-up text, a task and tiny checkpoints for examples and documents: what they name lies in one folder."""

import ast
import csv
from pathlib import Path

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    set_seed,
)

from hf_pretrain import train_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.modeling.pooling import SentenceModules

THINGS = ("model", "ship", "cat", "engine", "paper", "garden", "river", "sailor")


def sentences(count, *, stream):
    """Pairs of a sentence and its label, which one word of it gives away."""
    numbers = draws.integers(draws.row_keys(range(count), seed=0, stream=stream), 2, high=2**20).tolist()
    for first, second in numbers:
        good = second % 2 == 0
        yield f"The {THINGS[first % len(THINGS)]} was {'fine' if good else 'poor'} today.", int(good)


def write_text(folder: Path, *, names=("0", "1")):
    """Write corpus.txt and the tables train.csv and dev.csv, whose labels are `names`."""
    text = [sentence for sentence, _ in sentences(600, stream="own text")]
    documents = ["\n".join(text[i : i + 6]) for i in range(0, len(text), 6)]
    (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
    for name, count in (("train", 160), ("dev", 40)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("sentence", "label"))
            rows.writerows((sentence, names[label]) for sentence, label in sentences(count, stream=name))


def write_models(folder: Path, *, layers=2):
    """Write tiny models.

    They are my-bert, a masked language model; teacher, a classifier; modernbert, another masked language model; and
    sentence-encoder, a model of sentence-transformers.
    """
    tokenizer = train_tokenizer([sentence for sentence, _ in sentences(400, stream="own text")], vocab_size=120)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    set_seed(0)
    models = {
        "my-bert": BertForMaskedLM(BertConfig(**sizes)),
        "teacher": BertForSequenceClassification(BertConfig(**sizes)),
        "sentence-encoder": BertModel(BertConfig(**sizes)),
    }
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos", "eos")
    }
    models["modernbert"] = ModernBertForMaskedLM(ModernBertConfig(**sizes, **special))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    SentenceModules(normalizes=True).write(folder / "sentence-encoder", hidden_size=32, longest=128)


def run_with(source, **constants):
    """Run Python with other values for its constants, and return its names."""
    tree = ast.parse(source)
    body, left = [], dict(constants)
    for node in tree.body:
        body.append(node)
        if isinstance(node, ast.Assign):
            names = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            for name in sorted(names & set(left)):
                body += ast.parse(f"{name} = {left.pop(name)!r}").body
    assert not left, f"no such constants: {sorted(left)}"
    tree.body = body
    names = {"__name__": "__main__"}
    exec(compile(ast.fix_missing_locations(tree), "example", "exec", dont_inherit=True), names)
    return names
