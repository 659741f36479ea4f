"""TokenFlow-t2i to a whole folder: every key at real size, kills, and checkpoints that are something else."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from killing import num_kills, run_and_kill
from safetensors.torch import load_file, save_file

from tokenflow_source import CONFIG, IMAGE_SETTINGS, IMAGES, save_source
from transformers_nextflow import TokenFlowConfig, TokenFlowForCausalLM, TokenFlowProcessor, hash_image_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from conversion.streaming import StoredTensor, map_keys
from conversion.tokenflow import LAYOUTS, main
from conversion.tokenflow_t2i import LEVELS, T2I_KEYS, convert_t2i, plan_t2i, t2i_config

from conversion import streaming

ROOT = Path(__file__).parents[2]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published model, by its description: Llama-2-7B and what TokenFlow adds."""
    wide, mlp, rows = 4096, 11008, 64769
    layer = {
        **{f"self_attn.{name}_proj": (wide, wide) for name in "qkvo"},
        **{f"self_attn.qknorm.{name}_norm": (128,) for name in ("query", "key")},
        **{f"mlp.{name}_proj": (mlp, wide) for name in ("gate", "up")},
        "mlp.down_proj": (wide, mlp),
        **{name: (wide,) for name in ("input_layernorm", "post_attention_layernorm")},
    }
    return {
        **{name: (rows, wide) for name in ("model.embed_tokens.weight", "lm_head.weight")},
        **{f"model.layers.{n}.{name}.weight": shape for n in range(32) for name, shape in layer.items()},
        "model.norm.weight": (wide,),
        "model.mm_projector.0.weight": (wide, 40),
        "model.mm_projector.0.bias": (wide,),
        "model.mm_projector.2.weight": (wide, wide),
        "model.mm_projector.2.bias": (wide,),
        LEVELS: (10, wide),
        "model.pos_1LC": (817, wide),
    }


class TestRealSize:
    def test_keys_and_shapes_match_both_ways(self):
        shapes = published_shapes()
        source = {name: StoredTensor(Path("x"), name, shape, torch.bfloat16, 0) for name, shape in shapes.items()}
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        config = t2i_config({"model_type": "llava_llama", "rms_norm_eps": 1e-5, **sizes}, "x")
        assert config.to_diff_dict() == TokenFlowConfig().to_diff_dict()  # the defaults are the published model's
        plan = {t.name: t.shape for t in plan_t2i(source, config, torch.empty(32768, 40, device="meta"))}
        with torch.device("meta"):
            model = TokenFlowForCausalLM(config)
        assert plan == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        mapped = map_keys(list(shapes), T2I_KEYS, "")
        assert mapped.keys() == shapes.keys()
        assert set(mapped.values()) == plan.keys() - {"model.visual_codebook.weight"}
        # What is left out: rows of codes in the input embeddings, and the scale embedding that no slot reads.
        assert plan["model.embed_tokens.weight"] == (32001, 4096) and plan["model.scale_embedding.weight"] == (9, 4096)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.9e9, rel=0.03)

    def test_every_row_of_the_table_is_used(self):
        names = [*published_shapes(), "model.layers.0.self_attn.rotary_emb.inv_freq", "model.vision_tower.x"]
        names += ["model.image_token_start", "model.image_token_end", "image_token_start", "image_token_end"]
        for key in T2I_KEYS:
            rest = {name: rule for name, rule in T2I_KEYS.items() if name != key}
            with suppress(ValueError):  # no rule expects a key any more
                assert map_keys(names, rest, "") != map_keys(names, T2I_KEYS, ""), key


@pytest.fixture
def arguments(tmp_path) -> dict:
    source = save_source(tmp_path / "source")
    return dict(source=source, output=tmp_path / "out", image_tokenizer=IMAGES, max_shard_size=20_000, **IMAGE_SETTINGS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_in_small_blocks(arguments, tmp_path, monkeypatch):
    expected = contents(convert_t2i(**arguments))
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 300)
    assert contents(convert_t2i(**{**arguments, "output": tmp_path / "again" / "out"})) == expected


def test_what_is_loaded(tiny_tokenflow_checkpoint):
    model = TokenFlowForCausalLM.from_pretrained(tiny_tokenflow_checkpoint)
    processor = TokenFlowProcessor.from_pretrained(tiny_tokenflow_checkpoint)
    images, config = processor.image_tokenizer, model.config
    assert config.image_tokenizer_hash == hash_image_tokenizer(images)
    assert torch.equal(model.model.visual_codebook.weight, images.quantizer.codebook())
    assert (config.image_start_ids, config.image_end_ids, config.image_token_id) == ([5, 6, 7], [9, 10], 0)
    assert max(processor.tokenizer.get_vocab().values()) == config.pad_token_id == config.text_vocab_size - 1
    stored = model.generation_config
    assert (stored.generation_mode, stored.guidance_scale, stored.guidance_schedule) == ("image", 8.5, "linear")
    assert processor.tokenizer.decode(stored.negative_ids).startswith("<s>")


MEASURE = """
import ctypes, json, sys
sys.path[:0] = sys.argv[1:3]
import torch, torchvision
from conversion.tokenflow_t2i import convert_t2i
from tokenflow_source import IMAGES, IMAGE_SETTINGS
import transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip
def peak():  # in bytes
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
ctypes.CDLL(None).malloc_trim(0)  # what is free already would not count
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
convert_t2i(sys.argv[3], sys.argv[4], IMAGES, max_shard_size="200MB", **IMAGE_SETTINGS)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_stays_below_the_largest_shard(arguments, tmp_path, forked_process):
    """The other converters' bound, on a model of 1.1 GB."""
    source = arguments["source"]
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 18, "num_attention_heads": 16}
    sizes["num_key_value_heads"] = 16
    (source / "config.json").write_text(json.dumps({**CONFIG, **sizes}))
    config = t2i_config(
        {**CONFIG, **sizes},
        "x",
        vocab_size=97,
        text_vocab_size=33,
        visual_codebook_size=64,
        visual_code_dim=12,
        scale_sides=[1, 2, 3, 4],
        image_start_ids=[5],
        image_end_ids=[9],
        pad_token_id=32,
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in TokenFlowForCausalLM(config).state_dict().items()}
    del shapes["model.visual_codebook.weight"]
    back = {"q_norm": "qknorm.query_norm", "k_norm": "qknorm.key_norm", "connector": "mm_projector"}
    back |= {"scale_embedding": "lvl_embed", "position_embedding.weight": "pos_1LC"}
    shapes |= {"model.embed_tokens.weight": (97, 1024), "model.scale_embedding.weight": (5, 1024)}
    for file in source.glob("*.safetensors*"):
        file.unlink()
    names = list(shapes)
    for shard in range(4):
        own = {}
        for name in names[shard::4]:
            theirs = name
            for new, old in back.items():
                theirs = theirs.replace(new, old)
            own[theirs] = torch.ones(shapes[name], dtype=torch.bfloat16)
        save_file(own, source / f"model-{shard}.safetensors")
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    paths = [ROOT, ROOT / "tests", source, tmp_path / "out"]
    grown = int(forked_process(MEASURE, *map(str, paths)))
    print(f"largest shard {largest / 1e6:.0f} MB, converting {grown / 1e6:.0f} MB")
    assert grown < 1.3 * largest


class TestKilled:
    def test_kills_at_any_moment(self, arguments, tmp_path):
        unbroken = contents(convert_t2i(**{**arguments, "output": tmp_path / "whole" / "out"}))
        inside = str(tmp_path / "out")
        moments = run_and_kill(lambda: convert_t2i(**arguments), inside)
        shutil.rmtree(arguments["output"])
        step = max(1, moments // num_kills(4))
        for moment in [*range(step, moments, step), moments]:
            assert run_and_kill(lambda: convert_t2i(**arguments), inside, moment) == -1
            if (tmp_path / "out").exists():
                shutil.rmtree(tmp_path / "out")
                continue
            finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
            output = convert_t2i(**arguments)
            assert all((output / name).stat().st_mtime_ns == time for name, time in finished.items())
            assert contents(output) == unbroken
            shutil.rmtree(output)


class TestBadInput:
    @pytest.fixture
    def convert(self, arguments, tmp_path):
        """Runs a conversion that must fail, and checks that nothing was left behind."""

        def run(message: str, **changes):
            with pytest.raises(ValueError, match=message):
                convert_t2i(**{**arguments, **changes})
            assert not list(tmp_path.glob("out*"))

        return run

    def rewrite(self, folder: Path, change) -> None:
        for file in folder.glob("*.safetensors"):
            weights = load_file(file)
            change(weights)
            save_file(weights, file)
        (folder / "model.safetensors.index.json").unlink()

    def test_a_model_that_reads_pictures(self, convert, arguments):
        self.rewrite(
            arguments["source"], lambda weights: [weights.pop(name, None) for name in (LEVELS, "model.pos_1LC")]
        )
        convert(rf'source" is not TokenFlow-t2i: it has no "{LEVELS}".*i2t models read pictures')

    def test_another_models_config(self, convert, arguments):
        (arguments["source"] / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llava_qwen"}))
        convert('states the model type "llava_qwen"; expected "llava_llama".*i2t')

    def test_a_missing_shard(self, convert, arguments):
        (arguments["source"] / "model-00002-of-00003.safetensors").unlink()
        convert('lacks model-00002-of-00003.safetensors, which "model.safetensors.index.json" names')

    def test_a_missing_key_and_one_too_many(self, convert, arguments):
        self.rewrite(arguments["source"], lambda weights: weights.pop("model.pos_1LC", None))
        convert(r'lacks the weights of "model.position_embedding.weight" \(expected shape \(30, 32\)\)')

    def test_a_key_too_many(self, convert, arguments):
        def change(weights):
            if "model.norm.weight" in weights:
                weights["extra.weight"] = torch.ones(1)

        self.rewrite(arguments["source"], change)
        convert('holds the key "extra.weight", which no rule expects')

    def test_another_codebook(self, convert, tmp_path):
        images = load_file(IMAGES)
        convert("codebook in .* has 64 codes, but 128 are expected .`codebook_size`", codebook_size=128)
        for name in ("vqkd", "vqgan"):
            images[f"quantize.embedding_{name}.weight"] = images[f"quantize.embedding_{name}.weight"][:32].clone()
        save_file(images, tmp_path / "images.safetensors")
        other = {"image_tokenizer": tmp_path / "images.safetensors", "codebook_size": 32}
        convert('weights in .* are for 64 codes, but the image tokenizer .*images.safetensors" has 32', **other)

    def test_other_scales(self, convert):
        convert("are for 4 scales, but the image tokenizer .* has 3", num_scales=3)

    def test_counters_in_place_of_weights(self, convert, arguments):
        def change(weights):
            if "model.norm.weight" in weights:
                weights["model.norm.weight"] = torch.ones(32, dtype=torch.int64)

        self.rewrite(arguments["source"], change)
        convert('"model.norm.weight" in .* holds torch.int64, not weights')

    def test_no_tokenizer(self, convert, arguments):
        (arguments["source"] / "tokenizer.json").write_text("{")
        convert("has no tokenizer that loads")
        (arguments["source"] / "tokenizer.json").unlink()
        convert("source\" has no tokenizer: neither tokenizer.json nor tokenizer.model is there. .* Llama 2's")

    def test_an_output_that_is_there(self, arguments, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="is there already"):
            convert_t2i(**arguments)


def test_the_command(arguments, monkeypatch, capsys):
    monkeypatch.setitem(LAYOUTS, "clipb_224", IMAGE_SETTINGS)
    monkeypatch.setattr("conversion.tokenflow.ENHANCED_DECODER", {})
    paths = {"--source": IMAGES, "--t2i": arguments["source"], "--output": arguments["output"]}
    main([str(part) for pair in paths.items() for part in pair])
    assert "Written" in capsys.readouterr().out
    assert TokenFlowForCausalLM.from_pretrained(arguments["output"]).config.num_scales == 4
    with pytest.raises(SystemExit):
        main([*(str(part) for pair in paths.items() for part in pair), "--paper-schedules"])
