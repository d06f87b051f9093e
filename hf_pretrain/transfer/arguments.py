"""The options of a strategy of fine-tuning, and which of them each strategy takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.options import option
from hf_pretrain.transfer.layers import DecayMode, check_decay

Strategy = Literal[
    "full",
    "layerwise_decay",
    "discriminative",
    "frozen",
    "gradual",
    "probe_then_tune",
    "top_layers",
    "bitfit",
    "lora",
    "dora",
    "peft",
    "scalar_mix",
]
ADAPTERS = frozenset({"lora", "dora", "peft"})
"""The strategies that add weights by peft."""

_LAYERWISE = frozenset({"layerwise_decay", "discriminative", "gradual", "probe_then_tune", "top_layers", "bitfit"})
_WHOLE = frozenset({"full", "layerwise_decay", "discriminative", "gradual", "probe_then_tune"})
_ALL = frozenset(get_args(Strategy))
_LOW_RANK = frozenset({"lora", "dora"})
# The strategies that an option has an effect on; the others refuse it.
_TAKEN_BY: dict[str, frozenset[str]] = {
    "layerwise_learning_rate_decay": _LAYERWISE | ADAPTERS,
    "head_learning_rate": _ALL - {"frozen"},
    "freeze_embeddings": _WHOLE | {"bitfit"},
    "reinit_layers": _WHOLE | {"top_layers"},
    "unfreeze_every": frozenset({"gradual"}),
    "probe_share": frozenset({"probe_then_tune"}),
    "probe_learning_rate": frozenset({"probe_then_tune"}),
    "frozen_layers": frozenset({"top_layers"}),
    "lora_rank": _LOW_RANK,
    "lora_alpha": _LOW_RANK,
    "lora_dropout": _LOW_RANK,
    "lora_target_modules": _LOW_RANK,
    "peft_config": frozenset({"peft"}),
    "export": ADAPTERS,
    "tune_encoder": frozenset({"scalar_mix"}),
}
# The decays of the rate that strategies have by themselves: ELECTRA's and ULMFiT's; others have none.
_DECAYS = {"layerwise_decay": 0.8, "discriminative": 1 / 2.6}
_RANGES = {
    "head_learning_rate": "[0, inf)",
    "probe_learning_rate": "[0, inf)",
    "reinit_layers": "[0, 4096]",
    "unfreeze_every": "(0, inf)",
    "probe_share": "(0, 1)",
    "frozen_layers": "[0, 4096]",
    "slanted_cut_fraction": "(0, 1)",
    "slanted_ratio": "(1, inf)",
    "lora_rank": "[1, 65536]",
    "lora_alpha": "(0, inf)",
    "lora_dropout": "[0, 1)",
}


@dataclass
class StrategyArguments:
    """The options of a strategy of fine-tuning; one that has no effect on the chosen strategy is refused.

    Options without a value take the strategy's own when the object is made, so that what is written here is what is done.

    Sources: Howard and Ruder 2018 (discriminative rates, gradual unfreezing, slanted triangular rates); Kumar et al. 2022 (probe,
        then tune); Lee et al. 2019 (top layers); Ben Zaken et al. 2022 (BitFit); Hu et al. 2022 (LoRA); Liu et al. 2024 (DoRA).
    """

    strategy: Strategy = option(
        "layerwise_decay",
        "What moves: 'full' (all at one rate), 'layerwise_decay' (lower layers slower), 'discriminative' (ULMFiT's rates), "
        "'frozen' (the head alone), 'gradual' (a layer more from the top at a time), 'probe_then_tune' (the head alone, then "
        "all), 'top_layers', 'bitfit' (biases), 'lora', 'dora', 'peft' (any method of peft) or 'scalar_mix' (a learned mix of "
        "the layers).",
    )
    layerwise_learning_rate_decay: float | None = option(
        None,
        "Factor of the learning rate from one layer to the one below; 1 for none. By default 0.8 for 'layerwise_decay' and "
        "1/2.6 for 'discriminative'.",
    )
    layerwise_decay_mode: DecayMode = option(
        "paper", "'paper': the last layer's rate is the head's times the factor; 'official': times its square."
    )
    head_learning_rate: float | None = option(None, "Peak learning rate of the head; by default learning_rate.")
    freeze_embeddings: bool = option(False, "Keep the embeddings as they are.")
    reinit_layers: int = option(0, "Number of last layers whose weights are drawn anew before training.")
    unfreeze_every: float | None = option(
        None,
        "For 'gradual': steps until the next layer moves, or their share of all steps if below 1; by default an epoch.",
    )
    probe_share: float | None = option(
        None, "For 'probe_then_tune': share of the steps in which the head moves alone; by default 0.5."
    )
    probe_learning_rate: float | None = option(
        None,
        "For 'probe_then_tune': peak learning rate of the head while it moves alone; by default its rate afterwards.",
    )
    frozen_layers: int | None = option(
        None, "For 'top_layers': number of first layers that stay, with the embeddings; by default half of them."
    )
    slanted_triangular: bool | None = option(
        None, "ULMFiT's schedule instead of lr_scheduler_type and warmup_steps; by default for 'discriminative' alone."
    )
    slanted_cut_fraction: float | None = option(
        None, "Share of the steps in which the slanted triangular rate rises; by default 0.1."
    )
    slanted_ratio: float | None = option(
        None, "How much smaller than the peak the slanted triangular rate begins and ends; by default 32."
    )
    lora_rank: int | None = option(None, "For 'lora' and 'dora': rank of the added matrices; by default 8.")
    lora_alpha: float | None = option(
        None, "For 'lora' and 'dora': scale of what is added, over the rank; by default 2 ranks."
    )
    lora_dropout: float | None = option(None, "For 'lora' and 'dora': dropout of their input; by default 0.")
    lora_target_modules: list[str] | None = option(
        None,
        "For 'lora' and 'dora': ends of the names of adapted modules; by default all linear layers of the encoder.",
    )
    peft_config: dict | str | None = option(
        None, "For 'peft': options of peft with a peft_type, as JSON or the path of a JSON file."
    )
    export: Literal["merged", "adapter"] | None = option(
        None,
        "With adapters, what is saved in the end: 'merged' (a stock model; the default) or 'adapter' (the adapter alone).",
    )
    tune_encoder: bool = option(False, "For 'scalar_mix': the encoder moves too.")

    def settle_strategy(self) -> None:
        """Refuse options without effect, check the others, and fill in the strategy's own values.

        Raises:
            InputError: Naming the option, its value and the fix.
        """
        check_choice(self.strategy, get_args(Strategy), name="strategy")
        check_choice(self.export, (*get_args(Literal["merged", "adapter"]), None), name="export")
        self._check_effects()
        for name, allowed in _RANGES.items():
            if getattr(self, name) is not None:
                check_range(getattr(self, name), allowed, name=name)
        if self.strategy == "peft" and self.peft_config is None:
            raise InputError("strategy='peft' needs peft_config, such as '{\"peft_type\": \"IA3\"}'")
        own: dict[str, Any] = {"layerwise_learning_rate_decay": _DECAYS.get(self.strategy, 1.0)}
        own |= {"slanted_triangular": self.strategy == "discriminative"}
        own |= {"probe_share": 0.5} if self.strategy == "probe_then_tune" else {}
        own |= {"export": "merged"} if self.strategy in ADAPTERS else {}
        own |= {"lora_rank": 8, "lora_dropout": 0.0} if self.strategy in _LOW_RANK else {}
        self._fill(own)
        self._fill({"lora_alpha": 2.0 * cast(int, self.lora_rank)} if self.strategy in _LOW_RANK else {})
        self._fill({"slanted_cut_fraction": 0.1, "slanted_ratio": 32.0} if self.slanted_triangular else {})
        check_decay(cast(float, self.layerwise_learning_rate_decay), self.layerwise_decay_mode)
        if self.layerwise_decay_mode != "paper" and self.layerwise_learning_rate_decay == 1:
            raise InputError(
                f"layerwise_decay_mode={self.layerwise_decay_mode!r} has no effect: all layers learn at one rate; leave it out, "
                "or set layerwise_learning_rate_decay"
            )

    def _fill(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_effects(self) -> None:
        """Refuse options that are set although the strategy does not look at them."""
        defaults = {known.name: known.default for known in fields(StrategyArguments)}
        for name, strategies in _TAKEN_BY.items():
            value = getattr(self, name)
            neutral = name == "layerwise_learning_rate_decay" and value == 1
            if value != defaults[name] and not neutral and self.strategy not in strategies:
                known = ", ".join(known for known in get_args(Strategy) if known in strategies)
                raise InputError(
                    f"{name}={value!r} has no effect with strategy={self.strategy!r}: leave it out, or choose one of {known}"
                )
        for name in ("slanted_cut_fraction", "slanted_ratio"):
            if getattr(self, name) is not None and not (self.slanted_triangular or self.strategy == "discriminative"):
                raise InputError(
                    f"{name}={getattr(self, name)} has no effect: set slanted_triangular too, or leave it out"
                )
        if self.tune_encoder is False and self.strategy == "scalar_mix" and self.head_learning_rate is not None:
            raise InputError("head_learning_rate has no effect where the head moves alone: set learning_rate")
