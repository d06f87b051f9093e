"""Students of a sentence encoder: how well their vectors rank the similarity of two sentences, on STS-B.

    python benchmarks/sentence_embeddings.py --teacher all-MiniLM-L6-v2 --stsb_dir stsb [--layers 3] [--steps 60]
    python benchmarks/sentence_embeddings.py --teacher all-MiniLM-L6-v2 --stsb_dir stsb --train_file wikitext.txt --seeds 0 1

The folder of STS-B has `train.csv` and `dev.csv` without a header: sentence, sentence, score. Students read `--train_file`, or
the sentences of `train.csv` that are not in `dev.csv`; no score is used. Each is trained by the program `distil`, and measured as
`SentenceTransformer` would encode: the Spearman correlation of the cosines with the scores of `dev.csv`, times 100. Of several
seeds the table has the mean, the least and the greatest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from hf_pretrain.cli import main as run_program
from hf_pretrain.evaluation.similarity import (
    ScoredPairs,
    read_scored_pairs,
    similarity_correlation,
    text_vectors,
)
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.modeling.surgery.cutting import cut_student
from hf_pretrain.objectives.distillation.student import choose_layers
from timing import print_table

STUDENTS = {"cut": ["--student_layers", "every_other"], "new": []}
LOSSES = {
    "embedding": ["--distillation_method", "embedding"],
    "embedding, similarities": [
        *("--distillation_method", "embedding", "--sentence_cosine_weight", "0"),
        *("--sentence_similarity_weight", "1"),
    ],
    "minilmv2": ["--distillation_method", "minilmv2"],
}

TRAINING = ["--learning_rate", "2e-4", "--warmup_steps", "0.1", "--save_strategy", "no"]
TRAINING += ["--report_to", "none", "--logging_steps", "10"]


def write_text(folder: Path, target: Path) -> int:
    """Write the different sentences to train on, one a line; return their number."""
    dev, train = (read_scored_pairs(folder / f"{split}.csv") for split in ("dev", "train"))
    held_out = {*dev.first, *dev.second}
    pairs = zip(train.first, train.second, strict=True)
    texts = {text.strip(): None for pair in pairs for text in pair if text not in held_out}
    target.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return len(texts)


def correlation(model: PreTrainedModel, folder: str, pairs: ScoredPairs) -> float:
    """Return the Spearman correlation of the cosines with the scores, times 100."""
    modules, tokenizer = SentenceModules.read(folder), AutoTokenizer.from_pretrained(folder)
    assert modules is not None, "the folder is one of sentence-transformers"
    first, second = (text_vectors(model, tokenizer, texts, modules=modules) for texts in (pairs.first, pairs.second))
    return 100 * similarity_correlation(first, second, pairs.scores)


def shown(scores: Sequence[float]) -> str:
    """Return the mean of the seeds' scores, with the least and the greatest."""
    mean = f"{statistics.fmean(scores):.1f}"
    return mean if len(scores) == 1 else f"{mean} ({min(scores):.1f} to {max(scores):.1f})"


def train(
    begin: str, loss: str, seed: int, *, text: Path, output: Path, options: argparse.Namespace
) -> PreTrainedModel:
    """Distil a student by the program, and return it."""
    command = ["distil", "--teacher_name_or_path", options.teacher, "--output_dir", str(output), "--seed", str(seed)]
    command += [*LOSSES[loss], *STUDENTS[begin], "--num_hidden_layers", str(options.layers)]
    command += ["--train_file", str(text), "--document_separator", "line", "--block_size", "64"]
    command += ["--max_steps", str(options.steps), "--per_device_train_batch_size", "32", *TRAINING]
    command += ["--bf16", str(options.bf16).lower()]
    failed = run_program(command)
    if failed:
        raise SystemExit(failed)
    return AutoModel.from_pretrained(output)


def main() -> None:
    """Train the students and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Folder of a model of sentence-transformers.")
    parser.add_argument("--stsb_dir", type=Path, required=True, help="Folder with train.csv and dev.csv.")
    parser.add_argument("--train_file", type=Path, help="Other text to train on, one a line.")
    parser.add_argument("--layers", type=int, default=3, help="Layers of the students.")
    parser.add_argument("--steps", type=int, default=60, help="Steps of 32 texts.")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, and a teacher in bf16.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of the weights and of the order.")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    options = parser.parse_args()
    pairs, teacher = read_scored_pairs(options.stsb_dir / "dev.csv"), AutoModel.from_pretrained(options.teacher)
    depth = teacher.config.num_hidden_layers
    layers = choose_layers("every_other", teacher_layers=depth, student_layers=options.layers)
    table = [("teacher", 0, shown([correlation(teacher, options.teacher, pairs)]))]
    table.append(("cut", 0, shown([correlation(cut_student(teacher, layers), options.teacher, pairs)])))
    with tempfile.TemporaryDirectory() as folder:
        text = options.train_file or Path(folder, "train.txt")
        if options.train_file is None:
            print(f"{write_text(options.stsb_dir, text)} sentences to train on")
        for begin, loss in itertools.product(options.students, options.losses):
            scores = []
            for seed in options.seeds:
                output = Path(folder, f"{begin} {loss} {seed}")
                student = train(begin, loss, seed, text=text, output=output, options=options)
                scores.append(correlation(student, str(output), pairs))
            table.append((f"{begin}, {loss}", options.steps, shown(scores)))
            print(*table[-1], flush=True)
    print_table(table, ["Model", "Steps", "Spearman"])


if __name__ == "__main__":
    main()
