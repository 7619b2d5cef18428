"""Detect from its tokens alone when everything audible of a completion has been sampled: it has then settled.

Bars follow one another in time, whatever they contain, so no later token sounds before the line of the current bar. A
completion has therefore settled once a complete note stands in a bar that begins after the ``seconds`` that are
rendered (that note makes the clip as long as it can be), or once a bar begins after ``MAX_BEATS``. It can then be
rendered while its inaudible rest is still being sampled.

Axes: N sequences, L tokens of a row.
"""

from typing import Any

import torch
from miditok.constants import TIME_SIGNATURE
from symusic.core import TempoTick

from smart.render import MAX_BEATS
from smart.tokens import vocabulary

MARGIN = 1e-3  # seconds; more than a sample, so that rounding onsets to samples cannot matter
NEVER = 2**40  # ticks


class Horizon:
    """Which completions have settled, by the rule above, if ``seconds`` of each are rendered."""

    def __init__(self, tokenizer: Any, *, seconds: float) -> None:
        facts = vocabulary(tokenizer)
        config, division = tokenizer.config, int(tokenizer.time_division)
        names = sorted(tokenizer.vocab, key=tokenizer.vocab.__getitem__)
        parts = [name.split("_", 1) for name in names]
        lowest, highest = config.pitch_range

        def table(kind: str, value: Any) -> torch.Tensor:
            return torch.tensor([value(text) if name == kind else 0 for name, text in parts])

        def beat(text: str) -> int:  # ticks per beat of a time signature such as 6/8
            return division * 4 // int(text.split("/")[1])

        self.applies = not config.use_rests  # a rest may move the bar line
        self.seconds = seconds
        self.last_tick = MAX_BEATS * division
        self.bar_id = facts.bar_id
        self.bar_ticks = table("TimeSig", lambda text: beat(text) * int(text.split("/")[0]))
        self.step_ticks = table("TimeSig", lambda text: beat(text) // int(config.max_num_pos_per_beat))
        self.position = table("Position", lambda text: int(text) + 1) - 1  # -1: no position
        self.pace = table("Tempo", lambda text: _pace(float(text), division)).double()  # seconds per tick; 0: no tempo
        sounding = [table(kind, lambda text: lowest <= int(text) <= highest) for kind in ("Pitch", "PitchDrum")]
        self.pitch = (sounding[0] + sounding[1]).bool()
        self.velocity = table("Velocity", lambda text: int(text) > 0).bool()
        self.duration = table("Duration", lambda text: 1).bool()
        self.of_note = torch.tensor([name in ("Pitch", "PitchDrum", "Velocity", "Duration") for name, _ in parts])
        numerator, denominator = TIME_SIGNATURE
        self.opening = (
            beat(f"1/{denominator}") * numerator,
            beat(f"1/{denominator}") // int(config.max_num_pos_per_beat),
        )
        self.opening_pace = _pace(float(tokenizer.default_tempo), division)

    def settled(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N,) bool for tokens (N, L) on the CPU: True if nothing that follows can be heard. It may turn True late."""
        if not self.applies:
            return torch.zeros(len(tokens), dtype=torch.bool)
        places = torch.arange(1, tokens.shape[1] + 1).expand_as(tokens)

        def latest(which: torch.Tensor) -> torch.Tensor:  # (N, L) place of the last such token so far, from 1; 0: none
            return torch.where(which, places, 0).cummax(dim=1).values

        def first(which: torch.Tensor) -> torch.Tensor:  # (N, 1), from 1
            return torch.where(which, places, NEVER).amin(dim=1, keepdim=True)

        # the first time signature holds from the beginning if it stands before the first note (as MidiTok decodes)
        is_signature = self.bar_ticks[tokens] > 0
        at, note_at = first(is_signature), first(self.of_note[tokens])
        known = torch.minimum(at, note_at)[:, 0] < NEVER
        last = latest(is_signature)

        def in_force(values: torch.Tensor, default: int) -> torch.Tensor:
            found = tokens.gather(1, (at - 1).clamp(max=tokens.shape[1] - 1))
            start = torch.where(at < note_at, values[found], default)
            return torch.where(last > 0, values[tokens.gather(1, (last - 1).clamp(min=0))], start)

        is_bar, is_position = tokens == self.bar_id, self.position[tokens] >= 0
        moves = is_bar & ((is_bar | is_position).cumsum(dim=1) > 1)  # the first bar line is at 0
        bar = torch.where(moves, in_force(self.bar_ticks, self.opening[0]), 0).cumsum(dim=1)  # tick of the bar's line
        last_position = latest(is_position)
        offset = self.position[tokens] * in_force(self.step_ticks, self.opening[1])
        offset = offset.gather(1, (last_position - 1).clamp(min=0))
        tick = bar + torch.where(last_position > latest(is_bar), offset, 0)

        # tempos by tick, after MidiTok's default; of several at one tick the last one counts: the others last no time
        nothing = torch.zeros_like(tokens[:, :1])
        pace = self.pace[tokens]
        many = int((pace > 0).sum(dim=1).amax())
        at_tick, order = torch.where(pace > 0, tick, NEVER).sort(dim=1, stable=True)
        at_tick = torch.cat([nothing, at_tick[:, :many]], dim=1)
        pace = torch.cat([nothing.double() + self.opening_pace, pace.gather(1, order)[:, :many]], dim=1)
        pace = torch.where(pace > 0, pace, self.opening_pace)
        at_seconds = (at_tick.diff(dim=1) * pace[:, :-1]).cumsum(dim=1)
        at_seconds = torch.cat([nothing.double(), at_seconds], dim=1)
        end = self.seconds + MARGIN
        piece = (at_seconds <= end).sum(dim=1, keepdim=True) - 1
        horizon = at_tick.gather(1, piece) + (end - at_seconds.gather(1, piece)) / pace.gather(1, piece)

        note = self.pitch[tokens[:, :-2]] & self.velocity[tokens[:, 1:-1]] & self.duration[tokens[:, 2:]]
        heard_out = (note & (bar[:, 2:] >= horizon)).any(dim=1)
        return known & (heard_out | (bar[:, -1] >= self.last_tick))


def _pace(beats_per_minute: float, division: int) -> float:
    """Seconds per tick, rounded in the same way as symusic stores a tempo."""
    mspq: int = TempoTick(0, beats_per_minute).mspq
    return mspq / 1e6 / division
