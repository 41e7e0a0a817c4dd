"""What holds for any size, seed and number of hosts: every image once, hosts in step, positions, shards, splits."""

import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_batches import labels, numbered, take
from tests.test_latents import manifest
from utils.data.batches import epoch_batches, training_batches
from utils.data.dataset import hold_out

few = settings(max_examples=30, deadline=None)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def rows(batches) -> list[tuple[int, bytes]]:
    """(label, image) of every row, flips included."""
    return [(int(y), x.tobytes()) for batch in batches for x, y in zip(batch["image"], batch["label"], strict=True)]


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
