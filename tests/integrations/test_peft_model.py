"""A PEFT model taken over and given back: a Llama, torch.compile, copies, pickles, the report."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from peft_models import BF16, F64, layer_of, learnt, one_layer, peft, randomise
from torch import nn

import genai_kernels as gk
from genai_kernels.integrations import peft as accelerated

# ---- a Llama ----


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    model = peft.get_peft_model(model, peft.LoraConfig(**options), "one")
    model.add_adapter("two", peft.LoraConfig(**options | {"r": 6, "use_rslora": True}))
    return randomise(model).double().eval()


TOKENS = torch.arange(60).view(3, 20) * 7 % 50


def losses_of(model, steps=4):
    optimizer = torch.optim.SGD(learnt(model), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama_trains(llama, checkpointing):
    theirs, ours = copy.deepcopy(llama).train(), copy.deepcopy(llama).train()
    report = accelerated.accelerate(ours)
    if checkpointing:
        for model in (theirs, ours):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = losses_of(theirs)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses_of(ours), expected)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    # computed again in backward, but for each block's last layer, whose output nothing else needs
    assert report.served == {"float64, one adapter": (14 + 12 * checkpointing) * 4}
    assert set(report.layers.values()) == {"fused"}
    assert not report.passed_on


def test_llama_generates(llama):
    expected = llama.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False)
    names = ["two", "__base__", "one"]
    mixed = llama.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False, adapter_names=names)
    logits = llama(input_ids=TOKENS, adapter_names=names).logits
    with accelerated.accelerate(llama) as report:
        assert torch.equal(llama.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False), expected)
        found = llama.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False, adapter_names=names)
        assert torch.equal(found, mixed)
        torch.testing.assert_close(llama(input_ids=TOKENS, adapter_names=names).logits, logits)
    assert report.served == {"float64, one adapter": 14 * 8, "float64, adapters by row": 14 * 9}
    assert not torch.equal(expected, mixed)


def test_llama_is_saved_alike(llama, tmp_path):
    llama.save_pretrained(tmp_path / "before")
    with accelerated.accelerate(llama):
        llama.save_pretrained(tmp_path / "after")
    files = sorted(p.relative_to(tmp_path / "before") for p in (tmp_path / "before").rglob("*") if p.is_file())
    assert len(files) >= 4
    for file in files:
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


# ---- torch.compile, pickles, copies, and back ----


def test_torch_compile():
    model, x = one_layer("one", "two", dtype=F64, adapter_dtype=F64), torch.randn(5, 40, dtype=F64)
    layer, parameters = layer_of(model), None
    for names in ("one", ["one", "two"]):
        model.base_model.set_adapter(names)
        parameters = learnt(model)
        expected = layer(x)
        gradients = torch.autograd.grad(expected.square().sum(), parameters)
        with accelerated.accelerate(model) as report:
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            y = compiled(x)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y.square().sum(), parameters), gradients)
            assert report.served.total() >= 1
            compiled(x)
            with model.disable_adapter():
                torch.testing.assert_close(compiled(x), layer.base_layer(x))
            torch.testing.assert_close(compiled(x), expected)
            assert not report.passed_on
        torch.compiler.reset()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_torch_compile_of_other_adapters(options):
    model, x = one_layer(dtype=F64, adapter_dtype=F64, **options).eval(), torch.randn(5, 40, dtype=F64)
    expected = layer_of(model)(x)
    report = accelerated.accelerate(model)
    torch.testing.assert_close(torch.compile(layer_of(model), fullgraph=True, backend="aot_eager")(x), expected)
    assert report.served.total() == 1
    torch.compiler.reset()


def test_torch_compile_with_a_scaling_that_is_a_tensor():
    model, x = one_layer(), torch.randn(5, 40)
    layer_of(model).scaling["default"] = torch.tensor(0.5)
    expected = layer_of(model)(x)
    report = accelerated.accelerate(model)
    torch.testing.assert_close(torch.compile(layer_of(model), fullgraph=True, backend="aot_eager")(x), expected)
    assert set(report.passed_on) == {"a scaling that is a tensor, under torch.compile"}
    torch.compiler.reset()


def everything(model):
    """What a layer is, down to the objects in it."""
    return {
        name: (type(m), {k: id(v) for k, v in vars(m).items()}, {k: id(v) for k, v in m.named_parameters()})
        for name, m in model.named_modules()
    }


def test_restored_as_it_was():
    model = one_layer("one", "two")
    before, states, text = everything(model), copy.deepcopy(model.state_dict()), repr(model)
    accelerated.accelerate(model)
    assert repr(model) == text
    assert isinstance(layer_of(model), peft.tuners.lora.Linear)
    assert list(model.state_dict()) == list(states)
    layer_of(model)(torch.randn(2, 40))
    accelerated.restore(model)
    assert everything(model) == before
    with accelerated.accelerate(model), accelerated.accelerate(model):
        assert everything(model) != before
    assert everything(model) == before
    with pytest.raises(KeyError), accelerated.accelerate(model):
        raise KeyError
    assert everything(model) == before
    accelerated.restore(model)
    assert everything(model) == before
    assert all(torch.equal(t, states[name]) for name, t in model.state_dict().items())


def test_the_inner_of_two_leaves_the_outer():
    model = one_layer()
    with accelerated.accelerate(model) as outer:
        with accelerated.accelerate(model):
            pass
        layer_of(model)(torch.randn(2, 40))
        assert outer.served.total() == 1
        assert list(outer.layers.values()) == ["fused"]


def test_a_forward_that_someone_kept_serves_as_pefts():
    model, x = one_layer(), torch.randn(2, 40)
    expected = layer_of(model)(x)
    with accelerated.accelerate(model) as report:
        kept = layer_of(model).forward
    assert torch.equal(kept(x), expected)
    assert not report.served


def test_copies_and_pickles():
    model, x = one_layer("one", "two"), torch.randn(2, 40)
    theirs = layer_of(model)(x)
    report = accelerated.accelerate(model)
    ours = layer_of(model)(x)
    twin = copy.deepcopy(model)
    assert torch.equal(layer_of(twin)(x), ours)
    assert report.served.total() == 2
    assert layer_of(twin).base_layer.weight is not layer_of(model).base_layer.weight
    accelerated.restore(twin)
    assert type(layer_of(twin)) is peft.tuners.lora.Linear
    assert torch.equal(layer_of(twin)(x), theirs)
    assert list(report.layers.values()) == ["fused"]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    data = pickle.dumps(model)
    assert b"genai_kernels" not in data
    assert b"genai_kernels" not in file.getvalue()
    for read in (torch.load(file, weights_only=False), pickle.loads(data)):
        assert type(layer_of(read)) is peft.tuners.lora.Linear
        assert torch.equal(layer_of(read)(x), theirs)


def test_the_report():
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Embedding(4, 8), "d": nn.Conv2d(4, 4, 1)}
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["a", "b", "c", "d"]))
    layers = model.base_model.model
    layers["b"].lora_A.register_forward_hook(lambda *a: None)  # on the dict, which nobody calls
    handle = layers["b"].lora_A["default"].register_forward_hook(lambda *a: None)
    report = accelerated.accelerate(model)
    for name in "aab":
        layers[name](torch.ones(2, 8))
    layers["c"](torch.tensor([1]))
    with model.disable_adapter():
        layers["a"](torch.ones(2, 8))
    assert str(report) == (
        "layers on genai_kernels: 1\n"
        "layers left to PEFT: 3\n"
        "          base_model.model.b: a hook on lora_A\n"
        "          base_model.model.c: lora.layer.Embedding: not a lora.Linear\n"
        "          base_model.model.d: lora.layer.Conv2d: not a lora.Linear\n"
        "calls served by genai_kernels: 2\n"
        "       2  float32, one adapter\n"
        "calls passed on to PEFT: 1\n"
        "       1  a hook on lora_A (base_model.model.b)\n"
        "calls of the base layer alone: 1\n"
        "       1  adapters disabled"
    )
    handle.remove()
    assert report.layers["base_model.model.b"] == "fused"
    assert report.where == {"a hook on lora_A": {"base_model.model.b": 1}}


def test_a_model_without_peft_is_refused():
    with pytest.raises(ValueError, match="model: expected PEFT's layers in it, got Linear without any"):
        accelerated.accelerate(nn.Linear(2, 2))


def test_importing_imports_no_peft():
    code = "import sys; import genai_kernels.integrations.peft; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_eager_twin():
    model, x = one_layer(dtype=BF16), torch.randn(6, 40).to(BF16)
    expected = layer_of(model)(x)
    accelerated.accelerate(model)
    with gk.use_backend("reference"):
        assert torch.equal(layer_of(model)(x), expected)
