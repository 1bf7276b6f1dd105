"""What ranks send in each phase of a training, against theory; pipeline/README.md has the table.

A message of gloo is three segments: its announcement, the answer, and the data. A ring over W ranks takes
4 (W - 1) messages of each for an all-reduce and 2 (W - 1) for a gather; a broadcast or a gather on the main
rank W - 1 messages of all together.
"""

from __future__ import annotations

import ctypes
import json
import socket
import struct
import time
from functools import cache
from math import ceil
from pathlib import Path
from statistics import mean

import pytest
from launches import run
from traffic import connections

from pipeline.parallel import theory

ROOT = Path(__file__).parents[2]
CONFIG = f"""
data: {{train: {ROOT}/tests/assets/fashion-mnist-500, size: 28, channels: 1, batch_size: 16, workers: 0}}
G: {{width: 8, norm: none, z_dim: 32}}
D: {{width: 8, norm: none}}
track: {{wandb: false}}
score: {{metrics: []}}
"""
RUN = ("run.name=r", "run.total_kimg=0.48", "run.tick_kimg=9", "run.snapshot_kimg=9", "run.checkpoint_kimg=9")
UPDATES = 20
PARAMETERS = 31_041  # of both players
BPF_RETURN, SO_ATTACH_FILTER, SO_DETACH_FILTER, SENT_AGAIN = 6, 26, 27, 100  # Linux's
WORLDS = [2, 4, *(pytest.param(world, marks=pytest.mark.long) for world in (8, 16))]


def expected(world: int) -> dict[str, float]:
    """Messages per rank, on average, of what is not of the strategy: gathers of objects are two rings (sizes
    and contents), or one and a gather on the main rank; broadcasts of objects are two; polls take log2(W)."""
    others, poll = world - 1, theory.flags(world)[0]
    ring, some = 2 * others, others / world
    return {
        "data": 2 * ring + 4 * some + 3 * poll,  # which machines; index, fingerprint; whether all have them
        # Whether collectives work; sums and files, on the main rank; bad images, written, done.
        "save": 2 * some + 2 * (ring + some) + 3 * poll,
        "end": 2 * ring + 2 * some,  # why it ends; that it has
    }


def reduced(size: int, world: int) -> float:
    """Messages per rank of an all-reduce of so many bytes of float64: gloo cuts it into two pieces for each
    rank, of whole elements, each of which goes round twice."""
    piece = 8 * ceil(size / (2 * world) / 8)
    return ceil(size / piece) * 2 * (world - 1) / world


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """World → what each rank found; a launch each."""

    @cache
    def measure(world: int) -> list:
        out = tmp_path_factory.mktemp(f"world-{world}")
        (out / "config.yaml").write_text(CONFIG)
        module = ["traffic", str(out), str(out / "config.yaml"), f"run.out={out}/runs", *RUN]
        run(f"ddp-{world}", module)
        return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]

    return measure


def of_phase(ranks, phase, kind="peers"):
    """Bytes and messages of a phase, per rank."""
    counts = [rank["phases"][phase][kind] for rank in ranks]
    return mean(count[0] for count in counts), mean(count[1] for count in counts) / 3


def test_what_the_kernel_sends_again_counts_once():
    """A filter drops all that reaches the other end, as a machine does that is too busy to acknowledge."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        here = sender.getsockname()[1]
        drop_all = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, 0))
        program = struct.pack("HL", 1, ctypes.addressof(drop_all))
        receiver.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        sender.sendall(bytes(112))
        while not sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[SENT_AGAIN]:
            time.sleep(0.01)
        receiver.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        assert len(receiver.recv(1000)) == 112
        counts = {port: (sent, segments) for port, _, sent, segments in connections()}
        assert counts[here] == (112, 1)


@pytest.mark.parametrize("world", WORLDS)
def test_phases_are_as_derived(measured, world):
    ranks = measured(world)
    for phase, messages in expected(world).items():
        assert of_phase(ranks, phase)[1] == pytest.approx(messages, rel=0.05), phase
    sent, messages = of_phase(ranks, "tick")
    table = ranks[0]["summed"]
    assert messages == pytest.approx(reduced(table, world), rel=0.05)
    assert sent == pytest.approx(messages * theory.MESSAGE + 2 * table * (world - 1) / world, rel=0.05)


@pytest.mark.parametrize("world", WORLDS)
def test_an_update_sends_gradients_and_flags(measured, world):
    """Each player's gradients are one bucket, so one all-reduce."""
    sent, messages = (value / UPDATES for value in of_phase(measured(world), "updates"))
    flags, bytes_of_flags = theory.flags(world)
    gradients = 2 * 4 * (world - 1)
    assert messages == pytest.approx(gradients + flags, rel=0.05)
    in_theory = theory.sent("ddp", world, PARAMETERS, 0) + gradients * theory.MESSAGE + bytes_of_flags
    assert sent == pytest.approx(in_theory, rel=0.05)


@pytest.mark.parametrize("world", WORLDS)
def test_the_store_hears_little_and_as_much_in_any_world(measured, world):
    ranks, steps = measured(world), theory.flags(world)[0]
    links = 2 * steps - 1  # of a barrier; each adds a segment, a third of a message, at one end
    # Where it is, that it is there, and where those are that it meets in the barrier.
    sent, segments = (mean(rank["phases"]["join"]["store"][i] for rank in ranks) for i in range(2))
    assert segments == pytest.approx(4 + 3 * links, rel=0.05)
    assert sent == pytest.approx(401 + 121 * links, rel=0.05)
    assert of_phase(ranks, "join")[1] == pytest.approx(steps + links / 6, rel=0.05)
    for rank in ranks:
        sent, segments = rank["watch"]
        # Four requests and an answer's receipt; at its start a rank also reads those of its machine, once.
        assert segments / rank["beats"] < 6 + world / 2
        assert sent / rank["beats"] < 600 + 100 * world
        assert rank["phases"]["updates"]["store"] == [0, 0, 0]
