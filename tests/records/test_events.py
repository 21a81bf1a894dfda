"""TensorBoard event files are read back by readers that share no code with the writer."""

import math
import struct

import numpy as np
import pytest

from qtjax.records.events import EventFile, event, tag


def crc32c_bitwise(data: bytes) -> int:
    """RFC 3720's CRC, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c_bitwise(data)
    return (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF


def records(data: bytes):
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        body, data = data[12 : 12 + length], data[12 + length :]
        assert len(body) == length and struct.unpack("<I", data[:4])[0] == masked(body)
        data = data[4:]
        yield body


def test_crc_reference():
    """The reference CRC of this test gives the published check value."""
    assert crc32c_bitwise(b"123456789") == 0xE3069283


def test_protocol_buffers_agree(tmp_path):
    """tensorboardX's generated protocol buffers read the same steps, tags and numbers that were written."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    rows = [
        {"step": 1, "time": 5.5, "loss": 2.5, "kept_q2": 3},
        {"step": 2, "time": 6.5, "loss": 1.25, "level": math.nan},
    ]
    file = EventFile(tmp_path / "tb", rows)
    file.append(300, {"loss": np.float32(0.5), "grad_norm": 1e300, "samples": 128, "spearman": None}, 7.25)
    file.close()
    bodies = list(records(file.path.read_bytes()))
    events = [event_pb2.Event.FromString(body) for body in bodies]
    assert events[0].file_version == "brain.Event:2"
    assert [e.step for e in events[1:]] == [1, 2, 300]
    assert [e.wall_time for e in events[1:]] == [5.5, 6.5, 7.25]
    values = [{v.tag: v.simple_value for v in e.summary.value} for e in events[1:]]
    assert values[0] == {"train/loss": 2.5, "kept/q2": 3.0}
    assert values[1] == {"train/loss": 1.25}, "NaN means not measured and is left out"
    assert values[2] == {"train/loss": 0.5, "train/grad_norm": math.inf, "train/samples": 128.0}


def test_tensorboards_own_reader_agrees(tmp_path):
    """TensorBoard's loader, where it is installed, yields each step once."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    file = EventFile(tmp_path / "tb", [{"step": 1, "time": 1.0, "loss": 2.0}])
    file.append(2, {"loss": 1.0}, 2.0)
    file.close()
    events = list(loader.LegacyEventFileLoader(str(file.path)).Load())
    assert [(e.step, [v.simple_value for v in e.summary.value]) for e in events[1:]] == [(1, [2.0]), (2, [1.0])]


def test_a_new_file_replaces_the_old_ones(tmp_path):
    """However often and however quickly a run starts, one event file remains, under a later name."""
    names = []
    for _ in range(4):
        file = EventFile(tmp_path, [{"step": 1, "loss": 1.0}])
        file.close()
        names.append(file.path.name)
        assert [p.name for p in tmp_path.iterdir()] == [file.path.name]
    assert names == sorted(set(names))


def test_tags_are_grouped():
    """Metrics that belong together share a group; texts and time are not drawn."""
    assert [tag(n) for n in ("loss", "seconds_score", "kept_samples", "supplement", "supplement_median_q1")] == [
        "train/loss",
        "seconds/score",
        "kept/samples",
        "train/supplement",
        "supplement/median_q1",
    ]
    assert event(1, {"time": 1.0, "note": "x"}, 0.0) == event(1, {}, 0.0)
