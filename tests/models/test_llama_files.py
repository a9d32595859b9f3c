"""Checkpoints: round trips with transformers, memory, and files that are not what they should be."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from python_models import llama_files
from python_models.llama import Llama
from python_models.llama_configs import FAMILIES, KNOWN, Config, RopeScaling, from_hf, to_hf

TINY = Config(vocabulary=60, layers=2, width=32, heads=4, kv_heads=2, hidden=48, context=64, bos=1, eos=(2, 3))
VARIANTS = {
    "llama": dataclasses.replace(TINY, rope=RopeScaling("llama3", 8.0, 1.0, 4.0, 16), qkv_bias=True, out_bias=True),
    "mistral": dataclasses.replace(TINY, family="mistral", window=9, head_dim=16),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied=True, window=7, window_from=1),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, tied=True),
}
TEXT = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(1))


def tiny(config=TINY):
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours
    )


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- there and back ----


@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_ours_to_transformers_to_ours(name, dtype, shards, tmp_path):
    model = tiny(VARIANTS[name]).to(dtype)
    llama_files.save(model, tmp_path / "ours", max_shard_bytes=10**9 if shards == 1 else 6000)
    written = sorted(p.name for p in (tmp_path / "ours").iterdir())
    assert (written == ["config.json", "model.safetensors"]) == (shards == 1)
    assert (llama_files.INDEX in written) == (shards != 1)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(theirs).__name__ == FAMILIES[name]
    assert theirs.dtype == dtype
    ours = llama_files.load(tmp_path / "ours")
    assert same(ours, model)
    assert ours.config == dataclasses.replace(model.config, dtype=str(dtype).removeprefix("torch."))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=10**9 if shards == 1 else 6000)
    again = llama_files.load(tmp_path / "theirs")
    assert same(again, model)
    assert again.config == ours.config
    assert (again.head.weight is again.embedding.weight) == model.config.tied


def test_another_dtype(tmp_path):
    model = tiny().to(torch.bfloat16)
    llama_files.save(model, tmp_path)
    loaded = llama_files.load(tmp_path, dtype=torch.float32)
    assert same(loaded, model.float())


def test_saving_over_an_earlier_save(tmp_path):
    first, second = tiny(), tiny(VARIANTS["qwen3"])
    llama_files.save(first, tmp_path, max_shard_bytes=6000)
    llama_files.save(second, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(llama_files.load(tmp_path), second)
    llama_files.save(first, tmp_path, max_shard_bytes=6000)
    assert not (tmp_path / "model.safetensors").exists()
    assert same(llama_files.load(tmp_path), first)


def test_a_loaded_model_does_not_hold_its_files(tmp_path):
    model = tiny()
    llama_files.save(model, tmp_path)
    loaded = llama_files.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert same(loaded, model)
    loaded.loss(TEXT[:, :-1], TEXT[:, 1:]).backward()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from Linux' proc")
def test_loading_takes_the_memory_of_the_model(tmp_path):
    """Anonymous memory at its highest, in a process of its own: the weights once, whatever is packed from parts."""
    config = dataclasses.replace(TINY, vocabulary=8000, layers=4, width=512, heads=8, kv_heads=8, hidden=2048)
    with torch.device("meta"):
        size = 2 * sum(w.numel() for w in Llama(config).parameters())
    assert size > 40e6
    model = Llama(config).to(torch.bfloat16)
    llama_files.save(model, tmp_path / "large")
    llama_files.save(tiny(), tmp_path / "tiny")
    program = """
        import re, sys, threading, time
        from pathlib import Path
        import torch
        from python_models import llama_files
        def anonymous():
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        llama_files.load(sys.argv[2])  # what PyTorch imports for its first module on the meta device is not the weights
        before, most, over = anonymous(), 0, False
        def watch():
            global most
            while not over:
                most = max(most, anonymous() - before)
                time.sleep(0.001)
        watcher = threading.Thread(target=watch)
        watcher.start()
        model = llama_files.load(sys.argv[1])
        over = True
        watcher.join()
        print(max(most, anonymous() - before))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "large"), str(tmp_path / "tiny")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert size <= int(run.stdout) + 2**20
    assert int(run.stdout) <= 1.05 * size + 2**22


# ---- config.json ----


def test_old_and_new_forms_say_the_same():
    new = to_hf(KNOWN["llama-3.2-1b"])
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype", "head_dim")}
    assert old["rope_theta"] == 500000.0
    assert old["rope_scaling"]["rope_type"] == "llama3"
    newest = {k: v for k, v in new.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    oldest = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf(old) == from_hf(newest) == KNOWN["llama-3.2-1b"]
    assert from_hf(oldest).rope == RopeScaling("linear", 2.0)
    # a Llama 2 of the first days: no theta, no kv heads, no head_dim
    plain = {k: v for k, v in old.items() if not k.startswith("rope") and k != "num_key_value_heads"}
    assert (from_hf(plain).rope_theta, from_hf(plain).kv_heads) == (10000.0, 32)


def test_windows_of_qwen():
    base = to_hf(VARIANTS["qwen2"])
    assert from_hf({**base, "use_sliding_window": False}).window is None
    kinds = ["full_attention", "sliding_attention"]
    found = from_hf({**base, "layer_types": kinds, "max_window_layers": 0})
    assert [found.window_size(i) for i in range(2)] == [(-1, 0), (6, 0)]
    with pytest.raises(ValueError, match="layer_types: expected full_attention, then sliding_attention"):
        from_hf({**base, "layer_types": kinds[::-1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type: expected one of llama, mistral, qwen2, qwen3, got 'gpt_neox'"),
        ({"model_type": None}, "model_type: expected one of llama"),
        ({"hidden_size": None}, "hidden_size: expected a whole number above 0, got None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: expected a whole number above 0, got '2'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: expected one of default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "got 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear': expected factor beside it"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "expected low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ({"num_key_value_heads": 3}, "heads: expected a multiple of kv_heads = 3"),
        ({"dtype": "float8_e4m3fn"}, "dtype: expected one of float32"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf({**to_hf(TINY), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": True}, "qkv_bias: expected none: config.json of 'llama' cannot say it"),
        ({"window": 5}, "window: expected none"),
        ({"family": "mistral", "mlp_bias": True}, "mlp_bias: expected none"),
        ({"family": "qwen3"}, "qk_norm: expected True, as in every 'qwen3'"),
        ({"family": "qwen2"}, "qkv_bias: expected True, as in every 'qwen2'"),
    ],
)
def test_configs_without_words(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        llama_files.save(Llama(dataclasses.replace(TINY, **change)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- files that are not what they should be ----


def missing(tensors):
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def unknown(tensors):
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(16, 32)


def wrong_shape(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(32, 48)


def integers(tensors):
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)


def mixed(tensors):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"none named model.layers.1.self_attn.k_proj.weight"),
        (unknown, r"also model.layers.2.self_attn.k_proj.weight"),
        (wrong_shape, r"model.layers.0.mlp.up_proj.weight: expected shape \[48, 32\] by config.json, got \[32, 48\]"),
        (integers, r"model.norm.weight: expected one of F32, BF16, F16, F64, got I8; a quantised checkpoint"),
        (mixed, r"q_proj.weight: expected one dtype with those packed beside it; set dtype"),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    llama_files.save(tiny(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        llama_files.load(tmp_path)
    if change is mixed:
        assert llama_files.load(tmp_path, dtype=torch.float32).embedding.weight.dtype == torch.float32


def test_tensors_that_other_writers_leave(tmp_path):
    """Frequencies in files of 2023, and the head of a tied model written a second time: equal is fine."""
    model = tiny(VARIANTS["qwen3"])
    llama_files.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(llama_files.load(tmp_path), model)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight: expected the embedding.*tie_word_embeddings to false"):
        llama_files.load(tmp_path)


def test_broken_files(tmp_path):
    llama_files.save(tiny(), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for broken in (b"", whole[:5], whole[:200], whole[:-1], b"\xff" * 64, whole + b"more"):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"model.safetensors: expected a whole safetensors file"):
            llama_files.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        llama_files.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected an object, got list"):
        llama_files.load(tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config.json in"):
        llama_files.load(tmp_path)
    llama_files.save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle, which can run any code"):
        llama_files.load(tmp_path)


def test_broken_index(tmp_path):
    llama_files.save(tiny(), tmp_path, max_shard_bytes=6000)
    index = json.loads((tmp_path / llama_files.INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    assert index["metadata"]["total_size"] == 4 * sum(w.numel() for w in tiny().parameters())
    for where in ("../elsewhere.safetensors", "/elsewhere.safetensors"):
        moved = {n: where if f == first else f for n, f in index["weight_map"].items()}
        (tmp_path / llama_files.INDEX).write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(ValueError, match="expected files of this folder, got"):
            llama_files.load(tmp_path)
    (tmp_path / llama_files.INDEX).write_text(json.dumps({"weight_map": [first]}))
    with pytest.raises(ValueError, match="expected an object weight_map of file names"):
        llama_files.load(tmp_path)
    (tmp_path / llama_files.INDEX).write_text(json.dumps(index))
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"{first}: expected a file, as {llama_files.INDEX} says, found none"):
        llama_files.load(tmp_path)


def test_config_and_files_disagree(tmp_path):
    llama_files.save(tiny(), tmp_path)
    rewrite(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"none named .* and 6 more"):
        llama_files.load(tmp_path)
    rewrite(tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings to false"):
        llama_files.load(tmp_path)
