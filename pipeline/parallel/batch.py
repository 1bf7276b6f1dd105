"""How a global batch lies over ranks and rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config import Data, UserError
from pipeline.wording import counted


@dataclass(frozen=True)
class BatchShape:
    """How one global batch lies over ranks and rounds: batch_size = world × rounds × images.

    Round r is the r-th of `rounds` equal, contiguous parts of the batch, divided over the ranks in order: the
    images of a round do not depend on the number of ranks.
    """

    world: int
    rounds: int
    images: int  # per rank and round

    @property
    def local(self) -> int:
        """Images of a rank, in all rounds."""
        return self.rounds * self.images

    def part(self, rank: int, number: int) -> slice:
        """Where the images of a rank in one round lie in the global batch."""
        start = (number * self.world + rank) * self.images
        return slice(start, start + self.images)

    def positions(self, rank: int) -> list[int]:
        """The places in the global batch of a rank's images [local], round by round."""
        return [i for r in range(self.rounds) for i in range(self.world * self.local)[self.part(rank, r)]]

    @contextmanager
    def explaining_shortage(self) -> Iterator[None]:
        """Raises UserError, with a setting that needs less, where the memory of a GPU is full."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            fewer = next((n for n in range(self.images - 1, 0, -1) if self.images % n == 0), None)
            remedy = (
                f"Set data.batch_gpu={fewer}, which makes more rounds of fewer images of the same batch"
                if fewer
                else "Set G.checkpoint=true and D.checkpoint=true, or choose a strategy that shards more"
            )
            raise UserError(
                f"The memory of a GPU is full with {counted(self.images, 'image')} at once. {remedy}. "
                f"`shardgan doctor` forecasts what is needed. PyTorch: {str(error).partition(chr(10))[0]}"
            ) from None

    def __str__(self) -> str:
        """In words: "64 = 2 ranks x 1 round x 32 images"."""
        parts = {"rank": self.world, "round": self.rounds, "image": self.images}
        words = " x ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in parts.items())
        return f"{self.world * self.local} = {words}"


def batch_shape(data: Data, world: int) -> BatchShape:
    """Divide the global batch: equal parts per rank, then as few equal rounds as batch_gpu allows.

    Raises UserError if it cannot be divided, naming sizes that can.
    """
    size = data.batch_size
    if world > size:
        raise UserError(
            f"{world} processes cannot share a batch of {size} images. Use at most {size} processes in all, "
            f"or raise data.batch_size to a multiple of {world}."
        )
    if size % world:
        below, above = size - size % world, size - size % world + world
        raise UserError(
            f"data.batch_size={size} cannot be divided equally over {world} processes. "
            f"Set it to {below} or {above}, or change the number of processes."
        )
    local = size // world
    ceiling = data.batch_gpu or local
    rounds = next(r for r in range(1, local + 1) if local % r == 0 and local // r <= ceiling)
    return BatchShape(world, rounds, local // rounds)
