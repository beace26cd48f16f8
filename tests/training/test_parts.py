"""LoRA adapters: their file opens in the stock pipeline at their strength, beside whatever else trains."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gendiff import lora
from gendiff.testing import tiny_pipeline
from gendiff.training.loading import LORA_FILE, LORA_METADATA
from gendiff.training.names import parameters
from gendiff.training.parts import base_state, find
from gendiff.training.saving import load_pretrained, save_pretrained
from tests.training.kept import aligned, components, images, moved, network, put, same, snapshot

peft = pytest.importorskip("peft")


def by_diffusers(model: Any, config: Any) -> Any:
    model.add_adapter(config)
    return model


def by_injection(model: Any, config: Any, name: str = "style") -> Any:
    return peft.inject_adapter_in_model(config, model, name)


def by_peft(model: Any, config: Any) -> Any:
    return peft.get_peft_model(model, config)


def delta(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }


def stirred(model: nn.Module) -> None:
    """lora_B is zero at first, which would hide everything."""
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    put(adapters, moved(adapters, 0.3))


def adapted(kind: str = "flux", **settings: Any) -> tuple[Any, dict[str, nn.Module]]:
    """A pipeline whose network has an adapter that does something, and its components."""
    pipe = tiny_pipeline(kind)
    trained = components(pipe)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    by_diffusers(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["to_q"]} | settings))
    stirred(model)
    return pipe, trained


@pytest.mark.parametrize(
    ("kind", "attach", "settings"),
    [
        ("sd15", by_diffusers, {"rank_pattern": {"mid_block.*.to_q": 5}, "alpha_pattern": {"to_k": 3}}),
        ("sd3", by_injection, {"use_rslora": True}),
        ("flux", by_peft, {"use_dora": True}),
        pytest.param("sdxl", by_injection, {}, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_opens_in_the_stock_pipeline_at_its_strength(
    tmp_path: Path, kind: str, attach: Callable[[Any, Any], Any], settings: dict[str, Any]
) -> None:
    pipe, stock = tiny_pipeline(kind), tiny_pipeline(kind)
    trained = components(pipe)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    config = peft.LoraConfig(r=2, lora_alpha=11, target_modules=["to_q", "to_k"], **settings)
    network: Any = attach(getattr(pipe, name), config)
    trained["model"].backbone.network = network  # pyright: ignore
    stirred(network)
    before = snapshot(trained, pipe)
    save_pretrained(trained, tmp_path / "run", pipeline=pipe)
    assert same(before, snapshot(trained, pipe))
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"README.md", "gendiff.json", LORA_FILE}
    assert all(
        re.fullmatch(rf"{name}\..*\.lora_(A\.weight|B\.weight|magnitude_vector)", key)
        for key in load_file(tmp_path / "run" / LORA_FILE)
    )
    with safe_open(tmp_path / "run" / LORA_FILE, framework="pt") as opened:
        facts = json.loads(opened.metadata()[LORA_METADATA])
    assert (facts[f"{name}.r"], facts[f"{name}.lora_alpha"]) == (2, 11)

    stock.load_lora_weights(tmp_path / "run")
    live = delta(network, next(iter(getattr(pipe, name).peft_config)))
    assert any(bool(change.any()) for change in live.values())
    assert same(live, delta(getattr(stock, name), "default_0"))


def test_adapters_of_two_models_share_a_file_and_come_back(tmp_path: Path) -> None:
    def make() -> tuple[Any, dict[str, nn.Module]]:
        pipe, trained = adapted("sd15")
        config = peft.LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "v_proj"])
        by_injection(pipe.text_encoder, config, "default")
        return pipe, trained

    (pipe, trained), (_, fresh) = make(), make()
    averages = moved(parameters(trained), 0.3)
    assert all("lora_" in name for name in averages)
    save_pretrained(trained, tmp_path / "run", weights=averages, pipeline=pipe)
    load_pretrained(fresh, tmp_path / "run")
    assert same(parameters(fresh), averages)

    stock = tiny_pipeline("sd15")
    untuned = images(stock)
    stock.load_lora_weights(tmp_path / "run")
    put(parameters(trained), averages)
    for model in ("unet", "text_encoder"):
        live, back = delta(getattr(pipe, model), "default"), delta(getattr(stock, model), "default_0")
        assert live
        assert {name: torch.equal(change, back[name]) for name, change in live.items()} == dict.fromkeys(
            back, True
        )
    assert torch.equal(images(stock), images(pipe))
    assert not torch.allclose(images(stock), untuned, atol=1e-3)


def test_a_tuned_encoder_and_an_adapted_network_are_two_things(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    base = tiny_pipeline("flux").components["transformer"].state_dict()
    pipe, trained = adapted()
    pipe.text_encoder.requires_grad_(True)
    live = {name: p.detach() for name, p in parameters(trained).items()}
    averages = live | moved({name: p for name, p in live.items() if "codec" in name})
    save_pretrained(trained, tmp_path / "run", weights=averages, pipeline=pipe)
    opened = DiffusionPipeline.from_pretrained(tmp_path / "run", local_files_only=True)
    assert same(base, opened.transformer.state_dict())  # as before the adapter
    opened.load_lora_weights(tmp_path / "run")
    opened.set_progress_bar_config(disable=True)
    put(parameters(trained), averages)
    assert torch.equal(images(aligned(opened)), images(pipe))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["x_embedder"]}])
def test_the_base_is_what_it_was_before_the_adapters(settings: dict[str, Any]) -> None:
    network: Any = tiny_pipeline("flux").components["transformer"]
    before = network.state_dict()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"], **settings))
    assert len(network.state_dict()) > len(before)
    after = base_state(network)
    assert same({name: after[name] for name in before}, before)
    assert set(after) == set(before)


def test_an_adapter_beside_other_training_loses_nothing(tmp_path: Path) -> None:
    def make() -> dict[str, nn.Module]:
        pipe, trained = adapted()
        pipe.transformer.x_embedder.requires_grad_(True)
        return trained

    trained, fresh = make(), make()
    averages = moved(parameters(trained))
    save_pretrained(trained, tmp_path / "run", weights=averages)
    stock = tiny_pipeline("flux")
    stock.load_lora_weights(tmp_path / "run")  # although the component calls the network by another name
    put(parameters(trained), averages)
    network = trained["model"].backbone.network  # pyright: ignore
    assert same(delta(network, "default"), delta(stock.transformer, "default_0"))
    rest = load_file(tmp_path / "run" / "model.safetensors")
    assert set(rest) == {"backbone.network.x_embedder.weight", "backbone.network.x_embedder.bias"}
    load_pretrained(fresh, tmp_path / "run")
    assert same(parameters(fresh), averages)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters_have_a_folder_each(tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux")
    trained = components(pipe)
    for name, rank in (("one", 2), ("two", 3)):
        pipe.transformer.add_adapter(peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["to_q"]), name)
    for name, p in pipe.transformer.named_parameters():
        p.requires_grad_("lora_" in name)
    stirred(pipe.transformer)
    save_pretrained(trained, tmp_path / "run", pipeline=pipe)
    stock = tiny_pipeline("flux")
    for name in ("one", "two"):
        stock.load_lora_weights(tmp_path / "run" / name, adapter_name=name)
        assert same(delta(pipe.transformer, name), delta(stock.transformer, name))


def test_an_adapter_at_another_strength_is_refused(tmp_path: Path) -> None:
    pipe, trained = adapted()
    save_pretrained(trained, tmp_path / "run", pipeline=pipe)
    with pytest.raises(ValueError, match="lora_alpha=8, and the live one has 4"):
        load_pretrained(adapted(lora_alpha=4)[1], tmp_path / "run")
    pipe.set_adapters(["default"], [0.5])
    with pytest.raises(ValueError, match=r"live at the scale 2 .* say 4"):
        save_pretrained(trained, tmp_path / "other", pipeline=pipe)


def test_an_adapter_that_began_as_a_part_of_the_weights_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux")
    trained, network = components(pipe), pipe.transformer
    handle = lora.inject(network, lora.plan(network, "flux/attention", rank=2), "style", init="pissa")
    with pytest.raises(ValueError, match=r"'style' began by pissa.*lora\.save\(handle, path\)"):
        save_pretrained(trained, tmp_path / "run", pipeline=pipe)
    handle.remove()


def test_a_component_is_not_saved_over_the_adapter(tmp_path: Path) -> None:
    _, trained = adapted()
    with pytest.raises(ValueError, match="'pytorch_lora_weights' would be saved over"):
        save_pretrained(trained | {"pytorch_lora_weights": network()}, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_model_in_two_components_is_one_part() -> None:
    unet: Any = tiny_pipeline("ddpm").components["unet"]
    (part,) = find({"a": unet, "b": nn.ModuleDict({"net": unet})})
    assert (part.kind, part.name, part.where) == ("model", "a", "a")
