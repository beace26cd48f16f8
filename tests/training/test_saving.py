"""What is saved opens with the stock libraries, is bit-equal, and saving it has moved nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gendiff.testing import text, tiny_pipeline
from gendiff.training import folder as folder_module
from gendiff.training import saving
from gendiff.training.names import canonical, parameters
from gendiff.training.saving import load_pretrained, save_pretrained
from tests.training.kept import Codec, aligned, components, images, moved, network, put, same, snapshot

# ---- whole models


def test_a_pipeline_opens_with_the_averages_and_nothing_live_has_moved(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipe = tiny_pipeline("sd15")
    trained = components(pipe, "unet", "text_encoder")
    live = parameters(trained)
    averages = moved(live)
    untuned, before = images(pipe), snapshot(trained, pipe)
    save_pretrained(trained, tmp_path / "run", weights=averages, pipeline=pipe)
    assert same(before, snapshot(trained, pipe))

    opened = DiffusionPipeline.from_pretrained(tmp_path / "run", local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionPipeline
    for name, p in opened.unet.named_parameters():
        assert torch.equal(p, averages[f"model.backbone.network.{name}"])
        assert not torch.equal(p, live[f"model.backbone.network.{name}"])
    for name, p in opened.text_encoder.named_parameters():
        assert torch.equal(p, averages[f"codec.text_encoder.{name}"])
    assert same(opened.vae.state_dict(), pipe.vae.state_dict())

    tuned = images(aligned(opened))
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    assert torch.equal(images(pipe), untuned)
    put(live, averages)
    assert torch.equal(tuned, images(pipe))


@pytest.mark.parametrize("kind", ["flux", pytest.param("sd15", marks=pytest.mark.slow)])
def test_models_come_back_bit_equal_without_a_pipeline(tmp_path: Path, kind: str) -> None:
    first, second = tiny_pipeline(kind, seed=0), tiny_pipeline(kind, seed=1)
    trained, fresh = (components(pipe, "unet", "transformer", "text_encoder") for pipe in (first, second))
    save_pretrained(trained, tmp_path / "run")
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert files == {"README.md", "gendiff.json", "network", "text_encoder"}
    assert not same(parameters(trained), parameters(fresh))
    load_pretrained(fresh, tmp_path / "run")
    assert same(parameters(trained), parameters(fresh))
    assert same(first.text_encoder.state_dict(), second.text_encoder.state_dict())


def test_tied_weights_of_a_model_stay_tied(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    first, fresh = (text.t5_encoder(text.t5_tokenizer(), width=8) for _ in range(2))
    averages = moved(parameters({"encoder": first}))
    save_pretrained({"encoder": first}, tmp_path / "run", weights=averages)
    first.save_pretrained(tmp_path / "stock")
    ours, stock = (
        load_file(at / "model.safetensors") for at in (tmp_path / "run" / "encoder", tmp_path / "stock")
    )
    assert set(ours) == set(stock)
    assert len(ours) < len(first.state_dict())
    load_pretrained({"encoder": fresh}, tmp_path / "run")
    opened: Any = T5EncoderModel.from_pretrained(tmp_path / "run" / "encoder")
    for model in (fresh, opened):
        assert model.shared.weight is model.encoder.embed_tokens.weight
        assert same(parameters({"encoder": model}), averages)


def test_a_model_that_trains_in_part_is_saved_whole(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    unet: Any = tiny_pipeline("ddpm").components["unet"]
    for name, p in unet.named_parameters():
        p.requires_grad_("attentions" in name)
    averages = moved(parameters({"unet": unet}))
    assert 0 < len(averages) < len(unet.state_dict())
    save_pretrained({"unet": unet}, tmp_path / "run", weights=averages)
    opened = UNet2DModel.from_pretrained(tmp_path / "run" / "unet").state_dict()
    assert same(opened, {name: averages.get(f"unet.{name}", p) for name, p in unet.state_dict().items()})


def test_trained_float32_in_a_model_of_bfloat16_is_not_rounded_when_it_is_opened(tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    encoder: Any = text.clip_encoder(text.clip_tokenizer(), width=16).to(torch.bfloat16)
    encoder.requires_grad_(False)
    for name, p in encoder.named_parameters():
        if "layers" in name:
            p.data = moved({"p": p.float()})["p"]
            p.requires_grad_(True)
    save_pretrained({"encoder": encoder}, tmp_path / "run")
    opened = CLIPTextModel.from_pretrained(tmp_path / "run" / "encoder").state_dict()
    assert same(opened, {name: p.float() for name, p in encoder.state_dict().items()})
    assert encoder.config.dtype != torch.float32


def test_a_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    trained = {"unet": tiny_pipeline("ddpm").components["unet"], "net": network()}
    save_pretrained(trained, tmp_path / "run", dtype=torch.float16)
    for name, file in (("unet", "unet/diffusion_pytorch_model.safetensors"), ("net", "net.safetensors")):
        live = trained[name].state_dict()
        for key, tensor in load_file(tmp_path / "run" / file).items():
            assert same(tensor, live[key].half() if live[key].is_floating_point() else live[key])
    with pytest.raises(ValueError, match="floating-point"):
        save_pretrained(trained, tmp_path / "other", dtype=torch.int8)
    put({"p": trained["net"][0].bias}, {"p": torch.full((4,), 7e4)})  # pyright: ignore
    with pytest.raises(ValueError, match=r"infinity in 'net\.0\.bias' as torch\.float16"):
        save_pretrained(trained, tmp_path / "other", dtype=torch.float16)


def test_a_compiled_block_inside_a_model_leaves_no_trace_in_its_files(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    unet: Any = tiny_pipeline("ddpm").components["unet"]
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    save_pretrained({"unet": unet}, tmp_path / "run")
    opened = UNet2DModel.from_pretrained(tmp_path / "run" / "unet").state_dict()
    assert same(opened, {canonical(unet, name): p for name, p in unet.state_dict().items()})
    assert not any("_orig_mod" in name for name in opened)


# ---- other modules


def test_any_module_comes_back_with_its_buffers(tmp_path: Path) -> None:
    net, fresh = network(), network()
    assert not net[2].weight.is_contiguous()
    net(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
    save_pretrained({"net": net}, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "net.safetensors")
    assert set(net.state_dict()) - set(saved) == {"3.weight", "3.bias"}  # what is frozen is not saved
    load_pretrained({"net": fresh}, tmp_path / "run")
    assert same({name: fresh.state_dict()[name] for name in saved}, saved)
    assert same({name: net.state_dict()[name] for name in saved}, saved)


def test_tied_parameters_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    net, fresh = tied(), tied()
    save_pretrained({"net": net}, tmp_path / "run")
    assert set(load_file(tmp_path / "run" / "net.safetensors")) == {"0.weight", "0.bias", "1.bias"}
    load_pretrained({"net": fresh}, tmp_path / "run")
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh[1].weight, net[0].weight)


def test_names_are_canonical_whatever_wraps(tmp_path: Path) -> None:
    net, fresh = network(), network()
    wrapped = nn.parallel.DataParallel(torch.compile(net, backend="eager"))  # pyright: ignore
    save_pretrained({"net": wrapped}, tmp_path / "run")
    load_pretrained({"net": fresh}, tmp_path / "run")
    assert same(parameters({"net": fresh}), parameters({"net": net}))


# ---- refusals


def broken(value: float) -> nn.Module:
    net = network()
    put({"bias": net[2].bias}, {"bias": torch.tensor([0.0, value, 0.0])})
    return net


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda: network().requires_grad_(False), {}, "nothing in 'net' requires grad"),
        (lambda: broken(float("nan")), {}, r"NaN or infinity in 'net\.2\.bias'; nothing"),
        (lambda: broken(float("inf")), {}, r"NaN or infinity in 'net\.2\.bias'; nothing"),
        (network, {"weights": {}}, r"not for 'net\.0\.weight'"),
        (network, {"weights": {"net.0.wieght": torch.zeros(1)}}, r"did you mean 'net\.0\.weight'"),
        (network, {"card": {"licence": "mit"}}, "did you mean 'license'"),
    ],
)
def test_what_cannot_be_saved_is_named(
    tmp_path: Path, make: Callable[[], nn.Module], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        save_pretrained({"net": make()}, tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_averages_are_looked_at_too(tmp_path: Path) -> None:
    net = network()
    averages = moved(parameters({"net": net}))
    for wrong, says in ((torch.full((3,), float("nan")), "NaN"), (torch.zeros(2), "shape")):
        with pytest.raises(ValueError, match=says):
            save_pretrained({"net": net}, tmp_path / "run", weights=averages | {"net.2.bias": wrong})


def test_a_sharded_tensor_is_refused(tmp_path: Path) -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            return self

    net = network()
    averages = moved(parameters({"net": net}))
    shard = averages["net.0.bias"].as_subclass(Sharded)
    with pytest.raises(ValueError, match=r"net\.0\.bias is sharded"):
        save_pretrained({"net": net}, tmp_path / "run", weights=averages | {"net.0.bias": shard})
    net[1].running_mean = torch.zeros(4).as_subclass(Sharded)
    with pytest.raises(ValueError, match=r"net\.1\.running_mean is sharded"):
        save_pretrained({"net": net}, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_two_things_of_one_name_are_refused(tmp_path: Path) -> None:
    one, two = tiny_pipeline("flux"), tiny_pipeline("flux")
    holders = {"a": Codec(one), "b": Codec(two)}
    for holder in holders.values():
        holder.vae.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'a\.text_encoder' and 'b\.text_encoder' would both"):
        save_pretrained(holders, tmp_path / "run")
    del holders["a"]
    with pytest.raises(ValueError, match="the pipeline's 'text_encoder' is another object"):
        save_pretrained(holders, tmp_path / "run", pipeline=one)


def test_a_name_that_is_none_for_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"component's name .* '\.\./net'"):
        save_pretrained({"../net": network()}, tmp_path / "run")
    inside = nn.ModuleDict({"a/b": tiny_pipeline("ddpm").components["unet"]})
    with pytest.raises(ValueError, match=r"part's name .* 'a/b'"):
        save_pretrained({"net": inside}, tmp_path / "run")


# ---- the folder


def test_an_earlier_result_is_replaced_whole_and_nothing_else_is(tmp_path: Path) -> None:
    target = tmp_path / "run"
    save_pretrained({"a": network(), "b": network()}, target)
    save_pretrained({"a": network()}, target)
    assert {f.name for f in target.iterdir()} == {"README.md", "gendiff.json", "a.safetensors"}
    (tmp_path / "empty").mkdir()
    save_pretrained({"a": network()}, tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ValueError, match="something else in it"):
        save_pretrained({"a": network()}, tmp_path / "photos")
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained({"a": network()}, tmp_path / "photos" / "cat.png")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert {f.name for f in tmp_path.iterdir()} == {"run", "empty", "photos"}


@pytest.mark.parametrize("fails", ["save_file", "card_text", "flush", "rename"])
def test_a_failure_leaves_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    first, second = network(), network()
    save_pretrained({"net": first}, tmp_path / "run")
    rename = Path.rename
    if fails == "rename":  # the second of the two, when the earlier result is already out of the way
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if ".new-" in a.name else rename(a, b))
    elif fails == "flush":
        monkeypatch.setattr(folder_module, "_flush", fail)
    else:
        monkeypatch.setattr(saving, fails, fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained({"net": second}, tmp_path / "run")
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    load_pretrained({"net": second}, tmp_path / "run")
    assert torch.equal(second[0].weight, first[0].weight)
