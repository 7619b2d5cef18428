"""Weighted sums of stored samples, one row of 64 for every block and piece (``mix``), and their way to the host.

What is small is computed on the CPU, the plan, and with it the size of every array on the device. So nothing has to be
read back while the device works, and the host waits for nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart.render.envelopes import BLOCK, Grid, Pieces
from smart.render.synth import PEAK_EPS

ROWS_CUDA, ROWS_CPU = 1 << 22, 1 << 15  # rows at a time: on a CPU they should fit into its cache


class _Cut(NamedTuple):
    """Where the time line is cut, so that not too many rows exist at once."""

    block: int  # the number of the first block after it
    row: int  # rows before it
    sample: int


def mix(store: torch.Tensor, pieces: Pieces, grid: Grid) -> torch.Tensor:
    """The sum of ``pieces``, (2, total): for every block, the weighted sum of one row of ``store`` from each piece.

    ``pieces`` and ``grid`` are on the CPU; the result is on the device of ``store``, which another stream may still
    have to compute (nothing here waits for it).
    """
    device = store.device
    # stretches between two bounds have the same pieces in all their blocks
    bounds = np.unique(np.concatenate([pieces.first.numpy(), pieces.last.numpy(), [0, grid.blocks]]))
    low, high = (np.searchsorted(bounds, edge.numpy()) for edge in (pieces.first, pieces.last))
    changes = np.bincount(low, minlength=len(bounds)) - np.bincount(high, minlength=len(bounds))
    sizes = changes.cumsum()[:-1]  # pieces of each stretch
    before = sizes.cumsum() - sizes  # pieces of all stretches before it
    cuts = _cuts(grid, bounds, sizes, ROWS_CUDA if device.type == "cuda" else ROWS_CPU)
    if not cuts[-1].row:
        return torch.zeros(2, grid.total, device=device)
    span = high - low  # stretches of each piece
    whole = _to(
        device,
        # of each piece
        pieces.origin, pieces.shift, torch.from_numpy(span), torch.from_numpy(low - (span.cumsum() - span)),
        # of each stretch
        torch.from_numpy(np.diff(bounds)), torch.from_numpy(sizes), torch.from_numpy(before),
        # of each part of the time line that begins with an event, and of its end
        torch.cat([grid.many, grid.many.new_ones(1)]),
        torch.cat([grid.starts - BLOCK * grid.first, grid.starts.new_tensor([grid.total - BLOCK * grid.blocks])]),
    )  # fmt: skip
    origin, shift, span_, offset, width, sizes_, before_, many, line = whole
    fall, *gains = _to(device, -pieces.fall, *pieces.base, *pieces.slope)
    formula = torch.stack(gains)  # (4, p) base and slope, left and right

    # the pieces of the stretches, one stretch after the other
    members = _repeat(torch.arange(len(low), device=device), span_, int(span.sum()))
    stretch = offset[members] + torch.arange(len(members), device=device)
    members = members[torch.sort(stretch, stable=True).indices]
    # the blocks
    start = _repeat(line, many, grid.blocks + 1) + BLOCK * torch.arange(grid.blocks + 1, device=device)
    lengths = start.diff()  # an event cuts a block short
    own, member = _repeat(torch.stack([sizes_, before_]), width, grid.blocks)
    rows = own.cumsum(0) - own  # rows of all blocks before
    member -= rows
    windows = store.as_strided((len(store) - BLOCK + 1, BLOCK), (1, 1))
    out = torch.empty(2, grid.total, device=device)
    for cut, end in pairwise(cuts):
        if cut.block == end.block:
            continue
        blocks = slice(cut.block, end.block)
        block = _repeat(torch.arange(cut.block, end.block, device=device), own[blocks], end.row - cut.row)
        numbers = torch.arange(len(block), device=device)
        piece = members[member[block] + numbers + cut.row]
        time = start[block]
        since = (time - origin[piece]).float()
        fading = torch.exp(fall[piece] * since)
        base, slope = formula[:, piece].view(2, 2, -1)
        gain = (base + slope * since) * fading  # (2, rows)
        sounds = windows[shift[piece] + time]
        first = rows[blocks] - cut.row
        # from a sample of this part to its place in the blocks, which are all of full length
        excess = BLOCK * torch.arange(end.block - cut.block, device=device) - (start[blocks] - cut.sample)
        samples = end.sample - cut.sample
        place = _repeat(excess, lengths[blocks], samples) + torch.arange(samples, device=device)
        for side in range(2):
            sums = torch.nn.functional.embedding_bag(numbers, sounds, first, mode="sum", per_sample_weights=gain[side])
            out[side, cut.sample : end.sample] = sums.view(-1)[place]
    return out


def normalise(audio: torch.Tensor, blocks: npt.NDArray[np.int64]) -> None:
    """Divide each clip of ``audio`` (2, S), ``blocks`` long one after the other, by its peak."""
    rows = audio.view(2, -1, BLOCK)
    peaks = torch.linalg.vector_norm(rows, ord=torch.inf, dim=(0, 2))  # of each block
    many = upload(torch.from_numpy(blocks), audio.device)
    steps = torch.arange(int(blocks.max()), device=audio.device)
    place = (many.cumsum(0) - many)[:, None] + steps
    inside = steps < many[:, None]
    highest = torch.where(inside, peaks[place.clamp(max=len(peaks) - 1)], 0.0).amax(dim=1)
    rows.div_((highest + PEAK_EPS).repeat_interleave(many, output_size=len(peaks))[:, None])


def download(tensors: Sequence[torch.Tensor]) -> dict[int, npt.NDArray[np.float32]]:
    """The numbers of each tensor, by its id; the host waits for the current stream alone, and once."""
    different = {id(tensor): tensor for tensor in tensors}
    if not any(tensor.is_cuda for tensor in tensors):
        return {key: tensor.numpy() for key, tensor in different.items()}
    arrived = {}
    for key, tensor in different.items():
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        arrived[key] = pinned.copy_(tensor, non_blocking=True).numpy()
    done = torch.cuda.Event(blocking=True)  # without spinning: others need the core
    done.record()
    done.synchronize()
    return arrived


def _cuts(grid: Grid, bounds: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], most: int) -> list[_Cut]:
    """The cuts, from the start to the end of the time line: at most ``most`` rows lie between two, or one block."""
    rows = np.concatenate([[0], (sizes * np.diff(bounds)).cumsum()])
    steps = np.arange(most, rows[-1], most)
    stretch = np.searchsorted(rows, steps, side="right") - 1
    blocks = (steps - rows[stretch]) // sizes[stretch]
    start = grid.start(torch.from_numpy(bounds[stretch] + blocks)).numpy()
    inner = zip(bounds[stretch] + blocks, rows[stretch] + blocks * sizes[stretch], start, strict=True)
    return [_Cut(0, 0, 0), *(_Cut(*map(int, cut)) for cut in inner), _Cut(grid.blocks, int(rows[-1]), grid.total)]


def _to(device: torch.device, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors (n,) of one type on the device, by one copy for which the host does not wait."""
    return upload(torch.cat(parts), device).split([len(part) for part in parts])


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device; the host does not wait for the copy."""
    if device.type == "cpu":
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values).to(device, non_blocking=True)


def _repeat(values: torch.Tensor, many: torch.Tensor, total: int) -> torch.Tensor:
    """Each of ``values`` (..., n) as often as ``many`` (n,) says, ``total`` in all: known, or the host would wait."""
    return values.repeat_interleave(many, dim=-1, output_size=total)
