"""Quantised weights have the bits of bitsandbytes, and its layers are read without a copy."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.weight_bits import FOUR_BIT, TINY, bits, gaussian

from lora_kernels.quant import encode, tables
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import BLOCKSIZES, DTYPES, quantize_weight


@pytest.fixture
def bnb():
    # Where bitsandbytes lacks native code, it uses torch.compile.
    with torch.compiler.set_stance("force_eager"):
        yield pytest.importorskip("bitsandbytes")


def agree(w, format, bnb, blocksize=64, double_quant=False):
    """Assert that codes, scales and dequantised weight are those of bitsandbytes, bit for bit."""
    N, K = w.shape
    theirs, state = bnb.functional.quantize_4bit(
        w.clone(), blocksize=blocksize, quant_type=format, compress_statistics=double_quant
    )
    q = quantize_weight(w, format, blocksize=blocksize, double_quant=double_quant).check()
    assert torch.equal(q.codes.view(-1), theirs.view(-1))
    assert torch.equal(bits(q.scales), bits(state.absmax))
    if double_quant:
        for mine, other in zip(q.nested, (state.state2.code, state.state2.absmax, state.offset), strict=True):
            assert torch.equal(bits(mine), bits(other))
    if blocksize > K:
        state.shape = (1, N * K)  # the AVX512 code of bitsandbytes reads the wrong absmax where several rows share one
    for dtype in DTYPES:
        state.dtype = dtype
        w_hat, expected = q.dequantize(dtype), bnb.functional.dequantize_4bit(theirs, state).view(N, K)
        if dtype == torch.bfloat16:  # the AVX512 code of bitsandbytes makes denormal bf16 zero, and ours does not
            w_hat, expected = (torch.where(t.abs() < TINY, 0, t) for t in (w_hat, expected))
        assert w_hat.dtype == dtype and torch.equal(bits(w_hat + 0.0), bits(expected + 0.0))  # -0 is 0
    return q


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("format", FOUR_BIT)
def test_every_blocksize_gives_the_bits_of_bitsandbytes(format, blocksize, double_quant, bnb):
    agree(gaussian(64, 256), format, bnb, blocksize, double_quant)
    agree(gaussian(130, 514), format, bnb, blocksize, double_quant)  # blocks straddle rows, and the last one is short


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FOUR_BIT)
def test_every_dtype_shape_and_magnitude_gives_its_bits(format, dtype, bnb):
    for N, K in ((1, 4), (3, 50), (7, 130), (5, 64), (33, 66)):
        for magnitude in (1, 1e-6, 1e3, 1e-39, 1e37):
            w = gaussian(N, K, dtype, magnitude)
            if w.isfinite().all():
                agree(w, format, bnb)
                agree(w.t().contiguous().t(), format, bnb, double_quant=magnitude < 1e37)


@pytest.mark.parametrize("scale", [1.0, 0.75, 1e-3, 3.0, 1e-38, 1e-41, 3e38])
@pytest.mark.parametrize("format", FOUR_BIT)
def test_ties_zeros_and_denormals_give_its_bits(format, scale, bnb):
    levels = tables.levels(format, torch.device("cpu")).sort().values
    middle = (levels[:-1] + levels[1:]) / 2
    inf = torch.tensor(math.inf)
    edge = torch.cat([middle, middle.nextafter(inf), middle.nextafter(-inf), levels, -middle])
    edge = torch.cat([edge, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e-8, -1e-8])])
    blocks = [torch.cat([part, part.new_zeros(63 - len(part)), torch.ones(1)]) for part in edge.split(63)]
    zeros = torch.zeros(64)
    w = torch.stack([*blocks, zeros, -zeros, torch.full((64,), 1e-45), *(-block for block in blocks)]) * scale
    agree(w, format, bnb)
    agree(w[:, :62], format, bnb, double_quant=scale < 3e38)
    agree(w[:3, :50], format, bnb, 32)  # the last, short block of 22 is divided, not multiplied by a reciprocal


@pytest.mark.parametrize("format", FOUR_BIT)
def test_ties_at_any_absmax_give_its_bits(format, bnb):
    """Next to a tie, dividing by absmax and multiplying by its reciprocal give different codes."""
    levels = tables.levels(format, torch.device("cpu")).sort().values
    middle = (levels[:-1] + levels[1:]) / 2
    for _ in range(20):
        absmax = torch.rand(100, 1) + 0.5
        block = torch.cat([absmax, middle.repeat(2) * absmax, -middle * absmax, middle.repeat(2) * absmax], dim=1)
        agree(block[:, :64], format, bnb)
        agree(block[:1, :50], format, bnb)


@pytest.mark.parametrize("format", FOUR_BIT)
def test_a_short_last_block_of_zeros_gives_its_bits(format, bnb):
    agree(torch.zeros(3, 50), format, bnb)
    agree(torch.zeros(64, 64), format, bnb, double_quant=True)


def test_double_quantisation_gives_its_bits_at_the_midpoints_of_its_table(bnb):
    """Values of absmax lie at and next to the points where the code changes, by bitsandbytes' look-up and by the
    table."""
    table = tables.dynamic(torch.device("cpu"))
    middle = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(torch.arange(65536) * 2 / 65535 - 1, middle)
    change = ((codes.diff().nonzero()[:, 0] + 0.5) * 2 / 65535 - 1).float()
    inf = torch.tensor(math.inf)
    below = [middle.nextafter(-inf), change.nextafter(-inf)]
    v = torch.cat(
        [middle, middle.nextafter(inf), change, change.nextafter(inf), *below, below[1].nextafter(-inf), table]
    )
    v = torch.cat([torch.cat([part, torch.ones(1)]) for part in v.split(255)])
    v = torch.cat([v, torch.zeros(-len(v) % 256), torch.zeros(256), torch.full((256,), 1e-45), torch.randn(1000)])
    absmax = v.clone()
    absmax -= absmax.mean()  # so that the mean, which the function subtracts, is nearly zero
    mine, _, most, offset = encode.absmax8(absmax)
    codes, state = bnb.functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(mine, codes) and torch.equal(most, state.absmax) and torch.equal(offset, absmax.mean())
    blocks = v[: len(v) // 256 * 256].view(-1, 256)
    blocks = blocks[blocks.abs().amax(1) == 1]
    codes, _ = bnb.functional.quantize_blockwise(blocks, blocksize=256)
    assert len(blocks) > 6 and torch.equal(tables.nearest8(blocks), codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_gives_its_bits(dtype, bnb):
    for N, K in ((1, 1), (3, 51), (64, 256), (130, 514)):
        for magnitude in (1, 1e-6, 1e3):
            w = gaussian(N, K, dtype, magnitude)
            w[0] = torch.arange(K) - K / 2  # ties
            codes, absmax, _ = bnb.functional.int8_vectorwise_quant(w.clone())
            q = quantize_weight(w, "int8").check()
            assert torch.equal(q.codes, codes) and torch.equal(bits(q.scales), bits(absmax))
            expected = bnb.functional.int8_vectorwise_dequant(codes, absmax)
            for out in DTYPES:
                assert torch.equal(bits(q.dequantize(out)), bits(expected.to(out)))


def test_the_tables_are_those_of_bitsandbytes(bnb):
    cpu = torch.device("cpu")
    for format in FOUR_BIT:
        expected = bnb.functional.get_4bit_type(format, device="cpu")
        assert torch.equal(bits(tables.levels(format, cpu)), bits(expected))
    assert torch.equal(bits(tables.dynamic(cpu)), bits(bnb.functional.create_dynamic_map()))


def test_the_blocksizes_are_those_of_bitsandbytes(bnb):
    taken = []
    for blocksize in (2**i for i in range(16)):
        try:
            bnb.functional.quantize_4bit(torch.ones(64, 64), blocksize=blocksize)
        except (ValueError, RuntimeError):
            continue
        taken.append(blocksize)
    assert tuple(taken) == BLOCKSIZES


# --- the layers of bitsandbytes ---


def linear4bit(bnb, N=96, K=256, dtype=torch.float32, **settings):
    layer = bnb.nn.Linear4bit(K, N, bias=False, **settings)
    return layer.to(dtype).to("cpu")


def same_memory(t, other):
    return t.data_ptr() == other.data_ptr() and t.nbytes == other.nbytes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FOUR_BIT)
def test_a_linear4bit_is_read_without_a_copy(format, storage, double_quant, bnb):
    layer = linear4bit(
        bnb, dtype=torch.bfloat16, quant_type=format, compress_statistics=double_quant, quant_storage=storage
    )
    state = layer.weight.quant_state
    expected = bnb.functional.dequantize_4bit(layer.weight.data, state)
    for source in (layer, layer.weight, copy.deepcopy(layer)):
        q = from_bnb(source)
        assert (q.format, q.shape, q.dtype, q.blocksize) == (format, (96, 256), torch.bfloat16, 64)
        assert torch.equal(q.dequantize(), expected) and (q.nested is not None) == double_quant
        assert all(type(tensor) is torch.Tensor for tensor in q.tensors)
    q = from_bnb(layer, torch.float32)
    assert q.dequantize().dtype == torch.float32
    assert same_memory(q.codes, layer.weight.data) and same_memory(q.scales, state.absmax)
    if double_quant:
        assert same_memory(q.nested.absmax, state.state2.absmax) and same_memory(q.nested.table, state.state2.code)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_from_a_checkpoint_of_bitsandbytes_is_read(double_quant, bnb):
    layer = linear4bit(bnb, quant_type="nf4", compress_statistics=double_quant)
    stats = {key[7:]: value for key, value in layer.state_dict().items() if key.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(layer.weight.data, stats, device="cpu")
    assert torch.equal(from_bnb(weight).dequantize(), from_bnb(layer).dequantize())


def test_a_weight_without_its_state_is_read_with_the_modules(bnb):
    layer = linear4bit(bnb)
    expected = from_bnb(layer).dequantize()
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(from_bnb(layer).dequantize(), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FOUR_BIT)
def test_the_codes_of_a_weight_repacked_for_inference_are_put_back_in_order(format, double_quant, bnb):
    """absmax stays rounded to bf16, since bitsandbytes has kept no other."""
    repack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if repack is None:
        pytest.skip("this bitsandbytes does not re-pack")
    layer = linear4bit(bnb, quant_type=format, compress_statistics=double_quant)
    before = from_bnb(layer)
    codes, absmax = before.codes.clone(), before.absmax()
    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    q = from_bnb(layer)
    assert not torch.equal(layer.weight.data, codes) and torch.equal(q.codes, codes) and q.dtype == torch.float32
    assert torch.equal(q.scales, absmax.bfloat16().float()) and q.nested is None
    if not double_quant:
        layer.state_dict()
        with pytest.raises(ValueError, match=r"absmax torch.bfloat16 \(4, 96\): .*Load the weight again"):
            from_bnb(layer)


def test_a_weight_is_read_after_a_forward_in_eval_mode(bnb):
    layer = linear4bit(bnb, quant_type="nf4").eval()
    before = from_bnb(layer)
    codes, absmax = before.codes.clone(), before.absmax()
    layer(torch.randn(2, 256))
    q = from_bnb(layer)
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.absmax(), absmax, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear8bitlt_is_read_without_a_copy(dtype, bnb):
    layer = bnb.nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False).to(dtype)
    w = layer.weight.data.clone()
    layer = layer.to("cpu")
    expected = quantize_weight(w.half(), "int8")
    q = from_bnb(layer)
    assert torch.equal(q.codes, expected.codes) and torch.equal(q.scales, expected.scales) and q.dtype == torch.float16
    assert same_memory(q.codes, layer.weight.data) and same_memory(q.scales, layer.weight.SCB)
    assert torch.equal(from_bnb(layer.weight, torch.float32).dequantize(), expected.dequantize(torch.float32))
    weight = layer.weight
    layer(torch.randn(2, 128).to(dtype))
    assert weight.SCB is None and torch.equal(from_bnb(layer).dequantize(), expected.dequantize())
    with pytest.raises(ValueError, match=r"no SCB.*Give the module"):
        from_bnb(weight)


def test_from_bnb_refuses_what_it_cannot_read(bnb):
    def broken(**changes):
        layer = linear4bit(bnb, quant_type="nf4")
        for name, value in changes.items():
            setattr(layer.weight.quant_state, name, value)
        return layer

    second = copy.copy(linear4bit(bnb).weight.quant_state.state2)
    second.blocksize = 128
    cases = [
        (bnb.nn.Linear4bit(64, 8), ValueError, "not quantised yet.*float32.*no quant_state.*Move it"),
        (bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False), ValueError, "not quantised yet.*has_fp16_weights=False"),
        (bnb.nn.Linear8bitLt(64, 8).to("cpu"), ValueError, "not quantised yet"),
        (torch.nn.Linear(64, 8), TypeError, "got Linear with a Parameter: quantize_weight"),
        (torch.ones(3), TypeError, "got Tensor"),
        (broken(shape=torch.Size((256, 96))), ValueError, r"quantised as \(256, 96\).*is \[96, 256\]"),
        (broken(shape=torch.Size((24576,))), ValueError, r"quantised as \(24576,\)"),
        (broken(shape=torch.Size((128, 256))), ValueError, r"12288 bytes .*\[128, 256\].* 16384"),
        (broken(shape=torch.Size((8192, 3))), ValueError, r"odd in \(8192, 3\)"),
        (broken(state2=second), ValueError, "fp32 in blocks of 256, got torch.float32 in blocks of 128"),
        (broken(code=torch.linspace(-1, 1, 16)), ValueError, "table of its own, not that of nf4.*Dequantise"),
        (broken(quant_type="int4"), ValueError, "unknown format 'int4'"),
        (broken(blocksize=128), ValueError, r"scales of nf4 .* must be \(192,\), got \(384,\)"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            from_bnb(source)
