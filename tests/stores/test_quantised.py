"""Quantised checkpoints: FP8 with scales against float64 products block by block, everything else refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from soups.errors import SoupError, WeightsError
from soups.merging import merge
from soups.stores import open_store

FP8 = torch.float8_e4m3fn


def codes(*shape: int, seed: int = 0, dtype: torch.dtype = FP8) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-2 + 1e-3


def by_blocks(weight: Tensor, scale: Tensor, high: int, wide: int) -> Tensor:
    """The definition, element by element: float32 of the float64 product, which rounds as a float32 product does."""
    result = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            result[row, column] = weight[row, column].double() * scale[row // high, column // wide].double()
    return result.float()


def folder(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


KINDS = {
    "DeepSeek's blocks": (codes(130, 140), scales(2, 2), 128, 128, "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "blocks of another size": (codes(10, 12), scales(3, 2), 4, 8, "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [4, 8]}),
    "blocks without a configuration": (codes(256, 128), scales(2, 1), 128, 128, "weight_scale_inv", None),
    "one for the tensor": (codes(6, 5), scales(1, 1), 6, 5, "weight_scale", {"quant_method": "compressed-tensors"}),
    "one a row": (codes(6, 5), scales(6, 1), 1, 5, "weight_scale", {"quant_method": "fbgemm_fp8"}),
    "another FP8": (codes(6, 5, dtype=torch.float8_e5m2), scales(1, 1), 6, 5, "scale_weight", None),
    "MXFP8": (codes(4, 64), torch.tensor([[0.5, 4.0]] * 4).to(torch.float8_e8m0fnu), 1, 32, "weight_scale", {"quant_method": "modelopt"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_read_as_the_numbers_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    weight, scale, high, wide, name, settings = KINDS[kind]
    tensors = {
        "q.weight": weight,
        f"q.{name}": scale,
        "norm.weight": torch.ones(5).bfloat16(),
        "q.input_scale": torch.ones(1),
    }
    config = {"torch_dtype": "float16", **({"quantization_config": settings} if settings else {})}
    path = folder(tmp_path / "m", tensors, **config)
    expected = by_blocks(weight, scale.float(), high, wide)
    with open_store(path) as store:
        assert sorted(store) == ["norm.weight", "q.weight"], "scales are no weights"
        assert store.meta("q.weight").dtype == torch.float32 and torch.equal(store.read("q.weight"), expected)
        flat = expected.reshape(-1)
        for start, stop in [(0, 1), (3, 17), (4, 20), (len(flat) - 3, len(flat)), (5, 5)]:
            assert torch.equal(store.read_flat("q.weight", start, stop), flat[start:stop])
        assert store.file_row("q.weight", 0) is None and store.file_row("norm.weight", 0) is not None
        assert store.declared_dtype("q.weight") == torch.float16
        assert store.identity("q.weight") not in (None, store.store.identity("q.weight"))
        with pytest.raises(WeightsError, match="no tensor"):
            store.read(f"q.{name}")
    with open_store(path, as_stored=True) as store:
        assert store.meta("q.weight").dtype == weight.dtype and f"q.{name}" in store


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    weight, scale = codes(3, 130, 10), scales(3, 2, 1)
    path = folder(
        tmp_path / "m",
        {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": scale},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    expected = torch.stack([by_blocks(weight[e], scale[e], 128, 128) for e in range(3)])
    with open_store(path) as store:
        assert torch.equal(store.read("experts.gate_up_proj"), expected)
        assert torch.equal(store.read("experts.gate_up_proj", slice(1, 2)), expected[1:2])


@pytest.mark.parametrize("shape", [(3, 1, 8), (3, 8, 1), (1, 8), (8, 1), (3, 1, 1)])
def test_the_scales_shape_tells_rows_from_columns_in_a_square_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = codes(3, 8, 8) if len(shape) == 3 else codes(8, 8), scales(*shape)
    tensors = {"experts.down_proj": weight, "experts.down_proj_scale": scale}
    with open_store(folder(tmp_path / "m", tensors, quantization_config={"quant_method": "fbgemm_fp8"})) as store:
        assert torch.equal(store.read("experts.down_proj"), weight.float() * scale.float())


@pytest.mark.parametrize("compiled", [False, None])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16])
def test_a_merge_rounds_once(compiled: bool | None, asked: torch.dtype | None, tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    paths, means = [], []
    for number in range(2):
        weight, scale = codes(130, 40, seed=number), scales(2, 1, seed=number + 5)
        tensors = {"q.weight": weight, "q.weight_scale_inv": scale, "norm.weight": torch.ones(5).bfloat16() * number}
        paths.append(folder(tmp_path / f"m{number}", tensors, quantization_config=settings))
        means.append(by_blocks(weight, scale, 128, 128).double())
    merge("linear", paths, out=tmp_path / "out", dtype=asked, compiled=compiled)
    with open_store(tmp_path / "out") as store:
        read = store.read("q.weight")
        assert read.dtype == (asked or torch.bfloat16), "bfloat16 where the model declares nothing"
        assert torch.equal(read, ((means[0] + means[1]) / 2).to(read.dtype))
        assert sorted(store) == ["norm.weight", "q.weight"]
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_fp8_beside_bfloat16(tmp_path: Path) -> None:
    weight, scale = codes(8, 8), scales(1)
    quantised = folder(tmp_path / "q", {"w.weight": weight, "w.weight_scale": scale}, torch_dtype="bfloat16")
    plain = folder(tmp_path / "p", {"w.weight": torch.ones(8, 8).bfloat16()})
    expected = ((weight.float() * scale).double() + 1) / 2
    merged = merge("linear", [plain, quantised])
    assert merged["w.weight"].dtype == torch.bfloat16 and torch.equal(merged["w.weight"], expected.bfloat16())


def test_fp8_without_scales(tmp_path: Path) -> None:
    """Numbers that somebody stored in eight bits are numbers; codes that lost their scales are not."""
    with open_store(folder(tmp_path / "m", {"w.weight": codes(4, 4)})) as store:
        assert store.meta("w.weight").dtype == FP8
    path = folder(tmp_path / "n", {"w.weight": codes(4, 4)}, quantization_config={"quant_method": "fp8"})
    with pytest.raises(WeightsError, match=r"'w\.weight' is in FP8 by fp8, and its scale .* is not there"):
        open_store(path)
    path = folder(tmp_path / "o", {"w.weight": codes(7, 9), "w.weight_scale_inv": scales(3, 3)})
    with pytest.raises(WeightsError, match="neither one for the tensor, nor one a row"):
        open_store(path)


I32, U8, I8 = (
    torch.ones(4, 4, dtype=torch.int32),
    torch.ones(4, 4, dtype=torch.uint8),
    torch.ones(4, 4, dtype=torch.int8),
)
HALF = torch.ones(4, 4).half()
REFUSED = {
    "GPTQ": {"q.qweight": I32, "q.qzeros": I32, "q.scales": HALF, "q.g_idx": I32[0]},
    "AWQ": {"q.qweight": I32, "q.qzeros": I32, "q.scales": HALF},
    "bitsandbytes 8-bit": {"q.weight": I8, "q.SCB": HALF[0].float()},
    "bitsandbytes 4-bit": {
        "q.weight": U8.reshape(-1, 1), "q.weight.absmax": HALF[0].float(), "q.weight.quant_map": HALF[0].float(),
        "q.weight.quant_state.bitsandbytes__nf4": U8[0],
    },
    "MXFP4": {"experts.down_proj_blocks": U8.reshape(2, 2, 2, 2), "experts.down_proj_scales": U8.reshape(2, 2, 4)},
    "NVFP4": {"q.weight": U8, "q.weight_scale": HALF.to(FP8), "q.weight_scale_2": HALF[0, 0].float()},
    "compressed-tensors": {"q.weight_packed": I32, "q.weight_scale": HALF, "q.weight_shape": I32[0, :2].long()},
    "8-bit integers with scales": {"q.weight": I8, "q.weight_scale": HALF[0]},
    "8-bit integers": {"q.weight": I8},
    "8-bit integers with": {"experts.gate_up_proj": I8, "experts.gate_up_proj_scale": HALF[0]},
    "AQLM": {"q.codes": I8.reshape(4, 4, 1), "q.codebooks": HALF.reshape(1, 4, 1, 4)},
    "EXL2": {"q.q_weight": I32, "q.q_scale": I32, "q.q_invperm": I32[0]},
    "HQQ": {"q.W_q": U8, "q.meta": HALF},
}  # fmt: skip


@pytest.mark.parametrize("ending", ["folder", ".safetensors", ".pt", "memory"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_codes_are_refused_by_name_with_the_way_out(kind: str, ending: str, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in REFUSED[kind].items()} | {"norm.weight": torch.ones(4).half()}
    place = tmp_path / f"m{ending}"
    if ending == "folder":
        folder(place, tensors)
    elif ending == ".pt":
        torch.save(tensors, place)
    elif ending == ".safetensors":
        save_file(tensors, place)
    else:
        place = tensors
    for read in (open_store, lambda place: merge("linear", [place, place])):
        with pytest.raises(
            WeightsError, match=rf"is quantised \(.*{kind}.*\).*Merge the checkpoint that it was quantised from"
        ):
            read(place)
    with open_store(place, as_stored=True) as store:
        assert set(store) == set(tensors)


def test_methods_that_only_the_configuration_names(tmp_path: Path) -> None:
    settings = {"quant_method": "torchao", "quant_type": "int4_weight_only"}
    path = folder(tmp_path / "m", {"q.something": I32.clone()}, quantization_config=settings)
    with pytest.raises(WeightsError, match=r"quantised \(torchao\)"):
        open_store(path)
    nested = folder(
        tmp_path / "n", {"q.something": U8.clone()}, text_config={"quantization_config": {"quant_method": "higgs"}}
    )
    with pytest.raises(WeightsError, match=r"quantised \(higgs\)"):
        open_store(nested)


def test_ordinary_integers_are_no_codes(tmp_path: Path) -> None:
    tensors = {
        "position_ids": torch.arange(8).reshape(1, 8), "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8).tril(),
        "bn.num_batches_tracked": torch.tensor(3), "relative_position_index": torch.ones(4, 4, dtype=torch.int64),
        "mask": torch.ones(4, 4, dtype=torch.bool), "table": torch.ones(4, 4, dtype=torch.int32), "w.weight": torch.ones(4, 4),
        "codes.weight": torch.ones(2, 2), "scale.weight": torch.ones(2, 2), "blocks.0.scale": torch.ones(2),
    }  # fmt: skip
    path = folder(tmp_path / "m", tensors)
    merged = merge("linear", [path, path])
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


def test_a_dequantised_configuration_that_still_names_its_method_is_plain(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "m", {"w.weight": torch.ones(4, 4).bfloat16()}, quantization_config={"quant_method": "gptq"}
    )
    with open_store(path) as store:
        assert store.meta("w.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["U16", "U32", "U64", "F8_E8M0", "F4", "F6_E2M3", "X9"])
def test_one_tensor_of_an_exotic_dtype_does_not_hide_the_others(dtype: str, tmp_path: Path) -> None:
    sizes = {"U16": 16, "U32": 32, "U64": 64, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "X9": 72}
    plain = torch.arange(4.0)
    span = 16 + 8 * sizes[dtype] // 8
    header = {
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "odd": {"dtype": dtype, "shape": [2, 4], "data_offsets": [16, span]},
        "v": {"dtype": "F32", "shape": [4], "data_offsets": [span, span + 16]},
    }
    text = json.dumps(header).encode()
    data = plain.numpy().tobytes() + bytes(range(span - 16)) + plain.numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with open_store(tmp_path / "m.safetensors", as_stored=True) as store:
        assert set(store) == {"w", "v", "odd"}
        assert torch.equal(store.read("w"), plain) and torch.equal(store.read("v"), plain)
        if dtype in ("F4", "F6_E2M3", "X9"):
            assert store.unreadable == {"odd": f"{dtype} [2, 4]"}
            for ask in (store.read, store.meta):
                with pytest.raises(
                    WeightsError, match=rf"'odd' is {dtype} \[2, 4\].*other tensors of the file can be read"
                ):
                    ask("odd")
        else:
            assert store.read("odd").view(torch.uint8).flatten().tolist() == list(range(span - 16))
    if dtype.startswith("U"):
        merged = merge("linear", [tmp_path / "m.safetensors"] * 2, out=tmp_path / "out.safetensors")
        with open_store(merged) as store:
            assert store.read("odd").view(torch.uint8).flatten().tolist() == list(range(span - 16)), "copied"
    with open_store(tmp_path / "m.safetensors") as store:
        assert torch.equal(store.read("w"), plain) and set(store) == {"w", "v", "odd"}
    if dtype == "F4":
        with pytest.raises(SoupError, match=r"'odd' is F4 \[2, 4\]"):
            merge("linear", [tmp_path / "m.safetensors"] * 2)
