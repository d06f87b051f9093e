"""ELMo with its two losses, as the Trainer takes it; how it is built or loaded; and the words that a sampled softmax compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from tokenizers import models
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel, check_model_fits, trial_tokens
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig, check_model_type, own_config
from hf_pretrain.modeling.heads import with_head
from hf_pretrain.modeling.loading import from_config, from_pretrained
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, RecurrentMemory
from hf_pretrain.models.elmo.configuration_elmo import ElmoConfig
from hf_pretrain.models.elmo.modeling_elmo import DIRECTIONS, ElmoForPreTraining, shifted_labels
from hf_pretrain.models.elmo.softmax_elmo import Negatives, find_target_rows
from hf_pretrain.models.elmo.tokenization_elmo import ElmoTokenizer
from hf_pretrain.objectives.elmo.arguments import ElmoModelArguments

# Draws of a first try, in samples: most words that are drawn have been drawn before.
_FIRST_TRY = 4


def draw_negatives(size: int, *, vocab_size: int, seed: int, epoch: int, number: int) -> Negatives:
    """Draw words that a sampled softmax compares with the right ones, frequent words more often than rare ones.

    Ids are drawn until so many are distinct, id i with probability ``ln((i + 2) / (i + 1)) / ln(V + 1)``.

    Args:
        size: S, how many; all words, where they are not more.
        vocab_size: V.
        seed: Seed of the run.
        epoch: Epoch, and `number` in it, of what the words are drawn for.
        number: Any integer.

    Source: TensorFlow's `log_uniform_candidate_sampler`, as in `bilm-tf`.
    """
    if size >= vocab_size:
        return Negatives(torch.arange(vocab_size), torch.tensor(torch.inf))
    keys = draws.row_keys([number], seed=seed, epoch=epoch, stream="elmo_negatives")
    length = _FIRST_TRY * size
    while True:
        found = np.exp(draws.uniforms(keys, length)[0] * np.log(vocab_size + 1)).astype(np.int64) - 1
        firsts = np.sort(np.unique(found, return_index=True)[1])
        if len(firsts) >= size:
            num_tries = torch.tensor(float(firsts[size - 1] + 1))
            return Negatives(torch.from_numpy(found[firsts[:size]]), num_tries)
        length *= 2


@strict
class BidirectionalLMConfig(CompositeConfig):
    """Configuration of [`BidirectionalLMForPreTraining`]: that of the ELMo inside."""

    model_type = "hf_pretrain_elmo"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None


class BidirectionalLMForPreTraining(PretrainingModel):
    """An ELMo that predicts the next word from left to right, and the one before from right to left.

    Args:
        config: Configuration with the ELMo's inside.
        model: The model to train; built from the configuration, with fresh weights, when not given.
    """

    config_class = BidirectionalLMConfig

    def __init__(self, config: BidirectionalLMConfig, model: ElmoForPreTraining | None = None) -> None:
        super().__init__(config)
        self.model = ElmoForPreTraining(config.model) if model is None else model
        self.post_init()

    @classmethod
    def from_arguments(
        cls,
        args: ElmoModelArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stock: PreTrainedModel | None = None,
    ) -> BidirectionalLMForPreTraining:
        """Load the checkpoint that the arguments name, or build the model that they describe.

        Args:
            args: What to load or to build.
            tokenizer: Gives the vocabulary, and the characters of its words.
            stock: An ELMo to train instead, with or without its softmax.

        Raises:
            InputError: If the sizes do not fit together, the checkpoint is no ELMo or does not fit the tokenizer, or the
                tokenizer knows pieces of words where the model reads characters.
        """
        if stock is not None:
            _check_elmo(stock.config, name=f"model={type(stock).__name__}")
            model = with_head(stock, AutoModelForPreTraining)
        elif args.model_name_or_path is not None:
            config = from_pretrained(AutoConfig, args.model_name_or_path)
            _check_elmo(config, name=f"model_name_or_path={args.model_name_or_path!r}")
            model = from_pretrained(ElmoForPreTraining, args.model_name_or_path)
            check_model_fits(model, tokenizer, block_size=1)
        else:
            model = from_config(ElmoForPreTraining, own_config(ElmoConfig, args, tokenizer))
            if model.config.embedding_type == "characters":
                table = character_table(tokenizer, max_characters=model.config.max_characters)
                model.model.embeddings.characters.copy_(table)
        return cls.from_model(model)

    def check_isolation(self, *, length: int) -> None:
        """Refuse rows of several documents.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "block_mode='isolated_documents': an LSTM reads a row from end to end, so its documents see each other: choose "
            "another block_mode, such as 'doc_sentences'"
        )

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few words, each the target of its neighbours; see [`PretrainingModel.trial_batch`]."""
        ids = trial_tokens(self.model)
        # Some of each cluster of an adaptive softmax.
        begins = (self.model.config.cutoffs or [])[: ids.shape[1] - 2]
        ids[0, 1 : 1 + len(begins)] = torch.tensor(begins, dtype=ids.dtype, device=ids.device)
        labels, backward_labels = shifted_labels(ids)
        return {"input_ids": ids, "labels": labels, "backward_labels": backward_labels}

    @property
    def memory_size(self) -> int:
        """Entries of a lane's memory: the last states alone."""
        return 1

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of words that each direction predicts."""
        names = ("labels", "backward_labels")
        return {kind: (batch[name] != IGNORED).sum() for kind, name in zip(DIRECTIONS, names, strict=True)}

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return the distinct words of the batch, and where the targets are; see [`PretrainingModel.host_inputs`]."""
        parts = [batch[name] for name in ("input_ids", "backward_input_ids") if name in batch]
        words, word_index = torch.cat(parts).unique(return_inverse=True)
        return {
            "words": words,
            "word_index": word_index,
            "forward_rows": find_target_rows(batch["labels"], config.model),
            "backward_rows": find_target_rows(batch["backward_labels"], config.model),
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        backward_labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        backward_input_ids: torch.Tensor | None = None,
        memory: RecurrentMemory | None = None,
        memory_reset: torch.Tensor | None = None,
        negatives: torch.Tensor | None = None,
        num_tries: torch.Tensor | None = None,
        words: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        forward_rows: list[torch.Tensor] | None = None,
        backward_rows: list[torch.Tensor] | None = None,
    ) -> PretrainingOutput:
        """Return the losses of both directions, and the states for the windows that follow.

        Args:
            input_ids: ``[B, S]``; without `backward_input_ids` both directions read it.
            labels: ``[B, S]`` the next word of each, -100 where there is none.
            backward_labels: ``[B, S]`` what each word of the backward direction is followed by in its order.
            attention_mask: ``[B, S]`` of `input_ids`; read only where both directions read the same.
            backward_input_ids: ``[B, S]`` the backward direction's own window, in its order, padding last.
            memory: States ``[2L, B, 1, P + C]`` of both directions to go on from; None for none.
            memory_reset: ``[B]`` bool, true for lanes that begin anew.
            negatives: ``[S]`` words of a sampled softmax; read in training alone.
            num_tries: ``[]`` how many draws they took.
            words: ``[U]`` distinct words; each is embedded once. Every word is, if not given.
            word_index: Which of them is where: ``[B, S]``, or ``[2B, S]`` with the backward windows below.
            forward_rows: Where the targets are; found here, which waits for the device, if not given.
            backward_rows: The same of the backward direction.

        Returns:
            The losses "forward" and "backward" (nats), and `memory` where the directions have windows of their own.

        Raises:
            InputError: If a sampled softmax is trained without samples.
        """
        sampled = None
        if self.training and self.model.config.softmax == "sampled":
            if negatives is None or num_tries is None:
                raise InputError(
                    "softmax='sampled': the batch has no negatives: use DataCollatorForElmo(num_samples=...)"
                )
            sampled = Negatives(negatives, num_tries)
        ids = input_ids if backward_input_ids is None else torch.cat([input_ids, backward_input_ids])
        embeddings = self.model.model.embeddings
        vectors = embeddings(ids) if words is None or word_index is None else embeddings(words)[word_index]
        if backward_input_ids is None:
            output = self.model.model(inputs_embeds=vectors, attention_mask=attention_mask, return_dict=True)
            tops, memory = output.last_hidden_state.chunk(2, dim=-1), None
        else:
            tops, memory = self._read_windows(vectors, memory, memory_reset)
        losses: dict[str, ExampleSum] = {}
        targets = ((labels, forward_rows), (backward_labels, backward_rows))
        for direction, states, (wanted, rows) in zip(DIRECTIONS, tops, targets, strict=True):
            nll_BS = self.model.token_losses(states, wanted, rows, sampled)
            losses[direction] = ExampleSum(nll_BS.sum(dim=1), (wanted != IGNORED).sum(dim=1).float())
        return PretrainingOutput(losses=losses, metrics={}, memory=memory)

    def _read_windows(
        self, vectors: torch.Tensor, memory: RecurrentMemory | None, memory_reset: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], RecurrentMemory]:
        """Read a window of each direction; return both last layers ``[B, S, P]`` and the new states."""
        if memory is not None and memory_reset is not None:
            memory = memory.reset(memory_reset)
        elmo, tops, new = self.model.model, [], []
        states = None if memory is None else memory.states[:, :, 0].chunk(2)
        for number, direction in enumerate(DIRECTIONS):
            # Windows are short only where a lane ends, and nothing goes on from there.
            layers, state = elmo.read(
                vectors.chunk(2)[number], direction, None if states is None else states[number].to(vectors.dtype)
            )
            tops.append(elmo.dropout(layers[-1]))
            new.append(state.detach().float())
        kept = torch.cat(new).unsqueeze(2)
        return tops, RecurrentMemory(kept, torch.ones(kept.shape[1], dtype=torch.long, device=kept.device))


def character_table(tokenizer: PreTrainedTokenizerBase, *, max_characters: int) -> torch.Tensor:
    """Return the characters of every word of a tokenizer, ``int32 [V, max_characters]``.

    Raises:
        InputError: If its tokens are not whole words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordLevel):
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} knows pieces of words, whose characters are not those of words: train one "
            "with --tokenizer_type word, or take --embedding_type tokens"
        )
    words: Any = tokenizer
    own = ElmoTokenizer.from_fast(words, max_characters=max_characters)
    return torch.tensor(own.vocabulary_characters(), dtype=torch.int32)


def _check_elmo(config: Any, *, name: str) -> None:
    check_model_type(config, ElmoConfig, name=name)
    if not config.vocab_size:
        raise InputError(
            f"{name} has no vocabulary, as the published weights, and so nothing to predict: it cannot be trained"
        )
