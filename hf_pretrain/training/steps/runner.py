"""How a micro-batch is computed: on which attention backend it runs, and what of it is timed and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_pretrain.data.examples.epochs import FILLER, EpochDataset, without_filler
from hf_pretrain.errors import InputError
from hf_pretrain.hub.run import profile_of
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.modeling.kernels import fast_dropout
from hf_pretrain.modeling.observing.profile import Profile, profile_line
from hf_pretrain.modeling.visibility.backends import AUTO, FLEX, FastAttention

if TYPE_CHECKING:
    from hf_pretrain.modeling.base import PretrainingModel
    from hf_pretrain.training.trainer import PretrainingTrainer


class StepRunner:
    """Runs the micro-batches of a Trainer: on flash attention where the models can, watched by a [`Profile`] if there is one.

    Args:
        trainer: The Trainer.

    Raises:
        InputError: If the options ask for FlexAttention, and a model that is trained cannot run on it.

    Attributes:
        profile: Clock of the training that runs or was the last; None without the option `profile`.
        profiled: What it found of the last training that came to its end.
    """

    def __init__(self, trainer: PretrainingTrainer) -> None:
        self.trainer = trainer
        self.profile: Profile | None = None
        self.profiled: dict[str, Any] | None = None
        self._attention: dict[tuple[str, ...], FastAttention] = {}
        self._is_tried = False
        if self._wanted_attention == FLEX:
            self.fast_attention({})

    def begin(self) -> None:
        """Forget an earlier training, which may have been of another model."""
        self._attention = {}
        if self.trainer.args.profile:
            self.profile = profile_of(self.trainer)

    # Attention

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the products of a step."""
        args = self.trainer.args
        return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else self.trainer.model.dtype

    @property
    def _wanted_attention(self) -> str | None:
        options = self.trainer.inputs.model_args
        return AUTO if options is None else getattr(options, "attn_implementation", None)

    def fast_attention(self, batch: Mapping[str, Any]) -> FastAttention:
        """Return which attention the stock models have with a batch; the option may name a backend."""
        model, args, wanted = self.trainer.model, self.trainer.args, self._wanted_attention
        # FlexAttention takes the masks of any batch of a method that also has batches for flash attention.
        allowed = model.on_flash({} if wanted == FLEX else batch) if wanted in (AUTO, FLEX) else ()
        names = tuple(sorted(allowed))
        if names not in self._attention:
            parts = model.attending(device=args.device, dtype=self.compute_dtype)
            why_not = model.why_not_flash if wanted in (AUTO, FLEX) else ""
            self._attention[names] = FastAttention(parts, allowed=names, why_not=why_not, wanted=wanted or AUTO)
        return self._attention[names]

    def on_fast_attention(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Run the models on flash or FlexAttention, those that can with this batch."""
        fast = self.fast_attention(batch)
        return fast.running() if fast.is_faster else nullcontext()

    @property
    def attention(self) -> str | None:
        """Names of the attention backends that the stock models run on in a step; None if none of them chooses one."""
        return self.fast_attention({}).names

    # A step

    @property
    def _isolates_documents(self) -> bool:
        return self.trainer.data_description.get("block_mode") == "isolated_documents"

    def check_collator(self) -> None:
        """Refuse a collator that drops `document_ids` where documents are kept apart, by the first example.

        Raises:
            InputError: Naming the collator.
        """
        dataset = self.trainer.train_dataset
        if self._isolates_documents and isinstance(dataset, EpochDataset) and len(dataset):
            example = dataset[0]
            if "document_ids" in example:
                self._refuse_lost_documents(self.trainer.data_collator([example]))

    def _refuse_lost_documents(self, batch: Mapping[str, Any]) -> None:
        # They would see each other.
        if self._isolates_documents and "document_ids" not in batch:
            raise InputError(
                f"block_mode='isolated_documents', but the batches of {type(self.trainer.data_collator).__name__} have no "
                "document_ids: choose another block_mode, such as 'doc_sentences'"
            )

    def receive(self, batches: Sequence[dict[str, Any]]) -> None:
        """Look at the micro-batches of the next step: try out the first one before it is compiled, check all, count tokens."""
        if self.trainer.args.torch_compile and batches:
            self.try_out(batches[0])
        counted = self.trainer.tokens.new
        for batch in batches:
            self._refuse_lost_documents(batch)
            if FILLER not in batch:
                counted += batch["attention_mask"].sum().to(counted.device)

    @contextmanager
    def training(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Run a micro-batch forward and backward."""
        if self._wants_flops and FILLER not in batch:
            # Only torch's own attention is known to the counter.
            with self._counting(batch):
                yield
            return
        args = self.trainer.args
        watching = nullcontext() if self.profile is None else self.profile.watching()
        with watching, self.on_fast_attention(batch), fast_dropout(args.device, is_compiled=args.torch_compile):
            yield

    @torch.no_grad()
    def try_out(self, batch: Mapping[str, Any]) -> None:
        """Run the model on the first batch before it is compiled: what it finds out of its stock models would break the graph."""
        if self._is_tried:
            return
        self._is_tried = True
        trainer = self.trainer
        # Weights that are divided among processes, only the wrapped model puts together.
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return
        inputs = trainer._prepare_inputs(without_filler(batch))
        inputs.pop("lanes", None)
        with evaluating(trainer.model), self.on_fast_attention(inputs):
            trainer.model(**inputs)
        if self.profile is not None and self._wants_flops:
            # A compiled graph hides its operations. Backward they are taken to be twice as many.
            with evaluating(trainer.model), torch.enable_grad(), self._counting(inputs):
                trainer.model(**inputs)
            self.profile.flops *= 3

    # The profile

    @property
    def _wants_flops(self) -> bool:
        # A micro-batch of another mode trains one of two models.
        is_whole = getattr(self.trainer.args, "training_mode", "joint") == "joint"
        return self.profile is not None and self.profile.wants_flops and is_whole

    def _counting(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        assert self.profile is not None, "only a profile wants to count"
        return self.profile.counting(int(batch["attention_mask"].sum()))

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Do something that is no training: one of the parts of a [`Profile`]."""
        return nullcontext() if self.profile is None else self.profile.part(part)

    def end_profile(self) -> None:
        """Write where the time of the training went, and show it in a line."""
        if self.profile is None:
            return
        trainer = self.trainer
        trainer.tokens.add_new()
        tokens = trainer.state.num_input_tokens_seen - getattr(trainer, "_initial_num_input_tokens_seen", 0)
        self.profiled = self.profile.summary(tokens=tokens, num_processes=trainer.args.world_size)
        if trainer.is_world_process_zero():
            self.profile.write(Path(trainer.args.output_dir), self.profiled)
            trainer.progress.say(f"profile {profile_line(self.profiled)}")


def with_host_inputs(collate: Callable[[list[Any]], dict[str, Any]], model: PretrainingModel) -> Any:
    """Return a collator followed by the model's `host_inputs`; both run in the workers, so it holds no weights."""
    return partial(_with_host_inputs, collate, type(model), model.config)


def _with_host_inputs(
    collate: Callable[[list[Any]], dict[str, Any]],
    model_class: type[PretrainingModel],
    config: Any,
    examples: list[Any],
) -> dict[str, Any]:
    batch = collate(examples)
    return {**batch, **model_class.host_inputs(batch, config)}
