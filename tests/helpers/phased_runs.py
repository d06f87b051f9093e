"""Runs of programs with phases on tiny text, recorded step by step."""

from dataclasses import fields, replace
from pathlib import Path

import yaml
from transformers import TrainerCallback

from helpers.method_matrix import NO_DROPOUT, SPECIALS, VOCAB_SIZE, log_of, programs, tiny_tokenizer
from hf_pretrain.data import draws

PROGRAMS = programs()
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "block_size": 24,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "bf16": False,
    "disable_tqdm": True,
    "validation_fraction": 0.1,
    "report_to": "none",
}
BACKBONES = {"bert": NO_DROPOUT, "modernbert": "{}"}


class Stopped(Exception):
    """What ends a run in the middle."""


class Text:
    """Two texts of different words, and the tokenizer of both.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder):
        self.tokenizer = folder / "tokenizer"
        tiny_tokenizer().save_pretrained(self.tokenizer)
        half = (VOCAB_SIZE - len(SPECIALS)) // 2
        self.first, self.second = (
            self._write(folder / name, seed=seed, words=range(seed * half, (seed + 1) * half))
            for seed, name in enumerate(("first.txt", "second.txt"))
        )

    def _write(self, path, *, seed, words):
        keys = draws.row_keys(range(60), seed=seed, stream="text")
        rows = draws.integers(keys, 30, high=len(words)).tolist()
        path.write_text("\n\n".join(" ".join(f"w{words[word]}" for word in row) for row in rows))
        return path


class Step:
    """What one step read and how it was trained.

    Attributes:
        phase: Name of the phase.
        batches: The micro-batches.
        rates: Learning rate of each parameter group.
        decays: Weight decay of each.
    """

    def __init__(self, phase, batches):
        self.phase, self.batches, self.rates, self.decays = phase, batches, None, None


class _Recorder(TrainerCallback):
    def __init__(self, recorded):
        self.recorded = recorded

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        step = self.recorded[state.global_step]
        step.rates = [group["lr"] for group in optimizer.param_groups]
        step.decays = [group["weight_decay"] for group in optimizer.param_groups]

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop_at == state.global_step:
            raise Stopped


class PhasedRun:
    """A run of a program, and all that it did.

    Args:
        text: A [`Text`].
        folder: Output folder.
        phases: Entries of the recipe; None for a run without.
        argv: Further words of the command line.
        method: Name of the program.
        load: Makes the examples of a phase, in place of its text.
        model_type: Architecture.
        recipe: Ending of the recipe's name.
        stop_at: Step after which the run breaks off.
        stop_before_checkpoint: Step whose checkpoint is not written any more.
        stop_at_phase: Phase that breaks off before its first step.
        **options: Further options of the recipe.
    """

    def __init__(
        self,
        text,
        folder,
        phases,
        *argv,
        method="mlm",
        load=None,
        model_type="bert",
        recipe="yaml",
        stop_at=None,
        stop_before_checkpoint=None,
        stop_at_phase=None,
        **options,
    ):
        self.folder, self.steps, self.trainers, self.starts = Path(folder), {}, [], {}
        self.stops = (stop_at, stop_before_checkpoint, stop_at_phase)
        given = TINY | {
            "tokenizer_name": str(text.tokenizer),
            "train_file": [str(text.first)],
            "model_type": model_type,
        }
        given |= {"config_overrides": BACKBONES.get(model_type)} | options
        given |= {} if phases is None else {"phases": phases}
        program = PROGRAMS[method]
        if load is not None:
            known = {field.name for part in program.arguments for field in fields(part)}
            given = {name: value for name, value in given.items() if name in known}
        recipe = self.folder.with_suffix(f".{recipe}")
        recipe.write_text(yaml.safe_dump({name: value for name, value in given.items() if value is not None}))
        watched = replace(
            program, build_trainer=self._watched(program.build_trainer), demonstrate=None, load=load or program.load
        )
        watched.run(["--config", str(recipe), "--output_dir", str(self.folder), *map(str, argv)])

    def _watched(self, build):
        def build_trainer(data, model_args, args):
            trainer = build(data, model_args, args)
            if Path(args.output_dir) == self.folder:
                self._watch(trainer)
            return trainer

        return build_trainer

    def _watch(self, trainer):
        self.trainers.append(trainer)
        name = "" if trainer.course is None else trainer.course.phase.name
        stop_at, unwritten, phase = self.stops
        recorder = _Recorder(self.steps)
        recorder.stop_at = stop_at
        trainer.add_callback(recorder)
        get_batch_samples, save = trainer.get_batch_samples, trainer._save_checkpoint

        def record(*args):
            if name not in self.starts:
                self.starts[name] = state_of(trainer)
            if name == phase:
                raise Stopped
            batches, counts = get_batch_samples(*args)
            self.steps[trainer.state.global_step] = Step(name, batches)
            return batches, counts

        def save_checkpoint(*args):
            if trainer.state.global_step == unwritten:
                raise Stopped
            save(*args)

        trainer.get_batch_samples, trainer._save_checkpoint = record, save_checkpoint

    @property
    def trainer(self):
        """The Trainer of the last phase."""
        return self.trainers[-1]

    @property
    def log(self):
        """The log, without what depends on the machine."""
        return [row for row in log_of(self.trainer) if len(row) > 2]


def state_of(trainer):
    """Weights, and the moments of the optimizer by parameter."""
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = {
        (number, name): value.clone()
        for number, state in enumerate(trainer.optimizer.state_dict()["state"].values())
        for name, value in state.items()
    }
    return weights, moments
