"""A small network that gives a number for a noisy latent, its timestep and its prompt: values and flows.

B: images. C, H, W: latent channels, rows, columns. D: text width.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from rltune.estimators.base import Setting

WIDTH = 64


class StateNetwork(nn.Module):
    """Two strided convolutions of the latent, averaged, with timestep and pooled text embedding into a perceptron."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.latent = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.text = nn.Linear(text_width, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(3 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        for parameter in self.out[-1].parameters():
            nn.init.zeros_(parameter)  # says 0 of everything at first

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BD: Tensor) -> Tensor:
        """Return ``(B,)`` float32."""
        time_BW = self.time(get_timestep_embedding(t_B, WIDTH))
        parts = [self.latent(x_BCHW.float()).mean((2, 3)), time_BW, self.text(text_BD.float())]
        return cast(Tensor, self.out(torch.cat(parts, dim=1))[:, 0])


class StateHead:
    """The network with its optimiser and a count of the rounds it has seen."""

    def __init__(self, setting: Setting, lr: float) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            network = StateNetwork(setting.latent_shape[0], setting.text_width)
        self.network = network.to(setting.device)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-4)
        self.num_rounds = 0

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimiser state and count."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_rounds": self.num_rounds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_rounds = state["num_rounds"]
