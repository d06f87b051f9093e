"""Records what every method and every recipe computes in a few tiny steps, to prove that a refactoring changes nothing.

    python tests/step_record.py before.json [NAME ...]
    python tests/step_record.py --compare before.json after.json [NAME ...]
    python tests/step_record.py --list

A record holds for each run the rows of its log, with every loss and the final evaluation; a hash of the gradients before each
optimizer step; and a hash of every exported file of tensors, configuration or tokenizer. The script enters through the command
line alone, so that modules may move between two records. Both are to be made on one machine: another adds in another order.
"""

import argparse
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "trainers" / "recipes"
# To be set before torch is imported: one thread adds in one order.
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1") | {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Keys of a log row or an export that depend on the machine, the clock or the versions.
VOLATILE = ("per_second", "runtime", "peak_memory", "flos", "preparation_time", "_version", "_name_or_path")
TEXT, TEACHER = {"train_file": "corpus.txt"}, {"teacher_name_or_path": "teacher"}
LANGUAGES = {"language_file": ["en=corpus.txt", "de=other.txt"], "parallel_file": ["en-de=pairs.tsv"]}
COMMON = {
    "validation_fraction": 0.1,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 1,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": "false",
    "save_strategy": "no",
    "report_to": "none",
    "bf16": "false",
    "use_cpu": "true",
    "seed": 7,
}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FRESH = COMMON | SIZES | TEXT | {"vocab_size": 300}
BLOCKS = {"block_size": 32}
OWN = {
    "mlm": FRESH | BLOCKS | {"max_position_embeddings": 64},
    "plm": FRESH | BLOCKS,
    "clm": FRESH | BLOCKS | {"max_position_embeddings": 64, "intermediate_size": 192},
    "recurrent-lm": FRESH | {"tgt_len": 8, "mem_len": 8, "eval_tgt_len": 4, "eval_mem_len": 16, "eval_clamp_len": 12},
    "elmo": FRESH
    | {"num_attention_heads": None, "intermediate_size": None, "cell_size": 40, "unroll_length": 8, "eval_lanes": 4},
    "distil": COMMON | BLOCKS | TEXT | TEACHER,
    "distil-task": {name: value for name, value in COMMON.items() if name != "validation_fraction"}
    | {
        "max_length": 24,
        "train_file": "train.tsv",
        "validation_file": "dev.tsv",
        "teacher_name_or_path": "classifier",
    },
}
OWN |= dict.fromkeys(("encoder", "rtd", "electric", "denoise", "contrastive"), OWN["mlm"])
STUDENT = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 32}
# Of xlm the feed-forward layers are always four times as wide.
XLM = LANGUAGES | {"train_file": None, "intermediate_size": 192}
XLNET = {"mem_len": 24, "eval_lanes": 2}
TASKS = {
    "token-classification": {
        "train_file": "tags.jsonl",
        "validation_file": "tags.jsonl",
        "teacher_name_or_path": "tagger",
    },
    "question-answering": {
        "train_file": "questions.jsonl",
        "validation_file": "questions.jsonl",
        "teacher_name_or_path": "reader",
        "doc_stride": 4,
    },
}
# Name of a run: method, recipes, options besides those of its method. None leaves an option out.
RUNS = {
    # Recipes
    "albert": ("encoder", ["albert_small"], {"embedding_size": 16}),
    "albert_base": ("encoder", ["albert_base"], {}),
    "albert_base+albert": ("encoder", ["albert_base", "albert"], {"embedding_size": 16}),
    "bart": ("denoise", ["bart_small"], {}),
    "bart_paper": ("denoise", ["bart"], {"num_decoder_layers": 2}),
    "bert": ("encoder", ["bert_small"], {}),
    "bert_base": ("mlm", ["bert_base"], {}),
    "bert_base+bert": ("encoder", ["bert_base", "bert"], {}),
    "bert_spans": ("mlm", ["bert_spans"], {}),
    "bert_spans+spanbert": ("encoder", ["bert_spans", "spanbert"], {}),
    "bert_whole_word": ("mlm", ["bert_whole_word"], {}),
    "clm_detour": ("encoder", ["clm_detour"], {}),
    "deberta_v3_small": ("rtd", ["deberta_v3_small"], {}),
    "demo": ("rtd", ["demo"], {"embedding_size": 24}),
    "distilbert": ("distil", ["distilbert"], {}),
    "elmo": ("elmo", ["elmo"], {"num_samples": 50, "num_train_epochs": None}),
    "elmo_small": ("elmo", ["elmo_small"], {"num_samples": 50}),
    "electra_base": ("rtd", ["electra_base"], {"embedding_size": 48}),
    "electra_small": ("rtd", ["electra_small"], {"embedding_size": 24}),
    "electric_small": ("electric", ["electric_small"], {"embedding_size": 24}),
    "gpt1": ("clm", ["gpt1"], {}),
    "gpt2_small": ("clm", ["gpt2_small"], {}),
    "gpt_bert": ("encoder", ["gpt_bert"], {}),
    "ict": ("contrastive", ["ict"], {"gradient_accumulation_steps": 2}),
    "infoword": ("contrastive", ["infoword"], {}),
    "mass": ("denoise", ["mass_small"], {}),
    "mass_paper": ("denoise", ["mass"], {"num_decoder_layers": 2}),
    "minilmv2": ("distil", ["minilmv2"], STUDENT | {"hidden_size": 48}),
    "modernbert_base": ("mlm", ["modernbert_base"], {}),
    "modernbert_phases": ("mlm", ["modernbert_phases"], {}),
    "modernbert_rtd": ("rtd", ["modernbert_rtd"], {}),
    "prefix_lm": ("denoise", ["prefix_lm_small"], {}),
    "prefix_lm_paper": ("denoise", ["prefix_lm"], {"num_decoder_layers": 2}),
    "retromae": ("contrastive", ["retromae"], {}),
    "roberta": ("encoder", ["roberta_small"], {}),
    "roberta_paper": ("encoder", ["roberta"], {}),
    "roberta_base": ("encoder", ["roberta_base"], {}),
    "roberta_base+roberta_nsp": ("encoder", ["roberta_base", "roberta_nsp"], {}),
    "roberta_base+roberta_static": ("encoder", ["roberta_base", "roberta_static"], {}),
    "simcse": ("contrastive", ["simcse"], {}),
    "spanbert": ("encoder", ["spanbert_small"], {}),
    "structbert": ("encoder", ["structbert_small"], {}),
    "structbert_paper": ("encoder", ["structbert"], {}),
    "t5": ("denoise", ["t5_small"], {}),
    "t5_paper": ("denoise", ["t5"], {"num_decoder_layers": 2}),
    "tinybert_general": ("distil", ["tinybert_general"], STUDENT),
    "tinybert_intermediate": ("distil-task", ["tinybert_intermediate"], STUDENT),
    "tinybert_prediction": ("distil-task", ["tinybert_prediction"], {"model_name_or_path": "student"}),
    "transformer_xl_small": ("recurrent-lm", ["transformer_xl_small"], {}),
    "transformer_xl_wt103": ("recurrent-lm", ["transformer_xl_wt103"], {"eval_lanes": 2}),
    "tsdae": ("contrastive", ["tsdae"], {}),
    "ul2": ("denoise", ["ul2_small"], {}),
    "ul2_paper": ("denoise", ["ul2"], {"num_decoder_layers": 2}),
    "unilm": ("encoder", ["unilm_small"], {"per_device_train_batch_size": 6}),
    "unilm_paper": (
        "encoder",
        ["unilm"],
        {"model_name_or_path": "teacher", "per_device_train_batch_size": 6}
        | dict.fromkeys([*SIZES, "vocab_size", "max_position_embeddings"]),
    ),
    "xlm": ("encoder", ["xlm_small"], XLM),
    "xlm_mlm_tlm+xlm": ("encoder", ["xlm_mlm_tlm", "xlm"], XLM),
    "xlnet_base": ("plm", ["xlnet_base"], XLNET | {"reuse_len": 16}),
    "xlnet_small": ("plm", ["xlnet_small"], XLNET),
    # Methods by themselves
    "mlm": ("mlm", [], {}),
    "mlm, roberta": ("mlm", [], {"model_type": "roberta", "tokenizer_type": "bpe"}),
    "mlm, modernbert": ("mlm", [], {"model_type": "modernbert"}),
    "mlm, electra": ("mlm", [], {"model_type": "electra", "embedding_size": 24}),
    "mlm, continued": (
        "mlm",
        [],
        {"model_name_or_path": "teacher"} | dict.fromkeys([*SIZES, "vocab_size", "max_position_embeddings"]),
    ),
    "denoise": ("denoise", [], {}),
    "denoise, in one row": ("denoise", [], {"block_mode": "isolated_documents"}),
    "contrastive": ("contrastive", [], {}),
    "contrastive, replaced tokens": ("contrastive", [], {"beside": "rtd", "views": "neighbours"}),
    "encoder": ("encoder", [], {}),
    "encoder, three": ("encoder", [], {"objectives": ["mlm", "sop", "word_order"], "word_order_probability": 0.3}),
    "encoder, next tokens": ("encoder", [], {"objectives": ["mlm", "clm"]}),
    "encoder, one side": ("encoder", [], {"objectives": ["mlm", "left_to_right", "right_to_left"]}),
    "rtd": ("rtd", [], {}),
    "rtd, decoupled": ("rtd", [], {"training_mode": "decoupled"}),
    "rtd, two stages": ("rtd", [], {"training_mode": "two_stage", "embedding_sharing": "none", "generator_size": 1.0}),
    "rtd, gdes": ("rtd", [], {"embedding_sharing": "gdes"}),
    "electric": ("electric", [], {}),
    "plm": ("plm", [], {}),
    "clm": ("clm", [], {}),
    "clm, in one row": ("clm", [], {"block_mode": "isolated_documents"}),
    "clm, llama": ("clm", [], {"model_type": "llama"}),
    "recurrent-lm": ("recurrent-lm", [], {}),
    "elmo, by default": ("elmo", [], {}),
    "elmo, in blocks": (
        "elmo",
        [],
        {"stateful": "false", "block_size": 32, "unroll_length": None, "eval_lanes": None},
    ),
    "elmo, adaptive": ("elmo", [], {"softmax": "adaptive", "cutoffs": [60, 120]}),
    "recurrent-lm, adaptive": ("recurrent-lm", [], {"cutoffs": [60, 120]}),
    "distil": ("distil", [], {"num_hidden_layers": 2}),
    "distil, minilm": ("distil", [], {"num_hidden_layers": 2, "distillation_method": "minilm"}),
    "distil, cached": (
        "distil",
        [],
        {"student_layers": "0,6", "cosine_weight": 0, "static_masks": 2, "cache_top_k": 8},
    ),
    "distil, trimmed": ("distil", [], {"student_layers": "0,6", "trim_vocabulary": "true"}),
    "distil-task": ("distil-task", [], {"student_layers": "uniform"}),
    **{
        f"distil-task, {task}": (
            "distil-task",
            [],
            files | {"task": task, "student_layers": "uniform"},
        )
        for task, files in TASKS.items()
    },
    # Other paths through training
    **{
        f"{method}, accumulated": (method, [], more | {"gradient_accumulation_steps": 2})
        for method, more in {
            "mlm": {},
            "encoder": {"objectives": ["mlm", "sop"]},
            "rtd": {},
            "plm": XLNET,
            "recurrent-lm": {},
            "distil": {"num_hidden_layers": 2},
        }.items()
    },
    "mlm, bf16": ("mlm", [], {"bf16": "true"}),
    "rtd, bf16": ("rtd", [], {"bf16": "true"}),
    **{f"{method}, isolated": (method, [], {"block_mode": "isolated_documents"}) for method in ("mlm", "rtd")},
    **{
        f"{method}, stream": (method, [], {"streaming": "true", "shuffle_buffer_size": 16})
        for method in ("mlm", "electric")
    },
    "mlm, evaluated": ("mlm", [], {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": "true"}),
    **{
        f"{method}, resumed": (method, [], more | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
        for method, more in {"mlm": {}, "plm": XLNET, "recurrent-lm": {}, "rtd": {}}.items()
    },
}


# Text, teachers and tasks


def write_inputs(folder):
    """Write text, translations, task examples and models of one vocabulary into a folder."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(150)]

    def sentence():
        return " ".join(draw.choices(words, weights=range(1, 151), k=draw.randint(4, 11))).capitalize() + "."

    for name, count in (("corpus.txt", 90), ("other.txt", 50)):
        documents = [" ".join(sentence() for _ in range(draw.randint(2, 7))) for _ in range(count)]
        (folder / name).write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    pairs = [f"{sentence()}\t{sentence()}\n" for _ in range(80)]
    (folder / "pairs.tsv").write_text("".join(pairs), encoding="utf-8")
    for name, count in (("train.tsv", 40), ("dev.tsv", 12)):
        rows = "".join(f"{sentence()}\t{draw.randrange(3)}\n" for _ in range(count))
        (folder / name).write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    tags, questions = [], []
    for _ in range(24):
        chosen = draw.sample(words, 8)
        tags.append({"tokens": chosen, "labels": [draw.choice("OAB") for _ in chosen]})
        begin = len(" ".join(chosen[:3])) + 1
        answers = {"text": [chosen[3]], "answer_start": [begin]}
        questions.append({"question": chosen[2], "context": " ".join(chosen), "answers": answers})
    for name, rows in (("tags.jsonl", tags), ("questions.jsonl", questions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_models(folder, syllables)


def save_models(folder, syllables):
    """Save a teacher of twelve layers, one for each kind of task, and a student of two."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *syllables, *(f"##{part}" for part in syllables)]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), tokens, strict=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **roles)
    sizes = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 64}
    tags = {"id2label": dict(enumerate("OAB")), "label2id": {name: i for i, name in enumerate("OAB")}}
    kinds = {
        "teacher": (transformers.BertForMaskedLM, {}),
        "classifier": (transformers.BertForSequenceClassification, {"num_labels": 3}),
        "tagger": (transformers.BertForTokenClassification, tags),
        "reader": (transformers.BertForQuestionAnswering, {}),
        "student": (transformers.BertForSequenceClassification, {"num_labels": 3, "num_hidden_layers": 2}),
    }
    for seed, (name, (model_class, options)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        shared = {"vocab_size": len(tokens), "max_position_embeddings": 64, "initializer_range": 0.2}
        model_class(transformers.BertConfig(**sizes | shared | options)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# One run


class Recorder:
    """Keeps the log rows and the gradients of the run under way; set up once for the process."""

    def __init__(self):
        import torch
        import transformers
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        recorder = self

        class Callback(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                recorder.model = model

            def on_log(self, args, state, control, logs=None, **kwargs):
                recorder.rows.append({"step": state.global_step} | without_volatile(dict(logs)))

        self.begin()
        transformers.utils.logging.disable_progress_bar()
        transformers.trainer.DEFAULT_CALLBACKS.append(Callback)
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self.gradients.append(self._gradients()))
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)

    def begin(self):
        self.model, self.rows, self.gradients = None, [], []

    def _gradients(self):
        named = {} if self.model is None else dict(self.model.named_parameters())
        return tensor_hashes({name: p.grad for name, p in named.items() if p.grad is not None})


def tensor_hashes(tensors):
    """Return a hash of tensors by name, and one of the tensors alone, which new names leave as it is."""
    import torch

    each = {}
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        each[name] = sha(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data)
    names = sha(json.dumps(each).encode())
    return {"count": len(each), "named": names, "unnamed": sha(json.dumps(sorted(each.values())).encode())}


def sha(data):
    return hashlib.sha256(data).hexdigest()


def without_volatile(value):
    """Return a value of JSON without the keys that depend on the machine, at any depth."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not any(part in str(name) for part in VOLATILE)}
        return {name: without_volatile(item) for name, item in kept.items()}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


def export_of(folder, work):
    """Return the hashes of exported tensors and tokenizers, and the configurations, by path; checkpoints are left out."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("checkpoint-"):
            continue
        if path.suffix == ".safetensors":
            found[name] = tensor_hashes(load_file(path))
        elif path.name == "config.json":
            text = path.read_text(encoding="utf-8").replace(str(work), "<work>")
            found[name] = without_volatile(json.loads(text))
        elif path.name == "tokenizer.json":
            found[name] = tokenizer_hash(json.loads(path.read_text(encoding="utf-8")))
    return found


def tokenizer_hash(saved):
    """Return a hash of a tokenizer without what changes from process to process."""
    # Set by the last call, which a cache may answer.
    saved = {name: value for name, value in saved.items() if name not in ("truncation", "padding")}
    if saved["model"]["type"] == "Unigram":
        # Letters that no text needs get their scores in no fixed order.
        pieces, scores = zip(*saved["model"]["vocab"], strict=True)
        saved["model"]["vocab"] = [sorted(pieces), sorted(scores)]
    return sha(json.dumps(saved, sort_keys=True).encode())


def command_of(name, work, **more):
    """Return the arguments of a run."""
    method, recipes, options = RUNS[name]
    argv = [method]
    for recipe in recipes:
        argv += ["--config", recipe]
    for option, value in (OWN[method] | options | more).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{option}", *(placed(str(part), work) for part in values)]
    return argv


def placed(value, work):
    """Put the folder of the inputs before the name of one of them; `en=corpus.txt` names one too."""
    before, equals, file = value.rpartition("=")
    return f"{before}{equals}{work / file}" if file and (work / file).exists() else value


def run_once(argv):
    """Run a command; return why it failed, or None."""
    import numpy as np
    import torch

    from hf_pretrain.cli import main

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            status = main(argv)
    except (Exception, SystemExit):
        return traceback.format_exc(limit=-1).splitlines()[-1]
    if status == 0:
        return None
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    return f"status {status}: {' '.join(lines)}"


def record_run(name, recorder, work):
    """Return what a run computed, and its error; of one that is resumed, the part after its checkpoint."""
    out = work / "runs" / "".join(letter if letter.isalnum() else "_" for letter in name)
    argv = command_of(name, work, output_dir=str(out))
    recorder.begin()
    error = run_once(argv)
    if error is None and name.endswith(", resumed"):
        recorder.begin()
        error = run_once([*argv, "--resume_from_checkpoint", str(out / "checkpoint-2")])
    found = {
        "log": recorder.rows,
        "gradients": recorder.gradients,
        "export": export_of(out, work) if out.is_dir() else {},
        "error": error and error.replace(str(work), "<work>"),
    }
    if error is None and not (found["log"] and found["gradients"] and found["export"]):
        found["error"] = "nothing was recorded"
    return found


def record(path, names):
    """Write the record of some runs, by default all; return 1 if any failed."""
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        raise SystemExit(f"unknown runs {unknown}: choose from {', '.join(RUNS)}")
    covered = {recipe for _, recipes, _ in RUNS.values() for recipe in recipes}
    missing = {file.stem for file in RECIPES.glob("*.yaml")} - covered
    if missing:
        raise SystemExit(f"no run has the recipes {sorted(missing)}: add them to RUNS")
    warnings.simplefilter("ignore")
    begun, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        os.environ.update(ENVIRONMENT, HF_HOME=str(work / "cache"))
        recorder = Recorder()
        write_inputs(work)
        for name in names or RUNS:
            started = time.perf_counter()
            found[name] = record_run(name, recorder, work)
            said = found[name]["error"] or f"{len(found[name]['gradients'])} steps"
            print(f"{time.perf_counter() - started:6.1f} s  {name}: {said}", flush=True)
    Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = [name for name in found if found[name]["error"]]
    print(
        f"{len(found)} runs in {time.perf_counter() - begun:.0f} s, {len(failed)} failed: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


# Comparison


def leaves(value, path=()):
    """Yield the path and value of everything in a value of JSON that is no container."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield path, value
        return
    for name, item in items:
        yield from leaves(item, (*path, str(name)))


def compare(first, second, names):
    """Print what differs between two records; return 1 if anything does."""
    one, other = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (first, second))
    names = names or sorted({*one, *other})
    count = 0
    for name in names:
        if name not in one or name not in other:
            print(
                f"{name}: only in {first if name in one else second}"
                if name in one or name in other
                else f"{name}: in neither"
            )
            count += 1
            continue
        a, b = dict(leaves(one[name])), dict(leaves(other[name]))
        paths = [path for path in sorted({*a, *b}) if json.dumps(a.get(path)) != json.dumps(b.get(path))]
        for path in paths:
            print(f"{name}: {' / '.join(path)}: {a.get(path, 'missing')} != {b.get(path, 'missing')}")
        count += bool(paths)
    print(f"{count} of {len(names)} runs differ")
    return 1 if count else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare two records")
    parser.add_argument("--list", action="store_true", help="print the names of all runs")
    parser.add_argument("files_and_names", nargs="*", metavar="FILE or NAME")
    given = parser.parse_args()
    files = given.files_and_names
    if given.list:
        print("\n".join(RUNS))
        return 0
    if len(files) < 1 + given.compare:
        parser.error("a record takes a file, a comparison takes two")
    return compare(files[0], files[1], files[2:]) if given.compare else record(files[0], files[1:])


if __name__ == "__main__":
    sys.exit(main())
