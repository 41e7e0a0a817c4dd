"""benchmarks/aot.py: what it reads off compiled programs; with libtpu (the extra `aot`), what TPUs would run."""

import collections
import importlib.util
import json
import re
import sys

import pytest

from tests.conftest import ROOT, run_program

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

PROGRAM = """
HloModule jit_train_step

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = bf16[4,8]{1,0:T(8,128)} fusion(%p), metadata={op_name="block_0/mlp"}, config={"estimated_cycles":"100"}
}

%cond.2 (p: (u32[], f32[8])) -> pred[] {
  %constant.1 = u32[] constant(8)
  ROOT %compare.1 = pred[] compare(%i, %constant.1), direction=LT
}

%body.2 (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %send.1 = (f32[262144], f32[262144], u32[]) collective-permute-start(%q), channel_id=1
  %send.2 = (f32[262144], f32[262144], u32[]) collective-permute-start(%q), channel_id=2
  %send.3 = (f32[262144], f32[262144], u32[]) collective-permute-start(%q), channel_id=3
  %send.4 = (f32[262144], f32[262144], u32[]) collective-permute-start(%q), channel_id=4
  %fusion.3 = f32[8]{0} fusion(%q), metadata={op_name="block_0/attention/qkv"}, config={"estimated_cycles":"5"}
}

%all-reduce-scatter.4 (p: f32[1048576]) -> f32[262144] {
  %all-reduce.2 = f32[1048576]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}
  ROOT %slice.1 = f32[262144]{0} dynamic-slice(%all-reduce.2, %i), dynamic_slice_sizes={262144}
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), body=%body.1, config={"known_trip_count":{"n":"3"}}
  %while.2 = (u32[], f32[8]) while(%u), condition=%cond.2, body=%body.2
  %copy.1 = f32[8]{0} copy(%x), config={"estimated_cycles":"7"}
  %all-gather-start.1 = (bf16[2,8], bf16[8,8]{1,0}) all-gather-start(%y), dimensions={0}
  %all-gather-done.1 = bf16[8,8]{1,0} all-gather-done(%all-gather-start.1)
  %all-reduce.1 = (f32[16]{0}, f32[2,8]{1,0}) all-reduce(%a, %b), to_apply=%add
  ROOT %fusion.2 = f32[8]{0} fusion(%z), metadata={op_name="optimizer/add"}, config={"estimated_cycles":"11"}
}
"""


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import aot

    yield aot
    for name in ("aot", "common", "hlo"):
        del sys.modules[name]


@pytest.fixture
def hlo(aot):
    return aot.hlo


def test_cycles_loops_and_collectives_are_read(hlo):
    operations = list(hlo.read_operations(PROGRAM))
    cycles = {hlo.part_of(o): o.cycles * o.times for o in operations if o.cycles}
    assert cycles == {"MLP": 300, "layout copies": 7, "optimizer, EMA, norms": 11, "attention, qkv and out": 20}
    assert hlo.list_collectives(operations) == [
        "1 all-gather of bf16, 0 MiB a device, overlapped",
        "1 all-reduce of f32, 0 MiB a device, synchronous",
        "16 collective-permute of f32, 16 MiB a device, overlapped",
        "1 reduce-scatter of f32 over 4, 4 MiB a device, synchronous",
    ]
    assert hlo.count_bytes("(f32[16]{0}, f32[2,8]{1,0})") == 128
    assert hlo.count_bytes("bf16[64,256,768]{2,1,0:T(8,128)(2,1)S(1)}") == 2 * 64 * 256 * 768


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("replica_groups=[16,4]<=[64], to_apply=%add", 4),
        ("replica_groups=mesh['a'=16,'b'=4] {'a','b'}, to_apply=%add", 64),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=16], device_ids=([16,4]T(1,0)) {'c'}, to_apply=%add", 16),
        ("to_apply=%add", 0),
    ],
)
def test_the_devices_of_a_collective_are_counted(hlo, groups, expected):
    assert hlo.count_group(f"  %r = f32[8] all-reduce(%p), channel_id=1, {groups}") == expected


OF_A_GPU = """
HloModule jit_train_step

%dot.computation (p: bf16[64,32], q: bf16[32,16]) -> bf16[64,16] {
  %p = bf16[64,32]{1,0} parameter(0)
  %q = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.1 (x: bf16[64,32], w: bf16[32,16]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %gemm.1 = bf16[64,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%dot.computation, metadata={op_name="block_0/mlp"}
  %heads.1 = bf16[2,8,2,32]{3,2,1,0} bitcast(%gemm.1)
  %fmha.1 = (bf16[2,2,8,32]{3,1,2,0}, u8[0]{0}) custom-call(%heads.1, %heads.1, %heads.1), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="block_0/attention"}
  ROOT %copy.1 = bf16[64,16]{1,0} copy(%gemm.1)
}
"""


def test_flops_and_bytes_of_a_gpu_are_counted_once(hlo):
    found = {hlo.part_of(o): (o.flops, o.traffic) for o in hlo.read_operations(OF_A_GPU) if o.flops or o.traffic}
    heads = 2 * 2 * 8 * 2 * 32  # bytes
    assert found == {
        "MLP": (2 * 64 * 32 * 16, 2 * (64 * 32 + 32 * 16 + 64 * 16)),
        "attention, core": (2 * 2 * 2 * 2 * 8 * 8 * 32, 4 * heads),  # two matmuls, two images, two heads
        "layout copies": (0, 2 * 2 * 64 * 16),
    }


def compile_program(tmp_path, *args):
    """(figures, text of the program) of benchmarks/aot.py."""
    paths = ["--json", tmp_path / "figures.json", "--hlo", tmp_path / "program.txt"]
    done = run_program("benchmarks/aot.py", *args, *paths)
    assert "never run" in done.stdout
    return json.loads((tmp_path / "figures.json").read_text()), (tmp_path / "program.txt").read_text()


@needs_libtpu
def test_no_weights_are_written_by_the_kernel(tmp_path):
    words = ["--topology", "v5e:2x2", "--model", "debug", "--batch", 8]
    weights = r"f32\[\d+,\d+,256,256\]"  # images, heads, tokens, tokens
    figures, text = compile_program(tmp_path, *words)
    assert not re.search(weights, text)
    assert 0 < figures["estimated MFU"] < 1
    _, text = compile_program(tmp_path, *words, "--attention", "xla")
    assert re.search(weights, text)


def sizes_of_collectives(figures) -> dict[str, float]:
    """{kind and dtype: MiB a device}."""
    sizes = collections.Counter()
    for line in figures["collectives"]:
        name, size = re.match(r"[\d,]+ (\S+ of \S+?)(?: over \d+)?, ([\d,]+) MiB", line).groups()
        sizes[name] += int(size.replace(",", ""))
    return sizes


@needs_libtpu
def test_parameters_are_gathered_in_the_compute_dtype_and_gradients_are_scattered(tmp_path):
    words = ["--topology", "v5e:4x4", "--model", "S", "--patch_size", 8, "--batch", 64]
    dp, hybrid = (
        sizes_of_collectives(compile_program(tmp_path, *words, "--sharding", *mode.split())[0])
        for mode in ("dp", "hybrid --num_shards 4")
    )
    parameters = 4 * 33e6 / 2**20  # in float32
    assert dp["all-reduce of f32"] > 0.9 * parameters
    assert hybrid["all-gather of bf16"] > 0.4 * parameters  # half the bytes
    assert hybrid["reduce-scatter of f32"] > 0.1 * parameters  # the rest in loops that multiply
    assert hybrid["all-reduce of f32"] < 0.3 * parameters  # of the quarters, over replicas


@needs_libtpu
@pytest.mark.slow
def test_memory_of_a_step_stays_within_its_bound(tmp_path):
    figures, _ = compile_program(tmp_path, "--topology", "v5e:2x2", "--model", "B", "--batch", 256)
    assert figures["GiB a device"] < 5.6
    assert figures["estimated MFU"] > 0.48


def test_without_libtpu_one_line_says_what_to_install():
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    done = run_program("benchmarks/aot.py", "--topology", "v5e:2x2", check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "make setup EXTRAS=aot" in line
