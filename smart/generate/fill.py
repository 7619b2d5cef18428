"""Infilling: some bars of a song are written anew, and everything else stays as it is.

No base is trained for it. Therefore many versions of the bars are sampled as continuations of what stands before them,
each bar in the song's time signature, and the one is kept after which the model finds what follows most likely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from smart import UserError
from smart.corpus.events import MidiFile, pair_notes
from smart.generate.song import Song, add_parts, is_piano, new_parts, tempo_token
from smart.generate.writer import Writer, last_bars
from smart.tokens import Grammar, decode, vocabulary

if TYPE_CHECKING:  # imported where they are used: the command line answers at once
    import torch

SUFFIX = 128  # at most this many tokens of what follows are asked for


def bar_range(text: str) -> tuple[int, int]:
    """The first and last bar of "5-8" or "5". Raises ``UserError``."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--bars {text}: expected the bars to fill, such as 5-8, counted from 1")
    return first, last


class Fill(NamedTuple):
    """Bars of a song that are written anew: ``song.tokens`` of the bars before, and after; ticks where they begin."""

    song: Song
    tokenizer: Any
    before: list[int]
    after: list[int]
    signatures: list[int]  # TimeSig tokens of the bars to fill
    start: int
    stop: int
    window: int  # tokens that the model sees at once

    def prompt(self) -> list[int]:
        """What the model reads before the first of the bars, which it then writes."""
        facts = vocabulary(self.tokenizer)
        line = [facts.bar_id, self.signatures[0]]
        if not self.before:
            return [*line, facts.position0_id, tempo_token(self.song, 0, self.tokenizer)]
        return last_bars(self.before, facts, bars=self.window, longest=self.window * 3 // 4 - len(line)) + line

    def write(
        self, writer: Writer, rows: int, tokens: int, generator: torch.Generator, grammar: Grammar
    ) -> list[list[int]]:
        """``rows`` versions of the bars, of about ``tokens`` tokens at most; all that follows ``prompt``.

        Every bar has the song's time signature, no version changes the tempo, and every token can be played.
        """
        facts = vocabulary(self.tokenizer)
        allowed = grammar.allowed.clone()
        allowed[:, [facts.eos_id, *facts.tempo_ids]] = False
        steady = replace(grammar, allowed=allowed)
        prompt, written = self.prompt(), [[] for _ in range(rows)]  # type: list[int], list[list[int]]
        left = tokens
        for number, signature in enumerate(self.signatures):
            if number:
                for row in written:
                    row += [facts.bar_id, signature]
            share = max(left // (len(self.signatures) - number), 1)
            drawn = writer.write_bar([[*prompt, *row] for row in written], share, generator, steady)
            for row, bar in zip(written, drawn, strict=True):
                row += whole_notes(bar, facts.duration_ids)
            left -= max(map(len, drawn), default=0)
        return written

    def join(self, network: Any, written: Sequence[Sequence[int]]) -> list[float]:
        """How well each version joins: the mean log-probability of the tokens that follow it, or of the end."""
        import torch

        from smart.logprobs import token_logprobs

        facts = vocabulary(self.tokenizer)
        opening = self.prompt()[2:] if not self.before else []
        following = self.after[: min(SUFFIX, self.window // 4)] or [facts.eos_id]
        contexts = [
            last_bars(
                [*self.before, facts.bar_id, self.signatures[0], *opening, *row],
                facts,
                bars=self.window,
                longest=self.window - len(following),
            )
            for row in written
        ]
        width = max(map(len, contexts))
        rows = [[facts.pad_id] * (width - len(context)) + context + following for context in contexts]
        device = next(network.parameters()).device
        with torch.no_grad():
            logps = token_logprobs(network, torch.tensor(rows, device=device), width, micro_batch=16)
        return [float(value) for value in logps.mean(dim=1)]

    def notes(self, tokens: Sequence[int]) -> int:
        """How many notes a version has."""
        facts = vocabulary(self.tokenizer)
        return sum(token in facts.velocity_ids for token in tokens)

    def midi(self, tokens: Sequence[int]) -> bytes:
        """The song's file, in which the notes that begin in these bars have made way for those of ``tokens``.

        Every other event stays as it is, byte for byte. The new notes are a track of their own, and end with the bars.
        """
        facts = vocabulary(self.tokenizer)
        opening = self.prompt()[2:] if not self.before else []
        whole = decode(self.tokenizer, [*self.before, facts.bar_id, self.signatures[0], *opening, *tokens])
        parts = new_parts("fill", whole, self.start, self.stop, self.song.midi.division)
        programs = self._programs()
        if not facts.program_ids:
            parts = [part._replace(program=programs[0] if programs else 0) for part in parts]
        return add_parts(self._without_notes(), parts).dumps()

    def _programs(self) -> list[int]:
        """The programs of the song's notes in these bars that the model reads, the most frequent first."""
        found = [
            track.program
            for track in self.song.score.tracks
            if not track.is_drum and is_piano(track.program, 0)
            for note in track.notes
            if self.start <= note.time < self.stop
        ]
        return sorted(set(found), key=lambda program: -found.count(program))

    def _without_notes(self) -> MidiFile:
        everything = bool(vocabulary(self.tokenizer).program_ids)
        tracks = []
        for track in self.song.midi.tracks:
            programs = [0] * 16
            heard = set()  # places of note-ons that the model reads
            for place, (tick, data) in enumerate(track):
                channel = data[0] & 0x0F
                if data[0] & 0xF0 == 0xC0:
                    programs[channel] = data[1]
                if self.start <= tick < self.stop and (everything or is_piano(programs[channel], channel)):
                    heard.add(place)
            gone = {
                place
                for pressed in pair_notes(track).values()
                for press in pressed
                if press.on in heard
                for place in press
            }
            tracks.append([event for place, event in enumerate(track) if place not in gone])
        return MidiFile(self.song.midi.division, tracks)


def fill_song(song: Song, first: int, last: int, tokenizer: Any, window: int) -> Fill:
    """Fill bars ``first`` to ``last`` of ``song``, counted from 1 as the song has them, a pickup included.

    Raises ``UserError`` for bars that the song does not have, or that the model reads together with others.
    """
    count = len(song.lines) - 1
    if last > count:
        raise UserError(f"--bars {first}-{last}: expected bars 1 to {count}, all that the song has")
    start, stop = int(song.lines[first - 1]), int(song.lines[last])
    lines = song.token_lines.tolist()
    for tick, bar in ((start, first), (stop, last + 1)):
        if tick not in lines:
            raise UserError(
                f"--bars {first}-{last}: the model reads bars {bar - 1} and {bar} as one; name both of them, or neither"
            )
    facts = vocabulary(tokenizer)
    places = [*(place for place, token in enumerate(song.tokens) if token == facts.bar_id), len(song.tokens)]
    one, other = lines.index(start), lines.index(stop)
    return Fill(
        song,
        tokenizer,
        song.tokens[: places[one]],
        song.tokens[places[other] :],
        [song.tokens[place + 1] for place in places[one:other]],
        start,
        stop,
        window,
    )


def whole_notes(tokens: Sequence[int], durations: Sequence[int]) -> list[int]:
    """``tokens`` up to the end of the last note: a bar that was cut has half of one."""
    ends = [place for place, token in enumerate(tokens) if token in durations]
    return list(tokens[: ends[-1] + 1]) if ends else []
