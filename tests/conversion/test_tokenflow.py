"""TokenFlow's public tokenizers to image tokenizers: every key and shape, TokenFlow's own numbers, bad files."""

import argparse
import json
import pickle
import random
import sys
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_qwen2_5 import RANKS, save_source

from transformers_nextflow import NextFlowForCausalLM, NextFlowImageTokenizer, NextFlowProcessor, ScaleSchedule
from transformers_nextflow.image_processing_pil_nextflow import to_pil
from transformers_nextflow.semantic_branch import semantic_tokens

sys.path.insert(0, str(Path(__file__).parents[2]))
from conversion.qwen2_5 import convert_to_nextflow
from conversion.streaming import StoredTensor, map_keys, read_checkpoint, read_pickle
from conversion.tokenflow import (
    LAYOUTS,
    PAPER_SCHEDULES,
    SIGN_OF_ENHANCED,
    SIGNS,
    TOKENFLOW_KEYS,
    block_places,
    convert_tokenflow,
    find_layout,
    main,
    plan_image_tokenizer,
    split_fused,
    tokenflow_config,
)

from conversion import streaming

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
# The sizes of the golden tokenizers; what is not named here is the layout's.
SMALL: dict[str, Any] = dict(
    codebook_size=64,
    semantic_code_dim=8,
    pixel_code_dim=4,
    latent_channels=32,
    encoder_hidden_sizes=[32, 32, 32, 32, 64],
    encoder_num_res_blocks=1,
    scale_sides=[1, 2, 3, 4, 5],
    num_scales=5,
    semantic_decoder_layers=2,
    semantic_decoder_num_heads=4,
    semantic_decoder_intermediate_size=64,
)
CLIP, SIGLIP = (LAYOUTS[layout]["semantic_config"] for layout in ("clipb_224", "siglip_384"))
GOLDEN_SETTINGS: dict[str, dict[str, Any]] = {
    "clipb_tiny_enhanced": dict(
        SMALL,
        decoder_hidden_sizes=[64, 64, 64, 64, 128],
        decoder_num_res_blocks=2,
        semantic_feature_dim=24,
        semantic_decoder_grid_size=4,
        semantic_config=dict(
            CLIP, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=64
        ),
    ),
    "siglip_tiny": dict(
        SMALL,
        decoder_hidden_sizes=[32, 32, 32, 32, 64],
        decoder_num_res_blocks=1,
        image_size=72,
        semantic_decoder_grid_size=5,
        semantic_config=dict(
            SIGLIP, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=72
        ),
    ),
}
WEIGHTS = {name: GOLDEN / "tokenflow_full" / f"{name}.state_dict.safetensors" for name in GOLDEN_SETTINGS}
CASES = [
    ("clipb_tiny_enhanced", "clipb_tiny_enhanced"),
    ("clipb_tiny_enhanced", "clipb_tiny_enhanced_interp"),
    ("siglip_tiny", "siglip_tiny"),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenflow")
    return {
        name: convert_tokenflow(WEIGHTS[name], folder / name, **settings) for name, settings in GOLDEN_SETTINGS.items()
    }


@pytest.fixture(scope="module")
def tokenizers(converted) -> dict[str, NextFlowImageTokenizer]:
    return {
        name: NextFlowImageTokenizer.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in converted.items()
    }


@pytest.mark.parametrize(("name", "case"), CASES)
class TestNumbers:
    """Of the golden file: two pictures, at the size that was trained and, for `interp`, at another."""

    @pytest.fixture
    def golden(self, case) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / "tokenflow_full" / f"{case}.io.safetensors")

    def test_codes_are_exact(self, tokenizers, name, golden):
        encoded = tokenizers[name].encode(golden["image"])
        assert torch.equal(encoded.codes, golden["indices"])
        torch.testing.assert_close(encoded.quantized, golden["quantized"], atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_features_of_both_encoders(self, tokenizers, name, golden):
        semantic = tokenizers[name].encode_semantic(golden["image"])
        torch.testing.assert_close(
            semantic.flatten(2).transpose(1, 2), golden["mid.semantic_tokens"], atol=1e-4, rtol=0
        )
        pixel = tokenizers[name].encode_pixels(golden["image"])
        torch.testing.assert_close(pixel, golden["mid.pixel_code_input"], atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_pictures_and_semantic_features(self, tokenizers, name, golden):
        tokenizer = tokenizers[name]
        output = tokenizer(golden["image"])
        torch.testing.assert_close(output.pixel_values, golden["decode.image"], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.semantic_features, golden["decode.semantic"], atol=1e-4, rtol=0)
        rows = output.image_grid_shw
        decoded = tokenizer.decode(golden["indices"], rows)
        torch.testing.assert_close(decoded, golden["decode.image"].clamp(-1, 1), atol=1e-4, rtol=0)
        semantic = tokenizer.decode_semantic(golden["indices"], rows)
        torch.testing.assert_close(semantic, golden["decode.semantic"], atol=1e-4, rtol=0)


def test_pictures_of_tokenflows_own_generation(tokenizers):
    golden = load_file(GOLDEN / "tokenflow_t2i" / "generation.safetensors")
    rows = torch.tensor([ScaleSchedule(num_scales=4).grid_shw])
    decoded = tokenizers["clipb_tiny_enhanced"].decode(golden["gen1.codes"], rows)
    torch.testing.assert_close(decoded, golden["gen1.image"].clamp(-1, 1), atol=1e-4, rtol=0)
    for picture, expected in zip(to_pil(decoded), golden["gen1.image_uint8"], strict=True):
        difference = torch.from_numpy(np.array(picture)).int() - expected.int()
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 1e-3  # a half rounds either way


class TestRealSize:
    """On the meta device, against the keys and shapes of TokenFlow's own models."""

    @pytest.fixture(params=sorted(path.stem for path in (GOLDEN / "tokenflow_keys").iterdir()))
    def model(self, request) -> tuple[str, bool, dict[str, StoredTensor]]:
        layout, _, decoder = request.param.rpartition("_")
        if layout == "vitamin_xlarge_256":
            pytest.importorskip("timm")
        lines = (GOLDEN / "tokenflow_keys" / f"{request.param}.tsv").read_text().splitlines()[1:]
        shapes = {name: tuple(json.loads(shape)) for name, shape, _ in (line.split("\t") for line in lines)}
        stored = {name: StoredTensor(Path("x"), name, shape, torch.float32, 0) for name, shape in shapes.items()}
        return layout, decoder == "enhanced", stored

    def test_keys_and_shapes_match_both_ways(self, model):
        layout, enhanced, source = model
        assert find_layout(list(source), "") == layout and (SIGN_OF_ENHANCED in source) == enhanced
        config = tokenflow_config(layout, enhanced)
        plan = {tensor.name: tensor.shape for tensor in plan_image_tokenizer(source, config)}
        with torch.device("meta"):
            expected = {k: tuple(t.shape) for k, t in NextFlowImageTokenizer(config).state_dict().items()}
        assert plan == expected

        dropped = {"quantize.codebook_used", "scaling_layer.shift", "scaling_layer.scale"} & source.keys()
        mapped = map_keys(list(split_fused(source)), TOKENFLOW_KEYS, "", block_places(config))
        back = {ours: theirs.partition("[")[0] for theirs, ours in mapped.items()}
        assert back.keys() == expected.keys() and set(back.values()) | dropped == source.keys()
        numbers = {name: prod(tensor.shape) for name, tensor in source.items() if name not in dropped}
        assert sum(numbers.values()) == sum(map(prod, expected.values()))

    def test_every_row_of_the_table_is_used(self):
        def mapped(names: list[str], table):
            try:
                return map_keys(names, table, "", places)
            except ValueError:
                return None

        places, idle = block_places(tokenflow_config("clipb_224", enhanced=True)), set(TOKENFLOW_KEYS)
        for path in (GOLDEN / "tokenflow_keys").glob("*_enhanced.tsv"):
            names = [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]
            names = list(split_fused({name: StoredTensor(Path("x"), name, (3,), torch.float32, 0) for name in names}))
            whole = mapped(names, TOKENFLOW_KEYS)
            assert whole
            idle -= {
                row for row in idle if mapped(names, {k: v for k, v in TOKENFLOW_KEYS.items() if k != row}) != whole
            }
        assert not idle

    @pytest.mark.parametrize(
        ("layout", "size", "num_codes"),
        [("clipb_224", 224, 561), ("clipb_224", 256, 817), ("vitamin_xlarge_256", 256, 817), ("siglip_384", 384, 2227)],
    )
    def test_numbers_of_codes(self, layout, size, num_codes):
        config = tokenflow_config(layout, enhanced=False)
        if config.image_size is None:
            schedule = ScaleSchedule.from_size(size, size, sides=config.sides)
        else:
            assert config.image_size == size
            schedule = ScaleSchedule(num_scales=config.num_scales, sides=config.sides)
        assert schedule.num_tokens == num_codes


class TestFiles:
    def test_weights_are_kept_bit_for_bit(self, converted):
        for name, folder in converted.items():
            source, target = load_file(WEIGHTS[name]), load_file(folder / "model.safetensors")
            assert torch.equal(target["quantizer.pixel_codebook.weight"], source["quantize.embedding_vqgan.weight"])
            key = target["semantic_decoder.transformer.layers.1.attention.k_proj.weight"]
            assert torch.equal(key, source["decoder_vqkd.blocks.1.attn.qkv.weight"][32:64])
            conv = target["pixel_decoder.blocks.4.out_proj.weight"]  # after three blocks in the middle and one before
            assert torch.equal(conv, source["decoder.conv_blocks.0.attn.0.proj_out.weight"])
            assert (folder / "README.md").read_text().count("TokenFlow") == 1

    @pytest.mark.parametrize("entry", ["ema", "model", "state_dict", None])
    def test_the_published_kind_of_file(self, converted, tmp_path, entry):
        weights = load_file(WEIGHTS["siglip_tiny"])
        rest = {"steps": 3, "args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}}}
        if entry == "ema":
            rest["model"] = {"wrong": torch.ones(1)}
        torch.save(weights if entry is None else {**rest, entry: weights}, tmp_path / "tokenflow.pt")
        settings = GOLDEN_SETTINGS["siglip_tiny"]
        output = convert_tokenflow(tmp_path / "tokenflow.pt", tmp_path / "out", max_shard_size="500kB", **settings)
        expected, found = read_checkpoint(converted["siglip_tiny"]), read_checkpoint(output)
        assert found.keys() == expected.keys() and (output / streaming.INDEX).is_file()
        for name in found:
            ours, theirs = (torch.cat(list(tensors[name].blocks())) for tensors in (found, expected))
            assert torch.equal(ours, theirs), name

    def test_views_in_small_blocks(self, converted, tmp_path, monkeypatch):
        """Tensors that share a storage, as `torch.save` stores them once."""
        monkeypatch.setattr(streaming, "BLOCK_BYTES", 300)
        weights = load_file(WEIGHTS["siglip_tiny"])
        name = "decoder_vqkd.blocks.1.mlp.fc1.weight"
        weights[name] = torch.cat([torch.zeros(3, 32).bfloat16(), weights[name]])[3:]
        torch.save(weights, tmp_path / "tokenflow.pt")
        output = convert_tokenflow(tmp_path / "tokenflow.pt", tmp_path / "out", **GOLDEN_SETTINGS["siglip_tiny"])
        assert (output / "model.safetensors").read_bytes() == (
            converted["siglip_tiny"] / "model.safetensors"
        ).read_bytes()

    def test_another_dtype(self, tmp_path):
        output = convert_tokenflow(
            WEIGHTS["siglip_tiny"], tmp_path / "out", torch.float32, **GOLDEN_SETTINGS["siglip_tiny"]
        )
        dtypes = {name: tensor.dtype for name, tensor in read_checkpoint(output).items()}
        assert dtypes.pop("quantizer.semantic_codebook.weight") == dtypes.pop("quantizer.pixel_codebook.weight")
        assert set(dtypes.values()) == {torch.float32}
        assert NextFlowImageTokenizer.from_pretrained(output).dtype == torch.float32

    def test_a_second_run_goes_on(self, converted, tmp_path, monkeypatch):
        arguments = dict(source=WEIGHTS["siglip_tiny"], output=tmp_path / "out", max_shard_size="500kB")
        arguments |= GOLDEN_SETTINGS["siglip_tiny"]
        write, left = streaming._write_whole, iter([True] * 3)  # the note and two shards

        def dying(*args):
            write(*args) if next(left, False) else (_ for _ in ()).throw(KeyboardInterrupt)

        monkeypatch.setattr(streaming, "_write_whole", dying)
        with pytest.raises(KeyboardInterrupt):
            convert_tokenflow(**arguments)
        finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
        assert len(finished) == 2 and not (tmp_path / "out").exists()
        monkeypatch.setattr(streaming, "_write_whole", write)
        output = convert_tokenflow(**arguments)
        assert all((output / name).stat().st_mtime_ns == time for name, time in finished.items())
        found = NextFlowImageTokenizer.from_pretrained(output).state_dict()
        expected = NextFlowImageTokenizer.from_pretrained(converted["siglip_tiny"]).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_damaged_pickle_is_refused(self, tmp_path):
        """Flips of one byte anywhere, payload included (zip keeps checksums), and cuts."""
        file, rng = tmp_path / "tokenflow.pt", random.Random(0)
        torch.save({"a": torch.randn(8, 8), "b": torch.randn(3)}, file)
        whole, refused = file.read_bytes(), 0
        right = {name: torch.cat(list(tensor.blocks())) for name, tensor in read_pickle(file).items()}
        for case in range(150):
            damaged = bytearray(whole[: rng.randrange(len(whole))] if case % 5 == 0 else whole)
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
            file.write_bytes(damaged)
            try:
                found = {name: torch.cat(list(tensor.blocks())) for name, tensor in read_pickle(file).items()}
            except ValueError as error:
                assert str(file) in str(error), case
                refused += 1
            else:
                assert found.keys() == right.keys() and all(torch.equal(found[n], right[n]) for n in right), case
        assert refused > 50


class TestTheTokenizer:
    """What the configuration of another semantic encoder means for a user."""

    def test_prefixes_of_scales_are_previews(self, tokenizers):
        for tokenizer in tokenizers.values():
            sizes = (tokenizer.config.image_size,) * 2 if tokenizer.config.image_size else (80, 80)
            encoded = tokenizer.encode(torch.zeros(1, 3, *sizes))
            for end in (1, 5, 14, 30):
                preview = tokenizer.decode(encoded.codes[:, :end], encoded.image_grid_shw)
                assert preview.shape == (1, 3, *sizes)

    def test_one_size_only(self, tokenizers):
        tokenizer = tokenizers["siglip_tiny"]
        with pytest.raises(ValueError, match="takes images of 72 x 72 pixels only, but got 80 x 80"):
            tokenizer.encode(torch.zeros(1, 3, 80, 80))
        with pytest.raises(ValueError, match=r"has one size of images, all 5 scales of a square, .* \(4, 16, 16\)"):
            tokenizer.decode(torch.zeros(1, 30, dtype=torch.long), torch.tensor([[4, 16, 16]]))

    @pytest.mark.parametrize("name", GOLDEN_SETTINGS)
    def test_it_takes_the_papers_schedules(self, converted, name):
        """The start of a NextFlow training: TokenFlow's weights, the paper's grids and aspects."""
        tokenizer = NextFlowImageTokenizer.from_pretrained(converted[name], **PAPER_SCHEDULES, dtype=torch.float32)
        wide = ScaleSchedule((8, 32), 6)
        encoded = tokenizer.encode(torch.zeros(2, 3, wide.height, wide.width))
        assert encoded.codes.shape == (2, wide.num_tokens) and encoded.image_grid_shw.tolist() == [[6, 8, 32]] * 2
        assert tokenizer.decode(encoded.codes, encoded.image_grid_shw).shape == (2, 3, wide.height, wide.width)
        assert tokenizer.decode_semantic(encoded.codes, encoded.image_grid_shw).isfinite().all()

    @pytest.mark.parametrize("name", GOLDEN_SETTINGS)
    def test_a_language_model_is_made_for_it(self, name, tmp_path):
        """From TokenFlow and Qwen to a model that draws on the paper's grids with TokenFlow's decoder."""
        images = convert_tokenflow(WEIGHTS[name], tmp_path / "images", **{**GOLDEN_SETTINGS[name], **PAPER_SCHEDULES})
        output = convert_to_nextflow(save_source(tmp_path / "qwen", "untied"), tmp_path / "out", images, RANKS)
        model = NextFlowForCausalLM.from_pretrained(output, dtype=torch.float32)
        processor = NextFlowProcessor.from_pretrained(output)
        batch = processor("a cat", return_tensors="pt")
        settings = dict(generation_mode="image", height=64, width=80, return_dict_in_generate=True)
        drawn = model.generate(**batch, **settings)
        picture = processor.decode_images(drawn.sequences, drawn.image_grid_shw)[0][0]
        assert picture.size == (80, 64)
        batch = processor("<image>What is it?", images=[picture], height=64, width=80, return_tensors="pt")
        assert model(**batch).logits.isfinite().all()

    @torch.no_grad()
    def test_semantic_images_are_clamped_and_normalised(self, tokenizers):
        tokenizer = tokenizers["siglip_tiny"]
        pixel_values = 1.5 * torch.rand(1, 3, 72, 72, generator=torch.Generator().manual_seed(0))
        clamped = tokenizer.encode_semantic(pixel_values.clamp(-1, 1))
        torch.testing.assert_close(tokenizer.encode_semantic(pixel_values), clamped, atol=1e-6, rtol=0)
        direct = tokenizer.semantic_encoder(pixel_values.clamp(-1, 1), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(clamped.flatten(2).transpose(1, 2), direct, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def vitamin() -> NextFlowImageTokenizer:
    pytest.importorskip("timm")
    encoder = dict(LAYOUTS["vitamin_xlarge_256"]["semantic_config"], architecture="vitamin_small_224", hidden_size=384)
    encoder["model_args"] = {**encoder["model_args"], "depth": 1, "pos_embed": "none", "img_size": 64}
    sizes = dict(encoder_hidden_sizes=[8] * 5, decoder_hidden_sizes=[8] * 5, cnn_norm_groups=2, image_size=64)
    settings = {**SMALL, **sizes, "semantic_config": encoder, "scale_sides": [1, 2, 4], "num_scales": 3}
    torch.manual_seed(0)
    return NextFlowImageTokenizer(tokenflow_config("vitamin_xlarge_256", False, **settings)).eval()


class TestVitamin:
    @torch.no_grad()
    def test_its_tokens_are_timms_for_clips_normalisation(self, vitamin):
        import timm

        pixel_values = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        model = timm.create_model("vitamin_small_224", num_classes=0, depth=1, img_size=64, pos_embed="none").eval()
        model.load_state_dict(vitamin.semantic_encoder.timm_model.state_dict(), strict=False)  # but for `fc_norm`
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (model.default_cfg["mean"], model.default_cfg["std"])
        )
        expected = model.forward_features((pixel_values / 2 + 0.5 - mean) / std)
        found = vitamin.encode_semantic(pixel_values).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_it_is_saved_and_loaded(self, vitamin, tmp_path):
        vitamin.save_pretrained(tmp_path)
        loaded = NextFlowImageTokenizer.from_pretrained(tmp_path)
        pixel_values = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        expected, found = vitamin(pixel_values), loaded(pixel_values)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.pixel_values, expected.pixel_values)

    def test_hidden_states_are_refused(self, vitamin):
        with pytest.raises(ValueError, match="`vision_feature_layer` must be None for an encoder from timm, but is -2"):
            semantic_tokens(vitamin.semantic_encoder, torch.zeros(1, 3, 64, 64), (4, 4), -2)


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


class TestBadInput:
    @pytest.fixture
    def convert(self, tmp_path):
        """Runs a conversion that must fail, and checks that nothing was left behind."""

        def run(message: str, content: Any, name: str = "siglip_tiny", file: str = "source.safetensors", **settings):
            source = tmp_path / file
            if isinstance(content, dict) and source.suffix == ".safetensors":
                save_file(content, source)
            elif content is not None:
                torch.save(content, source)
            before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
            with pytest.raises(ValueError, match=message):
                convert_tokenflow(source, tmp_path / "out", **{**GOLDEN_SETTINGS[name], **settings})
            assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

        return run

    @pytest.fixture
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(WEIGHTS["siglip_tiny"])

    def test_another_model(self, convert):
        convert(
            'source.safetensors" is not a TokenFlow tokenizer: expected one of',
            {"encoder.conv_in.weight": torch.ones(1)},
        )

    def test_a_missing_key(self, convert, weights):
        del weights["decoder_vqkd.fc_norm.weight"]
        convert(r'lacks the weights of "semantic_decoder.norm_out.weight" \(expected shape \(32,\)\)', weights)

    def test_a_missing_fused_key(self, convert, weights):
        del weights["decoder_vqkd.blocks.1.attn.qkv.weight"]
        convert(r'lacks the weights of "semantic_decoder.transformer.layers.1.attention.q_proj.weight"', weights)

    def test_a_key_too_many(self, convert, weights):
        convert('holds the key "extra.weight", which no rule expects', {**weights, "extra.weight": torch.ones(1)})

    def test_a_block_too_many(self, convert, weights):
        name = "decoder.conv_blocks.5.res.0.norm1.weight"
        convert(
            f'holds the key "{name}", but the model has no conv_blocks.5.res.0; it has mid.0',
            {**weights, name: torch.ones(32)},
        )

    def test_a_layer_too_many(self, convert, weights):
        name = "encoder_vqkd.vision_model.encoder.layers.3.layer_norm1.bias"
        convert(f'no place for "{name}" in ".*source.safetensors"', {**weights, name: torch.ones(32)})

    def test_a_shape_off_by_one(self, convert, weights):
        weights["decoder_vqkd.pos_embed"] = torch.ones(1, 27, 32)
        convert(
            r'"decoder_vqkd.pos_embed" in ".*source.safetensors" has the shape \(1, 27, 32\).* makes it \(1, 26, 32\)',
            weights,
        )

    def test_a_fused_shape_off_by_one(self, convert, weights):
        weights["decoder_vqkd.blocks.0.attn.qkv.weight"] = torch.ones(97, 32)
        convert(r'"decoder_vqkd.blocks.0.attn.qkv.weight" in .* has 97 rows; expected a multiple of 3', weights)
        weights["decoder_vqkd.blocks.0.attn.qkv.weight"] = torch.ones(99, 32)
        convert(r'"decoder_vqkd.blocks.0.attn.qkv.weight" in .* has the shape \(33, 32\).* \(32, 32\)', weights)

    def test_a_truncated_safetensors_file(self, convert, tmp_path):
        (tmp_path / "source.safetensors").write_bytes(WEIGHTS["siglip_tiny"].read_bytes()[:-1])
        convert('source.safetensors" is truncated or damaged: its header promises', None)

    @pytest.mark.parametrize("kept", [0, 100, -100])
    def test_a_truncated_pt_file(self, convert, weights, tmp_path, kept):
        torch.save(weights, tmp_path / "source.pt")
        (tmp_path / "source.pt").write_bytes((tmp_path / "source.pt").read_bytes()[:kept])
        convert('source.pt" is not a whole file of `torch.save`', None, file="source.pt")

    def test_a_pickle_that_would_run_code(self, convert, weights, tmp_path, capsys):
        convert(
            'source.pt" is not read: it holds objects other than tensors', {**weights, "x": Evil()}, file="source.pt"
        )
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
        convert('plain.pt" is not', None, file="plain.pt")
        assert "code was run" not in capsys.readouterr().out

    def test_a_pt_file_of_something_else(self, convert, weights):
        convert('source.pt" holds a list; expected a dict of tensors', [torch.ones(1)], file="source.pt")
        message = "expected a contiguous tensor of floating-point numbers"
        convert(f'"a" in ".*source.pt" is a str; {message}', {"a": "b"}, file="source.pt")
        convert(
            rf"is a tensor of torch.float32 with strides \(1, 3\); {message}",
            {"a": torch.ones(2, 3).T},
            file="source.pt",
        )
        name = "quantize.embedding_vqgan.weight"
        weights[name] = weights[name].to(torch.int8)
        convert(
            rf'"{name}" in .* is a tensor of torch.int8 with strides \(4, 1\); {message}', weights, file="source.pt"
        )

    def test_a_repacked_pt_file(self, convert, weights, tmp_path):
        torch.save(weights, tmp_path / "a.pt")
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as old,
            zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        convert('b.pt" holds compressed tensors; expected a dict of tensors', None, file="b.pt")
        torch.save(weights, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
        convert('c.pt" is not a whole file of `torch.save`', None, file="c.pt")

    def test_no_file(self, convert):
        convert('There is no file ".*source.pt"', None, file="source.pt")

    def test_a_folder_of_pickles(self, convert, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.pt").touch()
        convert(r"holds only pickled weights \(a.pt\)", None, file="folder")

    def test_another_layouts_settings(self, convert):
        convert("lacks the weights of|has no|no place|has the shape", load_file(WEIGHTS["clipb_tiny_enhanced"]))

    def test_an_output_that_is_there(self, convert, weights, tmp_path):
        (tmp_path / "out").mkdir()
        convert("is there already and is not overwritten", weights)

    def test_a_full_disk(self, convert, weights, monkeypatch):
        monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        convert("are still to be written, but the disk of .* has only 0.0 GB free", weights)

    def test_an_unknown_layout(self):
        with pytest.raises(
            ValueError, match='no layout "clipb"; TokenFlow has clipb_224, vitamin_xlarge_256, siglip_384'
        ):
            tokenflow_config("clipb", enhanced=False)
        assert SIGNS.keys() == LAYOUTS.keys()


def test_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["--source", str(WEIGHTS["siglip_tiny"]), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:  # the tiny weights are not of a published size
        main(arguments)
    assert stop.value.code == 1 and "expected shape" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(LAYOUTS, "siglip_384", GOLDEN_SETTINGS["siglip_tiny"])
    main([*arguments, "--dtype", "float16", "--max-shard-size", "1MB", "--paper-schedules"])
    assert "Written" in capsys.readouterr().out and (tmp_path / "out" / streaming.INDEX).is_file()
    tokenizer = NextFlowImageTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.dtype == torch.float16 and tokenizer.config.num_scales == 18
    assert tokenizer.config.scale_sides is None and tokenizer.config.image_size is None
