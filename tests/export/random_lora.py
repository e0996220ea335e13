"""A random adapter on the tiny pipeline, the images it gives, and what an export of it has to be equal to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora, lora_state
from rltune.export.base import Adapter
from rltune.export.proof import Trained
from rltune.training.evaluation import draw_images
from rltune.training.model_cache import load_base_model
from rltune.training.sampling import make_sampler
from rltune.training.setup import eval_image_set

CPU = torch.device("cpu")


def config_of(pipeline: Path | str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"base": str(pipeline)},
            "prompts": {"eval": ["a snail", "an octopus"]},
            "sampler": {"steps": 4, "guidance": 2.0},
            "rewards": {"brightness": {}},
            "evaluate": {"prompts": 2, "images_per_prompt": 1},
            **sections,
        }
    )


def drawing(config: RunConfig) -> Callable[[ModelFamily], Tensor]:
    def draw(model: ModelFamily) -> Tensor:
        return draw_images(make_sampler(config, model), eval_image_set(config, model), range(2), CPU)

    return draw


class RandomLora:
    """A model with a random adapter, as it is when a trial is exported."""

    def __init__(
        self,
        pipeline: Path,
        targets: str | Sequence[str] = "attention",
        *,
        rank: int = 2,
        alpha: float = 8.0,
        size: float = 0.3,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        self.pipeline = pipeline
        draw = drawing(config_of(pipeline))
        self.model = self.fresh()
        base_B3HW = draw(self.model)
        options: Any = {"use_rslora": use_rslora, "use_dora": use_dora}
        add_lora(self.model.network, rank=rank, alpha=alpha, targets=targets, seed=0, **options)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in self.model.network.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * size
                parameter.data = parameter.data * (1 + drawn) if "magnitude" in name else drawn
        self.adapter = Adapter(lora_state(self.model.network), rank, alpha, targets, use_rslora)
        self.trained = Trained(self.adapter, draw, base_B3HW, draw(self.model))

    def fresh(self, precision: str = "fp32") -> ModelFamily:
        return load_base_model(config_of(self.pipeline, resources={"precision": precision}), CPU)


def greatest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
