"""Budgets as people write them."""

import pytest

from ditcache.store.sizes import read_size
from ditcache.store.tiered import TieredStore


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (None, None),
        (0, 0),
        ("0", 0),
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 * 2**20),
        ("2GiB", 2**31),
        ("1.5GB", 1_500_000_000),
        ("1.5 gib", 3 * 2**29),
        ("7kB", 7000),
        ("3TiB", 3 * 2**40),
        ("9B", 9),
    ],
)
def test_reads_sizes(written, count):
    assert read_size("gpu", written) == count


@pytest.mark.parametrize("written", ["2 gigs", "-1", -1, "1.5", "", "MiB", "1e9", True, "1,5GB"])
def test_names_the_allowed_forms(written):
    with pytest.raises(ValueError, match=r"cpu: must be bytes or a size such as 512MiB.*, got"):
        read_size("cpu", written)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": 0, "cpu": "0", "disk": 0}, "gpu: at least one of gpu, cpu, disk must not be 0"),
        ({"disk": "20 gigs"}, "disk: must be bytes or a size such as"),
        ({"cpu_codec": "int4"}, "cpu_codec: no 'int4'. Did you mean 'int8'?"),
        ({"cpu": 0, "cpu_codec": "int8"}, "cpu_codec: has no effect without the tier; set cpu"),
        ({"disk": 0, "directory": "/x"}, "directory: has no effect without the disk tier"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError) as error:
        TieredStore(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
