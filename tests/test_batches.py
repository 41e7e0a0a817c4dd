"""Every image once, in an order that its position determines; every kind of image file; errors that say the fix."""

import itertools
import json
import threading

import jax
import numpy as np
import pytest

from tests.data_sets import load
from utils.base.messages import UserError
from utils.conditions.classes import IMAGENET_LABELS
from utils.data.batches import epoch_batches, first_examples, read_ahead, training_batches
from utils.data.dataset import ImageDataset, array_dataset, iterable_dataset, split_rows
from utils.data.fingerprint import Fingerprint
from utils.data.loaders import LOADERS, Loader

NOTHING_KNOWN = Fingerprint("arrays", 0, "")


def numbered(num_images: int, random_flip: bool = True) -> ImageDataset:
    """Images labelled by their number, that number left and a zero right, so that a flip shows."""
    source = [{"image": np.array([[[i], [0]]], np.uint8), "label": np.int32(i)} for i in range(1, num_images + 1)]
    names = tuple(map(str, range(num_images + 1)))
    return ImageDataset("numbered", "train", source, (1, 2, 1), names, random_flip, NOTHING_KNOWN)


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def labels(batches) -> list[int]:
    return [int(label) for batch in batches for label in batch.condition]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.condition, b.condition)


def test_batches_have_the_promised_types():
    batch = next(training_batches(numbered(10), 4, 0))
    assert batch.image.shape == (4, 1, 2, 1)
    assert batch.image.dtype == np.uint8
    assert batch.condition.shape == (4,)
    assert batch.condition.dtype == np.int32


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_is_a_new_order_of_every_image_once(num_images, batch_size):
    num_epochs = 8
    stream = labels(take(training_batches(numbered(num_images), batch_size, 0), num_epochs * num_images // batch_size))
    epochs = [stream[i : i + num_images] for i in range(0, num_images * num_epochs, num_images)]
    assert all(sorted(epoch) == list(range(1, num_images + 1)) for epoch in epochs)
    if num_images > 5:
        assert len({tuple(epoch) for epoch in epochs}) == num_epochs


def test_the_first_batch_is_read_ahead_and_errors_come_where_they_belong():
    read = threading.Event()

    def batches():
        read.set()
        yield 1
        yield 2
        raise ValueError("broken")

    stream = read_ahead(batches())
    assert read.wait(10)  # though nobody has asked
    assert (next(stream), next(stream)) == (1, 2)
    with pytest.raises(ValueError, match="broken"):
        next(stream)
    with pytest.raises(ZeroDivisionError):
        next(read_ahead(1 // x for x in (0, 1)))


def test_orders_are_uniform():
    """Each image is equally often at each place: chi-squared within five standard deviations of its mean."""
    stream = np.reshape(labels(take(training_batches(numbered(10), 100, 0), 400)), (-1, 10)) - 1
    counts = np.array([np.bincount(place, minlength=10) for place in stream.T])
    expected = len(stream) / 10
    assert abs(((counts - expected) ** 2 / expected).sum() - 81) < 5 * np.sqrt(2 * 81)


def test_seeds_share_no_epoch():
    """Not even shifted by one, as they would if epoch e of seed s were epoch 0 of seed s + e."""
    epochs = {
        tuple(epoch)
        for seed in range(4)
        for epoch in np.reshape(labels(take(training_batches(numbered(20), 20, seed), 4)), (4, 20))
    }
    assert len(epochs) == 16


def test_the_same_seed_is_the_same_stream_on_any_number_of_threads():
    streams = [
        take(training_batches(numbered(9), 4, 5, num_threads=threads, prefetch=ahead), 20)
        for threads, ahead in [(1, 0), (3, 1), (8, 5)]
    ]
    assert_same(streams[0], streams[1])
    assert_same(streams[0], streams[2])


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_hosts_share_out_each_global_batch(num_hosts):
    whole = take(training_batches(numbered(10), 6, 0), 15)
    parts = [
        take(training_batches(numbered(10), 6, 0, process_index=host, process_count=num_hosts), 15)
        for host in range(num_hosts)
    ]
    for host, part in enumerate(parts):  # flips too are those of one host alone
        rows_of_host = slice(host * 6 // num_hosts, (host + 1) * 6 // num_hosts)
        assert_same(part, jax.tree.map(lambda rows, of_host=rows_of_host: rows[of_host], whole))


@pytest.mark.parametrize("position", [0, 1, 7])
def test_resumes_exactly_on_any_number_of_hosts(position):
    uninterrupted = take(training_batches(numbered(10), 6, 3), position + 9)
    batches = training_batches(numbered(10), 6, 3)
    take(batches, position)
    state = json.loads(json.dumps(batches.get_state()))
    take(batches, 2)
    batches.set_state(state)  # back, in the same stream
    assert_same(take(batches, 9), uninterrupted[position:])
    host = training_batches(numbered(10), 6, 3, process_index=1, process_count=2)
    host.set_state(state)
    halves = [jax.tree.map(lambda rows: rows[3:], batch) for batch in uninterrupted[position:]]
    assert_same(take(host, 9), halves)


def test_flips_half_of_the_images_anew_each_epoch():
    stream = take(training_batches(numbered(200), 200, 0), 20)
    flipped = np.array([batch.image[np.argsort(batch.condition), 0, 0, 0] == 0 for batch in stream])
    assert abs(flipped.mean() - 0.5) < 0.04  # five standard deviations of a fair coin
    assert all(0 < fraction < 1 for fraction in flipped.mean(axis=0))
    unflipped = labels(take(training_batches(numbered(200, random_flip=False), 200, 0), 20))
    assert unflipped == labels(stream)
    assert all(batch.image[0, 0, 0, 0] for batch in take(training_batches(numbered(9, random_flip=False), 4, 0), 9))


@pytest.mark.parametrize(("batch_size", "num_hosts"), [(4, 1), (4, 2), (6, 3), (20, 2), (5, 1), (2, 2)])
def test_an_epoch_is_every_image_once_in_order_and_in_step(batch_size, num_hosts):
    hosts = [
        list(epoch_batches(numbered(13), batch_size, process_index=host, process_count=num_hosts))
        for host in range(num_hosts)
    ]
    assert {len(batches) for batches in hosts} == {-(-13 // batch_size)}
    rows = [sorted(labels(batches)) for batches in zip(*hosts, strict=True)]
    assert list(itertools.chain.from_iterable(rows)) == list(range(1, 14))
    assert all(len(global_batch) == batch_size for global_batch in rows[:-1])
    assert all(batch.image[:, 0, 0, 0].all() for batches in hosts for batch in batches)


def test_first_examples_are_one_batch_for_ever():
    batches = take(training_batches(first_examples(numbered(10), 4), 4, 0), 5)
    assert [sorted(labels([batch])) for batch in batches] == [[1, 2, 3, 4]] * 5
    assert all(batch.image[:, 0, 0, 0].all() for batch in batches)
    assert len(first_examples(numbered(3), 4).source) == 3


def test_what_a_reading_thread_raises_reaches_the_consumer():
    class Broken(list):
        def __getitem__(self, index):
            raise UserError("image 3 is broken")

    dataset = ImageDataset("broken", "train", Broken([None] * 5), (1, 1, 1), ("a",), False, NOTHING_KNOWN)
    with pytest.raises(UserError, match="image 3"):
        next(training_batches(dataset, 4, 0))
    with pytest.raises(UserError, match="image 3"):
        list(epoch_batches(dataset, 4))


def test_refuses_batches_that_do_not_divide():
    with pytest.raises(UserError, match=r"--batch_size=6 .*multiple of 4"):
        training_batches(numbered(9), 6, 0, process_count=4)
    with pytest.raises(UserError, match=r"--batch_size=6 .*multiple of 4"):
        epoch_batches(numbered(9), 6, process_count=4)
    with pytest.raises(UserError, match="--batch_size=0"):
        training_batches(numbered(9), 0, 0)
    with pytest.raises(UserError, match="--seed=-1"):
        training_batches(numbered(9), 4, -1)


def test_digits_are_the_real_ones_split_once():
    from sklearn.datasets import load_digits

    real = load_digits()
    levels = np.rint(real.images / 16 * 255).astype(np.uint8)
    expected = sorted((image.tobytes(), label) for image, label in zip(levels, real.target.tolist(), strict=True))
    splits = [load("digits", split) for split in ("train", "validation")]
    assert [len(dataset.source) for dataset in splits] == [1500, 297]
    examples = [dataset.source[i] for dataset in splits for i in range(len(dataset.source))]
    found = sorted((example["image"].tobytes(), int(example["label"])) for example in examples)
    assert found == expected  # all of them, hence none in both
    for dataset in splits:
        batch = next(epoch_batches(dataset, 2000))
        assert batch.image.shape[1:] == dataset.image_shape == (8, 8, 1)
        assert (batch.image.min(), batch.image.max()) == (0, 255)
        assert np.bincount(batch.condition).min() > 0.07 * len(batch.condition)
        assert dataset.class_names == tuple("0123456789")
        assert dataset.num_classes == 10
        assert not dataset.random_flip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imgenet256", "did you mean imagenet256?"),
        ("celebahq", "did you mean celebahq256?"),
        ("my_imagenet256_copy", "folder:PATH, zip:FILE, .*npz:FILE, tfds:NAME, latents:DIR"),  # not by part of a name
        ("folder:", "folder:PATH"),
        ("s3:bucket", "folder:PATH"),
        ("", "folder:PATH"),
    ],
)
def test_unknown_names_list_the_known_ones(name, message):
    with pytest.raises(UserError, match=f"--dataset_name={name} is unknown.*{message}") as error:
        load(name)
    assert "digits" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bare_path_is_guessed_to_be_a_folder(tmp_path):
    with pytest.raises(UserError, match=f"did you mean folder:{tmp_path}?"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "size"), [("digits", 16), ("imagenet256", 128), ("imagenet128", 256), ("celebahq256", 64)]
)
def test_sizes_that_a_name_fixes_are_not_overridden(name, size):
    with pytest.raises(UserError, match=f"--image_size={size}.*leave it out"):
        load(name, image_size=size)


IMAGES = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4, 1)
LABELS = np.array([0, 2, 1, 2, 1])


def test_arrays_and_iterables_are_the_same_data_set():
    examples = [{"image": image, "label": label} for image, label in zip(IMAGES, LABELS.tolist(), strict=True)]
    of_arrays = array_dataset("mine", IMAGES, LABELS)
    of_iterable = iterable_dataset("mine", iter(examples))
    for dataset in (of_arrays, of_iterable):
        assert dataset.image_shape == (4, 4, 1)
        assert dataset.class_names == ("0", "1", "2")
        (batch,) = epoch_batches(dataset, 5)
        np.testing.assert_array_equal(batch.image, IMAGES)
        np.testing.assert_array_equal(batch.condition, LABELS)
    # A view in another memory order is the same data; one image or label changed is not.
    reordered = array_dataset("mine", np.asfortranarray(IMAGES), LABELS.astype(np.uint8))
    others = [array_dataset("mine", IMAGES ^ 1, LABELS), array_dataset("mine", IMAGES, LABELS[::-1])]
    assert of_arrays.fingerprint == of_iterable.fingerprint == reordered.fingerprint
    assert of_arrays.fingerprint not in [other.fingerprint for other in others]


def test_arrays_flip_in_training_alone():
    splits = [array_dataset("mine", IMAGES, LABELS, split=split, random_flip=True) for split in ("train", "validation")]
    assert [dataset.random_flip for dataset in splits] == [True, False]


def test_rows_are_split_once_and_for_all():
    splits = [split_rows(200, split) for split in ("train", "validation")]
    assert [len(rows) for rows in splits] == [196, 4]
    assert sorted(itertools.chain(*splits)) == list(range(200))
    assert splits[1] == [51, 55, 152, 178]  # those of earlier runs, which are resumed
    assert len(split_rows(200, "validation", 50)) == 50


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (IMAGES / 255, LABELS, None, r"images must be uint8 \(n, h, w, c\).*not float64 \(5, 4, 4, 1\)"),
        (IMAGES[:0], LABELS[:0], None, r"not uint8 \(0, 4, 4, 1\)"),
        (IMAGES, LABELS[:3], None, r"labels must be integers \(5,\).*not int64 \(3,\)"),
        (IMAGES, LABELS / 1, None, r"not float64 \(5,\)"),
        (IMAGES, LABELS - 1, None, r"labels are -1 to 1, but must be 0 to 1"),
        (IMAGES, LABELS, ["cat", "dog"], r"labels are 0 to 2, but must be 0 to 1"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_refused(images, labels, names, message):
    with pytest.raises(UserError, match=f"mine: .*{message}"):
        array_dataset("mine", images, labels, names)


def test_iterables_of_several_shapes_or_nothing_are_refused():
    examples = [{"image": IMAGES[0], "label": 0}, {"image": IMAGES[0, :2], "label": 1}]
    with pytest.raises(UserError, match=r"one shape are needed; there are \(2, 4, 1\), \(4, 4, 1\)"):
        iterable_dataset("mine", examples)
    with pytest.raises(UserError, match="there are none"):
        iterable_dataset("mine", [])


def test_a_registered_loader_need_not_know_the_image_size(monkeypatch):
    loader = Loader(lambda name, split, options: array_dataset(name, IMAGES, LABELS))
    monkeypatch.setitem(LOADERS, "mine", loader)
    assert load("mine", image_size=4).image_shape == (4, 4, 1)
    with pytest.raises(UserError, match="--image_size=8: the images of mine are 4x4; leave it out"):
        load("mine", image_size=8)


def test_unknown_splits_are_refused():
    with pytest.raises(UserError, match="--split=test"):
        load("digits", "test")


def test_imagenet_has_a_thousand_readable_class_names():
    names = IMAGENET_LABELS.read_text().splitlines()
    assert len(names) == len(set(names)) == 1000
    # Well-known places in ILSVRC order.
    assert [names[i] for i in (0, 1, 207, 817, 999)] == [
        "tench",
        "goldfish",
        "golden retriever",
        "sports car",
        "toilet tissue",
    ]
