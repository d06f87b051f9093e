"""A decoder that rebuilds a text from one vector: what the vector does not say, the decoder does not know.

It is weak on purpose, one layer by default, so that the encoder has to put the text into the vector. There are three kinds:
"masked" and "enhanced" are RetroMAE's, "causal" is TSDAE's. Word table and output layer are the encoder's word embeddings, which
are handed over in each call, so that they are neither trained nor saved twice.

The order: who sees whom by keyed draws, the configuration, a layer, the decoder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_pretrain.data.device_draws import bits, shifted
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.backbone import feed_forward_name, shared_options
from hf_pretrain.modeling.kernels import linear_cross_entropy, sums_early
from hf_pretrain.modeling.losses import token_losses

DECODER_FOLDER = "pretraining/decoder"
"""Folder of an export that holds the [`BottleneckDecoder`]."""

DECODER_KINDS = ("masked", "enhanced", "causal")

# A head of attention is this wide where the encoder does not say how many there are.
_HEAD_WIDTH = 64


def sampled_context(keys: torch.Tensor, length: int, *, mask_probability: float) -> torch.Tensor:
    """Draw which tokens each token is rebuilt from: never itself, always position 0, each other one with some probability.

    The draw of a pair follows from the key of the text and from the two positions alone, whatever the batch and its length: it is
    `draws.uniforms(draws.bits(keys, L), L)`, computed on the device.

    Args:
        keys: ``[B]`` int64 keys of the texts, 64 random bits each.
        length: L, positions of a text.
        mask_probability: Chance of another token to be unseen.

    Returns:
        ``[B, L, L]`` bool: whether the row sees the column.

    Source: Xiao et al. 2022, "RetroMAE: Pre-Training Retrieval-oriented Language Models Via Masked Auto-Encoder", section 3.3.
    """
    # In whole numbers of 53 bits: the same as a comparison in double precision, which is slow on most devices.
    columns_L = torch.arange(length, device=keys.device)
    bits_BLL = bits(bits(keys[:, None], columns_L)[..., None], columns_L)
    seen = shifted(bits_BLL, 11) < math.ceil((1 - mask_probability) * 2**53)
    return (seen & (columns_L[:, None] != columns_L)) | (columns_L == 0)


@strict
class BottleneckDecoderConfig(PreTrainedConfig):
    """Configuration of [`BottleneckDecoder`].

    Attributes:
        kind: "masked", "enhanced" or "causal".
        mask_probability: Chance of another token to be unseen; only with "enhanced".
        vocab_size: Number of tokens.
        embedding_size: Width of the word table.
        hidden_size: Width of the vector and of the states.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads of attention of a layer.
        intermediate_size: Width of the feed-forward layers.
        hidden_act: Activation.
        max_position_embeddings: Longest text, in tokens.
        hidden_dropout_prob: Dropout of what is added to the states.
        attention_probs_dropout_prob: Dropout of attention.
        layer_norm_eps: Epsilon of the norms.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "hf_pretrain_bottleneck_decoder"

    kind: str = "masked"
    mask_probability: float | None = None
    vocab_size: int = 30522
    embedding_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 1
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


class _Layer(nn.Module):
    """A layer as BERT has it; of "causal", with the vector between attention and feed-forward."""

    def __init__(self, config: BottleneckDecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        has_vector = config.kind == "causal"
        self.vector_out = nn.Linear(width, width) if has_vector else None
        self.vector_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if has_vector else None
        self.dense_in = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense_out = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        states: torch.Tensor,
        context: torch.Tensor,
        *,
        visible: torch.Tensor | None,
        vectors: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the new states of some positions, ``[T, D]``.

        Args:
            states: ``[B, L, D]``.
            context: ``[B, L, D]``, of which keys and values are made.
            visible: Bool, broadcast to ``[B, H, L, L]``: whether the row sees the column; None: it sees itself and those before.
            vectors: ``[B, D]``.
            positions: ``[T]`` flat positions.
        """
        length = states.shape[1]
        query, key, value = (
            dense(rows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for dense, rows in ((self.query, states), (self.key, context), (self.value, context))
        )
        dropout = self.attention_dropout if self.training else 0.0
        read_BHLE = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, is_causal=visible is None
        )
        read_TD = read_BHLE.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, positions)
        states_TD = states.flatten(0, 1).index_select(0, positions)
        states_TD = self.attention_norm(states_TD + self.dropout(self.attention_out(read_TD)))
        if self.vector_out is not None and self.vector_norm is not None:
            added_TD = self.vector_out(vectors).index_select(0, positions // length)
            states_TD = self.vector_norm(states_TD + self.dropout(added_TD))
        hidden_TD = self.dense_out(self.activation(self.dense_in(states_TD)))
        return self.output_norm(states_TD + self.dropout(hidden_TD))


class BottleneckDecoder(PreTrainedModel):
    """Rebuilds a text from one vector, which stands at position 0 in place of the first token.

    - "masked" reads the vector and the masked text; each position sees all. The logits at a position are of its own token.
    - "enhanced" has a stream that asks: at each position the vector plus the position's embedding. It reads from the vector and
      the untouched text, by [`sampled_context`], so that every token but the first can be rebuilt, each from a sample of its
      own. What is read is the embedded text in each layer: states of the text would tell a token of itself.
    - "causal" reads the text shifted by one: the token at a position is the one before its target, and the vector is the one
      before the first. Each position sees those before it and itself. TSDAE lets each layer attend to the vector. The softmax
      over this one key is 1, so that all of this attention is a linear map of the vector, the same at every position: here it
      is that map, with the dropout of a layer's output.

    A text begins at column 0, and padding follows. The embedded vector and tokens pass a norm, as BERT's do.

    Source: Xiao et al. 2022, "RetroMAE: Pre-Training Retrieval-oriented Language Models Via Masked Auto-Encoder", sections 3.2
    and 3.3; Wang et al. 2021, "TSDAE: Using Transformer-based Sequential Denoising Auto-Encoder for Unsupervised Sentence
    Embedding Learning", section 3. TSDAE's decoder reads a special token where here the vector is.
    """

    config_class = BottleneckDecoderConfig
    main_input_name = "vectors"

    def __init__(self, config: BottleneckDecoderConfig) -> None:
        super().__init__(config)
        _check(config)
        width, table_width, epsilon = config.hidden_size, config.embedding_size, config.layer_norm_eps
        self.projection = nn.Linear(table_width, width) if table_width != width else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.norm_in = nn.LayerNorm(width, eps=epsilon)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.dense_out = nn.Linear(width, table_width)
        self.activation = ACT2FN[config.hidden_act]
        self.norm_out = nn.LayerNorm(table_width, eps=epsilon)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    @classmethod
    def for_encoder(
        cls,
        encoder: PreTrainedModel,
        *,
        kind: str,
        max_length: int,
        num_layers: int = 1,
        mask_probability: float | None = None,
    ) -> BottleneckDecoder:
        """Build a decoder for a stock model.

        Args:
            encoder: The model; sizes and options that it does not have are BERT's for its width.
            kind: "masked", "enhanced" or "causal".
            max_length: Longest text, in tokens.
            num_layers: Number of layers.
            mask_probability: Chance of another token to be unseen; only with "enhanced".

        Raises:
            InputError: If the model has no table of words, or an option is unknown, out of range, missing or without effect.
        """
        table = getattr(encoder.get_input_embeddings(), "weight", None)
        if table is None or table.dim() != 2:
            raise InputError(
                f"{type(encoder).__name__} has no single table of words, which the decoder writes with: choose another "
                "architecture, such as bert, roberta, electra or modernbert"
            )
        names = ("hidden_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
        options = shared_options(encoder.config, *names, "initializer_range")
        width = options["hidden_size"]
        inner = getattr(encoder.config, feed_forward_name(encoder.config.model_type), None)
        own = {
            "num_attention_heads": _num_heads(getattr(encoder.config, "num_attention_heads", None), width),
            "intermediate_size": inner if isinstance(inner, int) else 4 * width,
            "vocab_size": table.shape[0],
            "embedding_size": table.shape[1],
            "num_hidden_layers": num_layers,
            "max_position_embeddings": max_length,
        }
        return cls(BottleneckDecoderConfig(kind=kind, mask_probability=mask_probability, **own, **options))

    def forward(
        self,
        vectors: torch.Tensor,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        word_table: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the tokens to be rebuilt, or their losses.

        Args:
            vectors: ``[B, D]``.
            input_ids: ``[B, L]`` tokens: masked, untouched or shifted by one, as the kind wants it. The first is not read.
            mask: ``[B, L]``, 1 at tokens, 0 at the padding behind them.
            word_table: ``[V, E]`` word embeddings of the encoder.
            positions: ``[T]`` flat row-major positions of the targets.
            keys: ``[B]`` int64 keys of the texts, see [`sampled_context`]; only with "enhanced".
            targets: ``[T]`` the tokens, -100 for none. The gradients of their losses must all be the same, see
                [`linear_cross_entropy`].

        Returns:
            ``[T, V]`` logits; with targets ``[T]`` losses in nats and fp32, and the logits never exist together.

        Raises:
            InputError: If texts are longer than the decoder has positions, or keys are missing or without effect.
        """
        length, is_enhanced = input_ids.shape[1], self.config.kind == "enhanced"
        if length > self.config.max_position_embeddings:
            raise InputError(
                f"decoder_input_ids have {length} tokens a text, the decoder has {self.config.max_position_embeddings} "
                "positions: build it with a max_length as great"
            )
        if is_enhanced == (keys is None):
            raise InputError(
                f"decoder_keys={'None' if keys is None else 'a tensor'} does not fit a decoder of kind={self.config.kind!r}: "
                "give keys to 'enhanced' and to no other"
            )
        # Nothing is cast where weights are float32.
        vectors = vectors.to(self.position_embeddings.weight.dtype)
        places_LD = self.position_embeddings(torch.arange(length, device=input_ids.device))
        words_BLE = F.embedding(input_ids, word_table)
        words_BLD = words_BLE if self.projection is None else self.projection(words_BLE)
        text_BLD = torch.cat([vectors[:, None], (words_BLD + places_LD)[:, 1:].to(vectors.dtype)], dim=1)
        text_BLD = self._embedded(text_BLD)
        states = self._embedded(vectors[:, None] + places_LD) if is_enhanced else text_BLD
        visible = self._visible(mask, keys)
        everywhere = torch.arange(mask.numel(), device=mask.device)
        for number, layer in enumerate(self.layers, start=1):
            is_last = number == len(self.layers)
            states_TD = layer(
                states,
                text_BLD if is_enhanced else states,
                visible=visible,
                vectors=vectors,
                # The last layer runs on where something is asked.
                positions=positions if is_last else everywhere,
            )
            states = states_TD if is_last else states_TD.view_as(states)
        read = self.norm_out(self.activation(self.dense_out(states)))
        if targets is not None and sums_early(word_table):
            return linear_cross_entropy(read, word_table, targets, bias=self.bias)
        logits = F.linear(read, word_table, self.bias)
        return logits if targets is None else token_losses(logits, targets)

    def _embedded(self, states: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.dropout(self.norm_in(states))
        return embedded

    def _visible(self, mask: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor | None:
        """Return who sees whom, as a layer takes it; the vector is seen in every row, so that none sees nothing."""
        if self.config.kind == "causal":
            # Padding is behind all tokens.
            return None
        length = mask.shape[1]
        seen_B1L = (mask[:, None] != 0) | (torch.arange(length, device=mask.device) == 0)
        if keys is not None:
            return (seen_B1L & sampled_context(keys, length, mask_probability=self.config.mask_probability))[:, None]
        return seen_B1L[:, None].expand(-1, 1, length, -1)


def _num_heads(own: object, width: int) -> int:
    """Return the encoder's number of heads, or one of about the usual width where it has none that divides the width."""
    if isinstance(own, int) and own > 0 and width % own == 0:
        return own
    return next(number for number in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % number == 0)


def _check(config: BottleneckDecoderConfig) -> None:
    """Refuse what is unknown, out of range, missing or without effect."""
    check_choice(config.kind, DECODER_KINDS, name="kind")
    check_range(config.num_hidden_layers, "[1, inf)", name="num_layers", hint="1 is usual")
    check_range(config.max_position_embeddings, "[1, inf)", name="max_length")
    if config.kind == "enhanced":
        if config.mask_probability is None:
            raise InputError("mask_probability=None: kind='enhanced' needs it; 0.5 is usual")
        check_range(config.mask_probability, "[0, 1)", name="mask_probability", hint="0.5 is usual")
    elif config.mask_probability is not None:
        raise InputError(
            f"mask_probability={config.mask_probability} has no effect with kind={config.kind!r}: leave it out, or set 'enhanced'"
        )
