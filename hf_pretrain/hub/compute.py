"""What a run took: its steps, tokens, time, hardware, memory and energy, as far as they were measured."""

from __future__ import annotations

from dataclasses import dataclass

from hf_pretrain.hub import card_text
from hf_pretrain.hub.environment import Energy


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a run took; what was not measured stays `None` and is left out of the card.

    Attributes:
        parameters: Parameters of the model at the root of the repository.
        trained_parameters: All that were trained, those of the auxiliary parts included.
        steps: Optimizer steps.
        planned_steps: Steps until the end of the run.
        examples_per_step: Examples of a step, over all devices and accumulation steps.
        tokens: Tokens seen, padding left out, over all devices.
        seconds: Wall-clock time of the training, since its last resume if it was resumed.
        resumed_at_step: Step of the last resume; `None` if there was none.
        timed_tokens: Tokens seen in `seconds`, where that is not all of them.
        hardware: See [`hf_pretrain.hub.environment.hardware`].
        processes: Processes that trained together.
        precision: "fp32", "bf16", ...
        peak_memory_mib: The most memory in use at a time, in MiB: of one device, or of one process on a CPU.
        energy: What was measured of it.
    """

    parameters: int | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    planned_steps: int | None = None
    examples_per_step: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    resumed_at_step: int | None = None
    timed_tokens: int | None = None
    hardware: str | None = None
    processes: int | None = None
    precision: str | None = None
    peak_memory_mib: float | None = None
    energy: Energy | None = None

    @property
    def is_partial(self) -> bool:
        """Whether the run had more steps to go."""
        return bool(self.steps and self.planned_steps and self.steps < self.planned_steps)


def compute_rows(compute: Compute) -> list[card_text.Row]:
    """Return (name, value) rows of what was measured; tokens a second follow from tokens and time."""
    timed = compute.tokens if compute.timed_tokens is None else compute.timed_tokens
    speed = timed / compute.seconds if timed and compute.seconds else None
    memory = f"{compute.peak_memory_mib / 1024:.3g} GiB" if compute.peak_memory_mib else None
    trained = compute.trained_parameters if compute.trained_parameters != compute.parameters else None
    many = compute.processes if compute.processes and compute.processes > 1 else None
    since = "" if compute.resumed_at_step is None else f", since the resume at step {compute.resumed_at_step:,}"
    table = {
        "Parameters": compute.parameters,
        "Parameters trained, auxiliary parts included": trained,
        "Optimizer steps": f"{compute.steps:,} of {compute.planned_steps:,}" if compute.is_partial else compute.steps,
        "Examples per step": compute.examples_per_step,
        "Tokens seen": compute.tokens,
        f"Training time{since}": card_text.duration(compute.seconds) if compute.seconds else None,
        "Tokens per second": round(speed) if speed else None,
        "Hardware": compute.hardware,
        "Processes": many,
        "Precision": compute.precision,
        "Peak memory of a process" if many else "Peak memory": memory,
    }
    return card_text.rows(table | _energy_rows(compute), as_is=True)


def _energy_rows(compute: Compute) -> dict[str, str]:
    energy = compute.energy
    if energy is None:
        return {}
    scope = {"machine": " of the whole machine", "process": " of the run's processes"}.get(energy.scope or "", "")
    sessions = ""
    if compute.resumed_at_step is not None:
        # A session that was killed has left no measurement.
        sessions = f", in {energy.sessions} session{'s' if energy.sessions > 1 else ''} of the run"
    table = {"Energy": f"{card_text.number(energy.kwh)} kWh{scope}, measured by {energy.source}{sessions}"}
    if energy.emissions_kg is not None:
        place = f", with the electricity of {card_text.cell(energy.country)}" if energy.country else ""
        table["Emissions"] = f"{card_text.number(1000 * energy.emissions_kg)} g CO2 equivalent{place}"
    return table
