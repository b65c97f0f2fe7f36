"""Other libraries and torch's own tools around an optimizer: every run equals torch.optim's."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import OURS, TORCH, assert_same, give_gradients, parameters, twins
from torch import nn

from tritonopt.device import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter rounds square roots otherwise")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator))
        for _ in range(count)
    ]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def plain(make, model, hook=lambda model, optimizer: None, forward=None):
    """The weights after training; `hook` runs before each step."""
    optimizer = make(model.parameters(), lr=0.01)
    for x, y in batches():
        optimizer.zero_grad()
        output = model(x) if forward is None else forward(model, x)
        (output - y).square().mean().backward()
        hook(model, optimizer)
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def clip(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def call(model, x):
    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def normalized():
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    "build, options",
    [
        pytest.param(network, {"hook": clip}, id="clip_grad_norm_"),
        pytest.param(network, {"forward": call}, id="functional_call"),
        pytest.param(normalized, {}, id="weight_norm"),
    ],
)
def test_torch(build, options, name):
    assert_equal(*[plain(make[name], build(), **options) for make in (OURS, TORCH)])


def test_weight_norm_after_the_optimizer(name):
    """Its parameters are new: the optimizer goes on with those it has, as torch's does."""

    def train(make):
        model = network()
        optimizer = make(model.parameters(), lr=0.01)
        nn.utils.parametrizations.weight_norm(model[0])
        for x, y in batches():
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    assert_equal(train(OURS[name]), train(TORCH[name]))


def test_averaged_model(name):
    def train(make):
        model = network()
        average = torch.optim.swa_utils.AveragedModel(model)
        plain(make, model, hook=lambda model, _: average.update_parameters(model))
        return average.state_dict()

    assert_equal(train(OURS[name]), train(TORCH[name]))


def test_grad_scaler_skips_infinite_steps(name):
    def train(make):
        model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = make(model.parameters(), lr=0.01)
        for number, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if number % 3 == 1:
                model[2].bias.grad[0] = torch.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        steps = [optimizer.state[p]["step"] for p in model.parameters()]
        return {**model.state_dict(), "steps": torch.stack(steps)}, scaler.get_scale()

    (ours, scale), (theirs, expected) = train(OURS[name]), train(TORCH[name])
    assert_equal(ours, theirs)
    assert scale == expected and ours["steps"].tolist() == [4.0] * 4


class Named(torch.nn.Parameter):
    """As libraries have them, to mark parameters."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, Named])
def test_cast_before_the_first_step(name, kind):
    """State exists from construction on; it must follow a model that is cast afterwards."""
    params = [kind(p.detach()) for p in parameters()]
    ours, theirs, copies = twins(name, params)
    for param in (*params, *copies):
        param.data = param.data.double()
    give_gradients(params, copies)
    ours.step()
    theirs.step()
    assert_same(ours, theirs, params, copies)
    assert "torch" not in ours.describe().splitlines()[1]


def test_accelerate(name):
    accelerate = pytest.importorskip("accelerate")

    def train(make):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        optimizer = make(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

        def steps(some):
            for x, y in some:
                with accelerator.accumulate(model):
                    accelerator.backward((model(x) - y).square().mean())
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

        steps(batches()[:4])
        accelerator.save_state("state")
        steps(batches()[4:])
        accelerator.load_state("state")
        steps(batches()[4:])
        return {key: value.clone() for key, value in model.state_dict().items()}

    assert_equal(train(OURS[name]), train(TORCH[name]))


@pytest.mark.slow
@pytest.mark.parametrize("writer, reader", [(OURS, TORCH), (TORCH, OURS)], ids=["to", "from"])
def test_accelerate_across(name, writer, reader):
    """State that was saved with one class is loaded with the other."""
    accelerate = pytest.importorskip("accelerate")

    def train(classes):
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        model, optimizer = accelerator.prepare(model, classes[0][name](model.parameters(), lr=0.01))
        for x, y in batches():
            accelerator.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state("state")
        accelerator.free_memory()
        fresh = network()
        fresh, optimizer = accelerator.prepare(fresh, classes[1][name](fresh.parameters(), lr=0.02))
        accelerator.load_state("state")
        for x, y in batches():
            accelerator.backward((fresh(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return {key: value.clone() for key, value in fresh.state_dict().items()}

    assert_equal(train((writer, reader)), train((TORCH, TORCH)))


class Regression(nn.Module):
    """What the Hugging Face Trainer asks of a model: it computes its loss."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        return {"loss": (self.net(x) - labels).square().mean()}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        x, y = batches()[index // 8]
        return {"x": x[index % 8], "labels": y[index % 8]}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_hugging_face_trainer(way, name):
    transformers = pytest.importorskip("transformers")

    def trainer(make, epochs):
        arguments = transformers.TrainingArguments(
            "out", num_train_epochs=epochs, per_device_train_batch_size=8, save_strategy="epoch",
            use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        model = Regression()
        given = {"optimizer_cls_and_kwargs": (make, {"lr": 0.01})}
        if way == "optimizers":
            given = {"optimizers": (make(model.parameters(), lr=0.01), None)}
        return transformers.Trainer(model, arguments, train_dataset=Rows(), **given), model

    def train(first, then):
        trainer(first[name], 1)[0].train()
        resumed, model = trainer(then[name], 3)
        resumed.train(resume_from_checkpoint=True)
        return model.state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train(TORCH, TORCH)
        for first, then in ((OURS, OURS), (OURS, TORCH), (TORCH, OURS)):
            assert_equal(train(first, then), expected)


def test_safetensors(name):
    safetensors = pytest.importorskip("safetensors.torch")
    model = network()
    trained = plain(OURS[name], model)
    safetensors.save_model(model, "model.safetensors")
    fresh = network()
    OURS[name](fresh.parameters())
    safetensors.load_model(fresh, "model.safetensors")
    assert_equal(fresh.state_dict(), trained)


def test_hub_mixin(name):
    hub = pytest.importorskip("huggingface_hub")

    class Model(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

    model = Model()
    trained = plain(OURS[name], model)
    model.save_pretrained("hub")
    assert_equal(Model.from_pretrained("hub").state_dict(), trained)
