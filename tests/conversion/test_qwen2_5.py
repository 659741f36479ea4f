"""Qwen2.5(-VL) to NextFlow and back: every key, every bit, the same text; within memory, and after a kill."""

import json
import random
import shutil
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowImageTokenizerConfig,
    NextFlowProcessor,
    hash_image_tokenizer,
    tiny_checkpoint,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from conversion.qwen2_5 import (
    HEAD,
    QWEN_KEYS,
    convert_to_nextflow,
    convert_to_qwen,
    expected_shapes,
    main,
    new_weights,
    nextflow_config,
    plan_nextflow,
    plan_qwen,
)
from conversion.qwen_tokenizer import load_text_tokenizer
from conversion.streaming import StoredTensor, map_keys, read_checkpoint, read_header

from conversion import streaming

sys.path.insert(0, str(Path(__file__).parent))
from killing import num_kills, run_and_kill

ROOT = Path(__file__).parents[2]
RANKS = ROOT / "tests" / "fixtures" / "qwen" / "first_1024_ranks.tiktoken"
VOCAB = 1100  # 1,024 ranks and Qwen's and NextFlow's special tokens, and some rows that nothing uses, as in Qwen
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=VOCAB,
    max_position_embeddings=256,
)
# The published sizes.
LARGE = {
    "Qwen2.5-VL-7B": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-VL-3B": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}


def vl_config(text: dict, **vision) -> Qwen2_5_VLConfig:
    num_pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [num_pairs // 4, (num_pairs - num_pairs // 4) // 2, (num_pairs - num_pairs // 4 + 1) // 2]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = {**text, "rope_parameters": rope}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=text.get("tie_word_embeddings", False)
    )


def save_source(folder: Path, kind: str, max_shard_size: str = "5GB", seed: int = 0) -> Path:
    """A random checkpoint of Qwen's shape, with a text tokenizer's file beside it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "vl":
            vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
            model = Qwen2_5_VLForConditionalGeneration(vl_config(SMALL, **vision))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=kind == "tied"))
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="module")
def image_tokenizer(tiny_random_checkpoint) -> Path:
    return tiny_random_checkpoint / "image_tokenizer"


@pytest.fixture(scope="module", params=["vl", "untied", "tied"])
def converted(request, tmp_path_factory, image_tokenizer) -> tuple[Path, Path]:
    """A source and what became of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_source(folder / "source", request.param, "20kB")
    return source, convert_to_nextflow(source, folder / "nextflow", image_tokenizer, RANKS, max_shard_size=30_000)


def load_source(folder: Path):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = Qwen2_5_VLForConditionalGeneration if model_type == "qwen2_5_vl" else Qwen2ForCausalLM
    return model.from_pretrained(folder).eval()


class TestContent:
    def test_text_weights_are_kept_bit_for_bit(self, converted):
        source, target = (read_checkpoint(folder) for folder in converted)
        mapped = map_keys(list(source), QWEN_KEYS, "")
        assert {*mapped.values(), HEAD} <= set(target)
        tied = HEAD not in mapped.values()
        for theirs, ours in [*mapped.items()] + ([("model.embed_tokens.weight", HEAD)] if tied else []):
            kept, stored = (torch.cat(list(t.blocks())) for t in (target[ours], source[theirs]))
            assert torch.equal(kept[: stored.numel()].view(torch.int16), stored.view(torch.int16)), ours
            assert kept.numel() == stored.numel() or ours == HEAD

    def test_text_is_the_sources_token_for_token(self, converted):
        source, target = load_source(converted[0]).float(), NextFlowForCausalLM.from_pretrained(converted[1]).float()
        ids = torch.randint(0, 1000, (2, 7), generator=torch.Generator().manual_seed(1))
        settings = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids), eos_token_id=VOCAB - 1)
        assert torch.equal(target.eval().generate(ids, **settings), source.generate(ids, **settings))
        torch.testing.assert_close(target(ids).logits[..., :VOCAB], source(input_ids=ids).logits, atol=1e-5, rtol=1e-5)

    def test_visual_rows_start_as_the_mean_of_the_text_rows(self, converted):
        head = NextFlowForCausalLM.from_pretrained(converted[1]).lm_head.weight
        mean = head[:VOCAB].double().mean(0).bfloat16()
        assert (head[VOCAB:] == mean).all()

    def test_the_codebook_is_the_image_tokenizers(self, converted, image_tokenizer):
        model = NextFlowForCausalLM.from_pretrained(converted[1])
        processor = NextFlowProcessor.from_pretrained(converted[1])
        codebook = processor.image_tokenizer.quantizer.codebook()
        assert torch.equal(model.model.visual_codebook.weight, codebook.bfloat16())
        assert model.config.image_tokenizer_hash == hash_image_tokenizer(processor.image_tokenizer)

    def test_it_draws_and_reads_through_the_processor(self, converted):
        model = NextFlowForCausalLM.from_pretrained(converted[1], dtype=torch.float32)
        processor = NextFlowProcessor.from_pretrained(converted[1])
        batch = processor("a cat", return_tensors="pt")
        output = model.generate(**batch, generation_mode="image", return_dict_in_generate=True)
        picture = processor.decode_images(output.sequences, output.image_grid_shw)[0][0]
        batch = processor("<image>What is it?", images=[picture], return_tensors="pt")
        assert model(**batch).logits.isfinite().all()

    def test_new_parts_are_as_in_a_fresh_model(self, converted):
        model = NextFlowForCausalLM.from_pretrained(converted[1], dtype=torch.float32).model
        fresh = NextFlowForCausalLM(model.config).model
        for name in ("connector.0.weight", "connector.2.weight", "scale_embedding.weight"):
            ours, theirs = (m.get_parameter(name) for m in (model, fresh))
            assert 0.8 < float(ours.std() / theirs.std()) < 1.25, name
        assert not model.connector[0].bias.any() and not model.connector[2].bias.any()

    def test_there_is_a_card_and_no_trace_of_the_work(self, converted):
        source, target = converted
        assert "has not" in (target / "README.md").read_text()
        assert sorted(path.name for path in target.parent.iterdir()) == sorted([source.name, target.name])
        assert not list(target.rglob("*.part*")) and not list(target.rglob("*.plan"))


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("prefixes", [("model.language_model.", "model.visual."), ("model.", "visual.")])
def test_real_sizes_match_both_ways(name, prefixes):
    """On the meta device: the source's keys make exactly the target's, with nothing missing and nothing left over."""
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(vl_config(LARGE[name]))
    text, visual = prefixes  # as transformers saves them now, and as the published shards have them
    source = {}
    for key, tensor in qwen.state_dict().items():
        key = key.replace("model.visual.", visual).replace("model.language_model.", text)
        if not (LARGE[name]["tie_word_embeddings"] and key == HEAD):
            source[key] = StoredTensor(Path("x"), key, tuple(tensor.shape), torch.bfloat16, 0)
    images = NextFlowImageTokenizerConfig()
    config = nextflow_config(qwen.config.get_text_config(), images)
    codebook = torch.zeros(images.codebook_size, images.code_dim)
    plan = {tensor.name: tensor.shape for tensor in plan_nextflow(source, config, new_weights(config, codebook))}
    assert plan == expected_shapes(config)
    assert plan[HEAD] == (LARGE[name]["vocab_size"] + 32768, LARGE[name]["hidden_size"])

    stored = {key: StoredTensor(Path("x"), key, shape, torch.bfloat16, 0) for key, shape in plan.items()}
    back = {tensor.name: tensor.shape for tensor in plan_qwen(stored, config)}
    with torch.device("meta"):
        text_model = Qwen2ForCausalLM(Qwen2Config(**{**LARGE[name], "tie_word_embeddings": False}))
    assert back == {key: tuple(tensor.shape) for key, tensor in text_model.state_dict().items()}


class TestBack:
    def test_there_and_back_is_the_source(self, converted, tmp_path):
        source, nextflow = converted
        back = convert_to_qwen(nextflow, tmp_path / "back")
        ids = torch.arange(12)[None]
        expected = load_source(source)(input_ids=ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(back)(ids).logits, expected)

    def test_nextflow_tiny_both_ways(self, tmp_path):
        tiny = tiny_checkpoint()
        text = convert_to_qwen(tiny, tmp_path / "text")
        model = NextFlowForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        qwen = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
        assert type(qwen) is Qwen2ForCausalLM
        ids = torch.arange(5, 25)[None]
        torch.testing.assert_close(
            qwen(ids).logits, model(ids).logits[..., : model.config.text_vocab_size], atol=1e-4, rtol=1e-4
        )
        again = convert_to_nextflow(text, tmp_path / "again", tiny / "image_tokenizer")
        old, new = (load_file(folder / "model.safetensors") for folder in (tiny, again))
        assert old.keys() == new.keys()
        for name in old:
            if name == HEAD:
                assert torch.equal(old[name][: model.config.text_vocab_size], new[name][: model.config.text_vocab_size])
            elif "connector" not in name and "scale" not in name:
                assert name == "model.visual_codebook.weight" or torch.equal(old[name], new[name]), name


MEASURE = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file
from conversion.qwen2_5 import convert_to_nextflow
from transformers_nextflow import NextFlowForCausalLM, NextFlowImageTokenizer, NextFlowProcessor
import torchvision, transformers.models.qwen2_5_vl
def peak():  # in bytes
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
ctypes.CDLL(None).malloc_trim(0)  # what is free already would not count
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
if sys.argv[2] == "convert":
    convert_to_nextflow(*sys.argv[3:7], max_shard_size="200MB")
else:
    from pathlib import Path
    held = [load_file(path) for path in Path(sys.argv[3]).glob("*.safetensors")]
    [tensor.sum() for shard in held for tensor in shard.values()]
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_stays_below_the_largest_shard(tmp_path, image_tokenizer, forked_process):
    """1.3 times the largest shard is the limit; loading everything shows that it can be missed."""
    source = tmp_path / "source"
    config = Qwen2Config(
        **{**SMALL, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    )
    config.save_pretrained(source)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    names, weight_map = list(shapes), {}
    for shard in range(4):
        own = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names[shard::4]}
        save_file(own, source / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(own, f"model-{shard}.safetensors")
    (source / streaming.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))

    def growth(what: str) -> int:
        arguments = [ROOT, what, source, tmp_path / "out", image_tokenizer, RANKS]
        return int(forked_process(MEASURE, *map(str, arguments)))

    converting, loading = growth("convert"), growth("load")
    print(f"largest shard {largest / 1e6:.0f} MB, converting {converting / 1e6:.0f} MB, loading {loading / 1e6:.0f} MB")
    assert converting < 1.3 * largest < loading


class TestKilled:
    @pytest.fixture
    def arguments(self, tmp_path, image_tokenizer) -> dict:
        source = save_source(tmp_path / "source", "untied")
        return dict(
            source=source,
            output=tmp_path / "out",
            image_tokenizer=image_tokenizer,
            text_tokenizer=RANKS,
            max_shard_size=6000,
        )

    @pytest.fixture
    def killed(self, arguments, tmp_path, monkeypatch) -> dict:
        """The arguments of a conversion that died in the middle of its work."""
        blocks, left = StoredTensor.blocks, iter(range(9))

        def dying(self):
            next(left)
            yield from blocks(self)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(StoredTensor, "blocks", dying)
            convert_to_nextflow(**arguments)
        return arguments

    def test_a_second_run_goes_on_and_keeps_what_is_finished(self, killed, tmp_path):
        partial, output = tmp_path / "out.partial", killed["output"]
        finished = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
        assert finished and not output.exists()
        (partial / ".tmp1234").write_text("what a library left")
        convert_to_nextflow(**killed)
        assert all((output / path.name).stat().st_mtime_ns == time for path, time in finished.items())
        assert not list(output.glob(".*")) and not (output / streaming.PLAN).exists()

    def test_kills_at_any_moment(self, arguments, tmp_path):
        """Started again with the same source it ends as if unbroken; another source or dtype takes nothing over."""
        output, inside = arguments["output"], str(tmp_path / "out")
        other = save_source(tmp_path / "other", "untied", seed=1)
        variants = [arguments, {**arguments, "source": other}, {**arguments, "dtype": torch.float16}]
        unbroken = []
        for index, variant in enumerate(variants):
            (tmp_path / str(index)).mkdir()
            unbroken.append(contents(convert_to_nextflow(**{**variant, "output": tmp_path / str(index) / "out"})))
        assert unbroken[0] != unbroken[1] != unbroken[2]
        moments = run_and_kill(lambda: convert_to_nextflow(**arguments), inside)
        shutil.rmtree(output)
        rng = random.Random(0)
        last = [moments, moments - 1, moments - 2]  # from the last file to the removal of the note
        draws = [rng.randint(1, moments) for _ in range(num_kills(6))]
        for number, moment in enumerate(last + draws):
            assert run_and_kill(lambda: convert_to_nextflow(**arguments), inside, moment) == -1
            for variant, expected in [
                list(zip(variants, unbroken, strict=True))[1 + number % 2],
                (arguments, unbroken[0]),
            ]:
                try:
                    convert_to_nextflow(**variant)
                except ValueError as error:
                    assert "begun by a conversion with another source" in str(error), moment
                    assert variant is not arguments, moment
                else:
                    assert contents(output) == expected, moment
                    shutil.rmtree(output)
            assert not output.exists() and not Path(f"{output}.partial").exists()

    def test_other_settings_are_refused(self, killed):
        with pytest.raises(ValueError, match="begun by a conversion with another source or other settings"):
            convert_to_nextflow(**{**killed, "max_shard_size": 7000})

    def test_another_image_tokenizer_is_refused(self, killed, tmp_path):
        other = shutil.copytree(killed["image_tokenizer"], tmp_path / "other")
        with pytest.raises(ValueError, match="begun by a conversion with another source or other settings"):
            convert_to_nextflow(**{**killed, "image_tokenizer": other})

    @pytest.mark.parametrize("content", [b"", b"\xff\x00", None])
    def test_a_note_that_is_not_whole(self, killed, tmp_path, content):
        note = tmp_path / "out.partial" / streaming.PLAN
        note.unlink() if content is None else note.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"out\.partial\" has no whole conversion\.plan, .* Remove it to start anew"
        ):
            convert_to_nextflow(**killed)


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.name != "README.md" and path.is_file()
    }


def damage(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with something wrong before or after its payload, or cut."""
    end = 8 + int.from_bytes(data[:8], "little")
    kind = rng.randrange(7)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data + rng.randbytes(rng.choice([1, 8, 64]))
    if kind in (2, 3):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            damaged[rng.randrange(end) if kind == 2 else rng.randrange(8)] ^= rng.randrange(1, 256)
        return bytes(damaged)
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    first, second = (header[name] for name in rng.sample(names, 2))
    if kind == 4:
        while prod(first["shape"]) == prod(second["shape"]):  # such a swap makes a file that is whole
            second = header[rng.choice(names)]
        field = rng.choice(["data_offsets", "shape"])
        first[field], second[field] = second[field], first[field]
    elif kind == 5:
        first["dtype"] = rng.choice(["F16", "F32", "F64", "I16", "U8", "F8_E4M3", "", None, 7])
    else:
        field = rng.choice(["data_offsets", "shape"])
        place = rng.randrange(len(first[field]))
        first[field][place] = rng.choice([0, -1, first[field][place] + rng.choice([-2, 2, 10**12]), 1.5, None, "8"])
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[end:]


def test_a_damaged_source_is_refused_or_read_right(tmp_path):
    """Hundreds of damages: a ValueError that names the file, or exactly the right weights."""
    source = save_source(tmp_path / "source", "untied")
    file = source / "model.safetensors"
    whole, images = file.read_bytes(), NextFlowImageTokenizerConfig(codebook_size=16)
    ids = {f"{name}_token_id": 1 for name in ("boi", "eoi", "image", "eos", "pad", "bos")}
    config = nextflow_config(Qwen2Config.from_pretrained(source), images, **ids)
    new = new_weights(config, torch.zeros(images.codebook_size, images.code_dim))

    def weights() -> dict[str, torch.Tensor]:
        plan = plan_nextflow(read_checkpoint(source), config, new, where=str(source))
        return {
            tensor.name: torch.cat([block.flatten().to(tensor.dtype) for block in tensor.blocks()]) for tensor in plan
        }

    right, rng, refused = weights(), random.Random(0), 0
    for case in range(300):
        file.write_bytes(damage(whole, rng))
        try:
            found = weights()
        except ValueError as error:
            assert str(source) in str(error), (case, error)
            refused += 1
        else:
            assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right), case
    assert refused > 250


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", streaming.INDEX])
def test_a_damaged_json_file_is_named(name, tmp_path, image_tokenizer):
    source = save_source(tmp_path / "source", "untied", "20kB")
    load_text_tokenizer(RANKS).save_pretrained(source)
    whole = (source / name).read_bytes()
    for content in (b"", b"[1]", b"\xff\xfe{", whole[: len(whole) // 2], b"[" * 100_000):
        (source / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* is damaged"):
            convert_to_nextflow(source, tmp_path / "out", image_tokenizer)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/x.safetensors", "model.bin", "a\\b.safetensors", 5])
def test_an_index_names_safetensors_files_of_its_folder_only(file, tmp_path):
    (tmp_path / streaming.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=r"must name \*\.safetensors files of its own folder"):
        read_checkpoint(tmp_path)


class TestBadInput:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        return save_source(tmp_path / "source", "untied")

    @pytest.fixture
    def convert(self, source, tmp_path, image_tokenizer):
        """Runs a conversion that must fail, and checks that nothing was left behind."""

        def run(message: str, **changes):
            arguments = dict(source=source, output=tmp_path / "out", image_tokenizer=image_tokenizer)
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(ValueError, match=message):
                convert_to_nextflow(**{**arguments, "text_tokenizer": RANKS, **changes})
            assert sorted(tmp_path.rglob("*")) == before

        return run

    def rewrite(self, source: Path, change):
        weights = load_file(source / "model.safetensors")
        change(weights)
        save_file(weights, source / "model.safetensors")

    def test_another_architecture(self, source, convert):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
        convert('config.json" states the model type "llama"; expected qwen2_5_vl or qwen2')

    def test_a_missing_key(self, source, convert):
        self.rewrite(source, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        convert(r'lacks the weights of "model.layers.1.mlp.up_proj.weight" \(expected shape \(48, 32\)\)')

    def test_a_key_too_many(self, source, convert):
        self.rewrite(source, lambda weights: weights.update({"model.extra": torch.ones(2)}))
        convert('holds the key "model.extra", which no rule expects')

    def test_a_layer_too_many(self, source, convert):
        name = "model.layers.2.mlp.up_proj.weight"
        self.rewrite(source, lambda weights: weights.update({name: torch.ones(2)}))
        convert(f'no place for "{name}" in ".*model.safetensors"')

    def test_a_shape_off_by_one(self, source, convert):
        self.rewrite(source, lambda weights: weights.update({"model.norm.weight": torch.ones(33)}))
        convert(r'"model.norm.weight" in ".*model.safetensors" has the shape \(33,\).* makes it \(32,\)')

    def test_a_truncated_file(self, source, convert):
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        convert(r'model.safetensors" is truncated or damaged: its header promises \d+ bytes, but it has \d+')

    @pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64])
    def test_no_safetensors_file(self, source, convert, content):
        (source / "model.safetensors").write_bytes(content)
        convert("is not a whole safetensors file")

    def test_a_pickle(self, source, convert):
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        convert(r"only pickled weights \(pytorch_model.bin\), which can run code; expected \*.safetensors")

    def test_a_missing_shard(self, source, convert):
        (source / streaming.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "b.safetensors"}}))
        convert("lacks b.safetensors, which .* names")

    def test_a_quantised_checkpoint(self, source, convert):
        self.rewrite(source, lambda weights: weights.update({HEAD: torch.ones(VOCAB, 32, dtype=torch.int8)}))
        convert('"lm_head.weight" in .* has the dtype I8; expected one of')

    def test_an_output_that_is_there(self, convert, tmp_path):
        (tmp_path / "out").mkdir()
        convert("is there already and is not overwritten")

    def test_a_full_disk(self, convert, monkeypatch):
        monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        convert("are still to be written, but the disk of .* has only 0.0 GB free")

    def test_no_tokenizer(self, convert, source):
        convert("There is no tokenizer at", text_tokenizer=source)

    def test_an_image_tokenizer_with_schedules_of_its_own(self, convert, image_tokenizer, tmp_path):
        own = shutil.copytree(image_tokenizer, tmp_path / "own")
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps({**config, "scale_sides": [1, 2, 4, 6, 8], "num_scales": 5}))
        convert("The image tokenizer has schedules of its own", image_tokenizer=own)

    def test_a_tokenizer_of_another_model(self, convert):
        message = r"The tokenizer has \d+ tokens .* but the source's vocabulary has 1100"
        convert(message, text_tokenizer=tiny_checkpoint())

    def test_back_wants_whole_weights_too(self, tmp_path):
        tiny = shutil.copytree(tiny_checkpoint(), tmp_path / "tiny")
        weights = load_file(tiny / "model.safetensors")
        save_file({**weights, "model.layers.6.x": torch.ones(1)}, tiny / "model.safetensors")
        with pytest.raises(ValueError, match=r'no place for "model\.layers\.6\.x"'):
            convert_to_qwen(tiny, tmp_path / "out")
        weights.pop(HEAD)
        save_file(weights, tiny / "model.safetensors")
        with pytest.raises(ValueError, match=r'lacks the weights of "lm_head\.weight"'):
            convert_to_qwen(tiny, tmp_path / "out")

    def test_back_takes_nextflow_only(self, source, tmp_path):
        with pytest.raises(ValueError, match='states the model type "qwen2"; expected nextflow'):
            convert_to_qwen(source, tmp_path / "out")


def test_the_command(tmp_path, image_tokenizer, capsys):
    source = save_source(tmp_path / "source", "tied")
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    tokenizers = ["--image-tokenizer", str(image_tokenizer), "--text-tokenizer", str(RANKS)]
    main(["--source", str(source), "--output", out, *tokenizers, "--dtype", "float32", "--max-shard-size", "100kB"])
    assert NextFlowForCausalLM.from_pretrained(out).dtype == torch.float32
    assert (tmp_path / "out" / streaming.INDEX).is_file()
    main(["--source", out, "--output", back, "--back"])
    assert capsys.readouterr().out.count("Written") == 2
    with pytest.raises(SystemExit) as stop:
        main(["--source", out, "--output", back, "--back"])
    assert stop.value.code == 1 and "is there already" in capsys.readouterr().err


def test_blocks_make_up_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 64)
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.randn(2, 3, 4), "d": torch.ones(())}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, stored in read_header(tmp_path / "x.safetensors").items():
        blocks = list(stored.blocks())
        assert torch.equal(torch.cat(blocks).view(stored.shape), tensors[name])
        assert name != "a" or len(blocks) > 1
