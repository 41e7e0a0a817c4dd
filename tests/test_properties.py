"""Properties for any size, seed and number of hosts: every image once, hosts in step, positions, shards, splits."""

import dataclasses
import functools
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tests.data_sets import load
from tests.image_files import encoded
from tests.test_batches import labels, numbered, take
from tests.test_latents import manifest
from utils.data.batches import epoch_batches, training_batches
from utils.data.dataset import hold_out

few = settings(max_examples=30, deadline=None)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def rows(batches) -> list[tuple[int, bytes]]:
    """(label, image) of every row, flips included."""
    return [(int(y), x.tobytes()) for batch in batches for x, y in zip(batch.image, batch.condition, strict=True)]


@few
@given(num_images=sizes, local_size=st.integers(1, 5), num_hosts=st.integers(1, 4), seed=seeds)
def test_hosts_together_are_one_host_and_every_epoch_has_each_image_once(num_images, local_size, num_hosts, seed):
    batch_size = local_size * num_hosts
    count = -(-3 * num_images // batch_size)
    whole = take(training_batches(numbered(num_images), batch_size, seed), count)
    stream = labels(whole)
    for epoch in range(len(stream) // num_images):
        assert sorted(stream[epoch * num_images :][:num_images]) == list(range(1, num_images + 1))
    hosts = [
        take(
            training_batches(numbered(num_images), batch_size, seed, process_index=host, process_count=num_hosts), count
        )
        for host in range(num_hosts)
    ]
    assert rows(part for parts in zip(*hosts, strict=True) for part in parts) == rows(whole)


@few
@given(
    num_images=sizes, batch_size=st.integers(1, 7), seed=seeds, position=st.integers(0, 9), prefetch=st.integers(0, 3)
)
def test_a_stream_goes_on_from_any_position(num_images, batch_size, seed, position, prefetch):
    first = training_batches(numbered(num_images), batch_size, seed, prefetch=prefetch)
    take(first, position)
    state = json.loads(json.dumps(first.get_state()))
    expected = rows(take(first, 5))
    resumed = training_batches(numbered(num_images), batch_size, seed, num_threads=1)
    resumed.set_state(state)
    assert rows(take(resumed, 5)) == expected


@few
@given(num_images=sizes, local_size=st.integers(1, 4), num_hosts=st.integers(1, 4), data=st.data())
def test_a_pass_has_each_image_once_in_order_and_all_hosts_in_step(num_images, local_size, num_hosts, data):
    start = data.draw(st.integers(0, num_images))
    stop = data.draw(st.integers(start, num_images))
    parts = [
        list(
            epoch_batches(
                numbered(num_images),
                local_size * num_hosts,
                start=start,
                stop=stop,
                process_index=host,
                process_count=num_hosts,
            )
        )
        for host in range(num_hosts)
    ]
    seen = []
    for batches in zip(*parts, strict=True):  # equally many
        # Hosts take every num_hosts-th image of a batch.
        interleaved = itertools.zip_longest(*(labels([batch]) for batch in batches))
        seen += [label for row in interleaved for label in row if label is not None]
    assert seen == list(range(start + 1, stop + 1))


@few
@given(num_examples=st.integers(1, 10**6), shard_size=st.integers(1, 10**6))
def test_shards_cover_a_split_in_the_order_of_their_names(num_examples, shard_size):
    shard_size = max(shard_size, num_examples // 1000)
    described = manifest(num_examples={"train": num_examples, "validation": 1}, shard_size=shard_size)
    names, ranges = zip(*described.shards("train"), strict=True)
    assert list(names) == sorted(set(names))
    assert ranges[0].start == 0
    assert all(len(rows) == shard_size for rows in ranges[:-1])
    assert 0 < len(ranges[-1]) <= shard_size
    assert all(a.stop == b.start for a, b in itertools.pairwise(ranges))
    assert ranges[-1].stop == num_examples


@few
@given(keys=st.lists(st.text(max_size=3), unique=True, min_size=2, max_size=30), data=st.data())
def test_what_is_held_out_depends_on_the_names_alone(keys, data):
    count = data.draw(st.integers(1, len(keys) - 1))
    shuffled = data.draw(st.permutations(keys))
    left, out = hold_out(keys, count)
    assert sorted(left + out) == list(range(len(keys)))
    assert len(out) == count
    _, out_of_shuffled = hold_out(shuffled, count)
    assert {keys[row] for row in out} == {shuffled[row] for row in out_of_shuffled}


@functools.cache
def record(number: int) -> bytes:
    """A serialized example labelled `number`, that number left and zeros right in its image, so that a flip shows."""
    tf = pytest.importorskip("tensorflow", reason="TensorFlow, which writes records, is not installed")
    pixel = tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[encoded(np.array([[number, 0]] * 2, np.uint8)).getvalue()])
    )
    label = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
    example = tf.train.Example(features=tf.train.Features(feature={"image": pixel, "label": label}))
    return example.SerializeToString()


def prepare(root: str, file_format: str, shard_lengths: list[int]) -> None:
    """A TFDS data set `shards` with one split, its records numbered from 0 through the shards."""
    tf = pytest.importorskip("tensorflow", reason="TensorFlow, which writes records, is not installed")
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    folder = Path(root) / "shards" / "1.0.0"
    folder.mkdir(parents=True)
    train = {
        "name": "train",
        "shardLengths": list(map(str, shard_lengths)),
        "numBytes": "2000",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "shards", "version": "1.0.0", "fileFormat": file_format, "splits": [train]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    package = "tensorflow_datasets.core.features."
    image = {
        "pythonClassName": f"{package}image_feature.Image",
        "image": {"shape": {"dimensions": ["2", "2", "1"]}, "dtype": "uint8", "encodingFormat": "png"},
    }
    label = {"pythonClassName": f"{package}class_label_feature.ClassLabel", "classLabel": {"numClasses": "64"}}
    features = {
        "pythonClassName": f"{package}features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }
    (folder / "features.json").write_text(json.dumps(features))
    numbers = itertools.count()
    for shard, length in enumerate(shard_lengths):
        path = str(folder / f"shards-train.{file_format}-{shard:05d}-of-{len(shard_lengths):05d}")
        writer = tf.io.TFRecordWriter(path) if file_format == "tfrecord" else ArrayRecordWriter(path, "group_size:1")
        for number in itertools.islice(numbers, length):
            writer.write(record(number))
        writer.close()


shard_lists = st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) >= 5)
positions = st.integers(0, 23)
# Each example builds pipelines of TensorFlow, so that there are few and they are not shrunk.
slow = settings(max_examples=2, deadline=None, phases=(Phase.explicit, Phase.generate))


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@slow
@given(lengths=shard_lists, local_size=st.integers(1, 4), num_hosts=st.integers(1, 3), start=positions, stop=positions)
@example(lengths=[0, 3, 0, 5, 2, 0], local_size=2, num_hosts=2, start=1, stop=7)
def test_any_shards_are_one_split_that_hosts_read_in_step(file_format, lengths, local_size, num_hosts, start, stop):
    num_train = sum(lengths) - 1  # of so few, the first image is held out
    start, stop = min(start, num_train - 1), min(max(start + 1, stop), num_train)
    with tempfile.TemporaryDirectory() as root:
        prepare(root, file_format, lengths)
        train, validation = (load("tfds:shards", split, root) for split in ("train", "validation"))
        assert len(train.source) == num_train
        assert labels(epoch_batches(validation, 3)) == [0]
        batch_size = local_size * num_hosts
        hosts = [
            list(epoch_batches(train, batch_size, start=start, stop=stop, process_index=host, process_count=num_hosts))
            for host in range(num_hosts)
        ]
    read = [sorted(rows(parts)) for parts in zip(*hosts, strict=True)]
    assert list(itertools.chain.from_iterable(read)) == [(i, bytes([i, 0, i, 0])) for i in range(start + 1, stop + 1)]
    assert all(len(batch) == batch_size for batch in read[:-1])


@slow
@given(lengths=shard_lists, local_size=st.integers(1, 3), num_hosts=st.integers(1, 2), seed=seeds, position=positions)
@example(lengths=[0, 3, 0, 5, 2, 0], local_size=2, num_hosts=2, seed=0, position=3)
def test_a_stream_of_any_shards_has_every_image_once_an_epoch_and_goes_on(
    lengths, local_size, num_hosts, seed, position
):
    num_train = sum(lengths) - 1
    batch_size, count = local_size * num_hosts, -(-2 * num_train // local_size)
    position = min(position, count - 1)
    parts = []
    with tempfile.TemporaryDirectory() as root:
        prepare(root, "tfrecord", lengths)
        train = dataclasses.replace(load("tfds:shards", "train", root), random_flip=True)
        for host in range(num_hosts):
            hosts = {"process_index": host, "process_count": num_hosts}
            stopped = training_batches(train, batch_size, seed, **hosts)
            stream = labels(take(stopped, position))
            state = json.loads(json.dumps(stopped.get_state()))
            rest = take(stopped, count - position)
            stream += labels(rest)
            part = sorted(set(stream))
            for epoch in range(len(stream) // len(part)):
                assert sorted(stream[epoch * len(part) :][: len(part)]) == part
            parts.append(part)
        resumed = training_batches(train, batch_size, seed, **hosts)
        resumed.set_state(state)
        assert rows(take(resumed, count - position)) == rows(rest)
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(1, num_train + 1))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
