"""Does pre-training help translation? Pre-train encoder-decoders on your text, fine-tune them on pairs, and compare.

Change the names below. TEXT has any format of `hf-pretrain denoise`, best in both languages. TRAIN and TEST are two files each:
line n of the second translates line n of the first, as in multi30k. One model is pre-trained as T5, one of its kind as MASS, and
one not at all. Everything is written to OUT as stock checkpoints. It needs `pip install 'hf-pretrain[translation]'`.
"""

from pathlib import Path

from datasets import Dataset
from sacrebleu import corpus_bleu
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_pretrain.cli import main

TEXT, OUT = ["books.txt", "train.en", "train.de"], "translation"
TRAIN, TEST = ("train.en", "train.de"), ("test.en", "test.de")
SIZES, VOCABULARY = {"hidden_size": 256, "num_hidden_layers": 4, "block_size": 128}, 8192
STEPS, BATCH, SEED = 4000, 32, 0
TASK = {"max_steps": 3000, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "optim": "adafactor"}


def pre_train(name: str, **options: object) -> str:
    """Run `hf-pretrain NAME_small` on the text, and return the folder of the model."""
    options |= {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "seed": SEED, "output_dir": f"{OUT}/{name}"}
    words = [word for key, value in (SIZES | options).items() for word in (f"--{key}", str(value))]
    if status := main([f"{name}_small", "--train_file", *TEXT, *words]):
        raise SystemExit(status)
    return f"{OUT}/{name}"


def fine_tune(model: AutoModelForSeq2SeqLM, name: str) -> float:
    """Fine-tune a model on the pairs, and return the BLEU of its translations of the others."""
    lines = [[Path(file).read_text(encoding="utf-8").splitlines() for file in files] for files in (TRAIN, TEST)]
    columns = [[tokenizer(side)["input_ids"] for side in sides] for sides in lines]
    train, test = (Dataset.from_dict({"input_ids": a, "labels": b}) for a, b in columns)
    args = Seq2SeqTrainingArguments(f"{OUT}/{name}-fine-tuned", predict_with_generate=True, seed=SEED, **TASK)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    tuner = Seq2SeqTrainer(model, args, collator, train, processing_class=tokenizer)
    tuner.train()
    tuner.save_model()
    found = [row[row >= 0] for row in tuner.predict(test, max_length=128).predictions]
    return corpus_bleu(tokenizer.batch_decode(found, skip_special_tokens=True), [lines[1][1]]).score


t5 = pre_train("t5", vocab_size=VOCABULARY)
mass = pre_train("mass", model_type="t5", tokenizer_name=t5)
tokenizer = AutoTokenizer.from_pretrained(t5)
models = {"T5": AutoModelForSeq2SeqLM.from_pretrained(t5), "MASS": AutoModelForSeq2SeqLM.from_pretrained(mass)}
set_seed(SEED)
models["none"] = AutoModelForSeq2SeqLM.from_config(models["T5"].config)
scores = {name: fine_tune(model, name) for name, model in models.items()}
print(*(f"BLEU after pre-training {name}: {score:.2f}" for name, score in scores.items()), sep="\n")
