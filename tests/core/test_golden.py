"""Agreement with the official implementations: stored outputs on recipe weights, names, shapes and norm eps."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import vae_core
from vae_core.families import FAMILIES
from vae_core.families.cv_vae import CVVAEConfig
from vae_core.families.iv_vae import IVVAEConfig

Config = CVVAEConfig | IVVAEConfig

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
TOLERANCE = 1e-5  # of the output's standard deviation, float32 against float64


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["case"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config_of(case: dict[str, Any]) -> Config:
    given = case["config"]
    if case["family"] == "iv-vae":
        return IVVAEConfig(
            dim=given["dim"],
            latent_channels=given["z_dim"],
            scale_factor=given.get("scale_factor", 1.0),
            shift_factor=given.get("shift_factor", 0.0),
        )
    if case["family"] == "cv-vae-sd3":
        widths, blocks = given["block_out_channels"], given["layers_per_block"]
    else:
        widths, blocks = [given["ch"] * factor for factor in given["ch_mult"]], given["num_res_blocks"]
    return CVVAEConfig(
        widths=tuple(widths),
        blocks_per_level=blocks,
        latent_channels=case["latent_shape"][1],
        sd3=case["family"] == "cv-vae-sd3",
    )


def load_case(case: dict[str, Any], recipe: ModuleType, dtype: torch.dtype) -> vae_core.VideoVAE:
    """Through the product's own loader, from official names; the config is inferred."""
    config = config_of(case)
    family = FAMILIES[case["family"]]
    with torch.device("meta"):
        shapes = dict(family.key_map(family.network(config)).values())
    scaling = {k: v for k, v in case["config"].items() if k in ("scale_factor", "shift_factor")}
    vae = vae_core.load(recipe.state_dict(shapes, case["seed"]), dtype=dtype, **scaling)
    assert vae.model.config == config
    return vae


def plan_of(case: dict[str, Any]) -> vae_core.ReferencePlan | None:
    tile = case["config"].get("tile_spatial_size")
    return vae_core.ReferencePlan(tile, case["config"]["tile_overlap_ratio"]) if tile else None


def whole(video: Tensor) -> Tensor:
    """The official IV-VAE code ignores frames beyond 1 + 4N."""
    return video[:, :, : 1 + (video.shape[2] - 1) // 4 * 4]


def outputs(case: dict[str, Any], vae: vae_core.VideoVAE, recipe: ModuleType) -> dict[str, Tensor]:
    """Everything that a golden file may hold, computed by us."""
    video = whole(recipe.video(tuple(case["video_shape"]), case["seed"]).to(vae.dtype))
    latent = recipe.latent(tuple(case["latent_shape"]), case["seed"]).to(vae.dtype)
    plan = plan_of(case)
    mean, logvar = vae.moments(video, plan=plan)
    return {
        "mean": mean,
        "logvar": logvar,
        "moments": torch.cat((mean, logvar), dim=1),
        "latent": vae.encode(video, plan=plan),
        "decoded": vae.decode(latent, plan=plan),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the expected output's standard deviation."""
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().std())


def test_recipe_draws_what_the_vectors_were_made_from(recipe: ModuleType) -> None:
    expected = torch.tensor([-0.7512057, -0.8608628, 0.9383271, -1.1388628])
    torch.testing.assert_close(recipe.draw("x", (4,), 0), expected)
    assert recipe.video((1, 3, 5, 16, 16), 1).double().sum().item() == pytest.approx(334.846839, abs=1e-4)
    assert recipe.latent((1, 4, 2, 2, 2), 1).double().sum().item() == pytest.approx(-3.10884799, abs=1e-6)


def test_all_fifteen_cases_are_here() -> None:
    assert len(CASES) == 15


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, 1e-6)])
def test_agrees_with_the_official_code(
    name: str, dtype: torch.dtype, tolerance: float, recipe: ModuleType, record_property: Any
) -> None:
    case, expected = read_case(name)
    got = outputs(case, load_case(case, recipe, dtype), recipe)
    errors = {key: relative_error(got[key], expected[key]) for key in expected}
    record_property("errors", errors)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("name", json.loads((GOLDEN / "checkpoint_keys.json").read_text()))
def test_published_names_and_shapes_load_strictly(name: str) -> None:
    shapes = json.loads((GOLDEN / "checkpoint_keys.json").read_text())[name]
    state = {key: torch.empty(shape, device="meta", dtype=torch.float16) for key, shape in shapes.items()}
    vae = vae_core.load(state, device="meta", dtype=None)
    assert vae.family == name.split("-z")[0]
    assert {theirs: list(shape) for theirs, shape in vae.model.family.key_map(vae.model).values()} == shapes
    if name.startswith("iv"):
        z, dim = (int(part.lstrip("zdim")) for part in name.split("-")[2:])
        assert (vae.info.latent_channels, vae.model.config) == (
            z,
            IVVAEConfig(
                dim=dim,
                latent_channels=z,
                scale_factor={4: 1.3196, 8: 1.0940, 16: 0.9697 if dim == 64 else 0.7619}[z],
                shift_factor={4: 0.1250, 8: -0.0322, 16: -0.1553 if dim == 64 else -0.0483}[z],
            ),
        )
    else:
        assert vae.model.config == CVVAEConfig(
            widths=(128, 256, 512, 512),
            blocks_per_level=2,
            latent_channels=16 if "sd3" in name else 4,
            sd3="sd3" in name,
        )
    assert vae.info.parameters == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_norm_eps_is_the_official_one(family: str, small_vae: Any) -> None:
    """A wrong eps hides below 1e-4 in the outputs, so it is checked directly."""
    vae = small_vae(family)
    norms = [m for m in vae.model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    expected = {"cv-vae": 1e-5, "cv-vae-sd3": 1e-6, "image-vae": 1e-6}
    assert {norm.eps for norm in norms} == ({expected[family]} if family in expected else set())
    if family == "cv-vae":
        assert sum(isinstance(norm, nn.LayerNorm) for norm in norms) == 1
    if family == "iv-vae":
        tiny = torch.full((1, 16, 1, 1, 1), 1e-13, dtype=torch.float64)
        first_norm = vae.model.encoder.stages[0].norm1
        # below eps = 1e-12 the norm divides by eps: each half is scaled by sqrt(8) / 1e-12 instead of being normalized
        torch.testing.assert_close(first_norm(tiny), tiny / 1e-12 * 8**0.5 * first_norm.gamma)
