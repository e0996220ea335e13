"""PrefPaint's reward as it is published, from torch's own layers and open_clip's model, small and random.

B: images. D: width of a CLIP embedding.
"""

import open_clip
import torch
from torch import Tensor, nn

WIDTH = 32


class Block(nn.Module):
    """Both the layer and the encoder that copies it are in the published state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_layer = nn.TransformerEncoderLayer(2 * WIDTH, nhead=4, dim_feedforward=48, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(self.encoder_layer, num_layers=1)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * WIDTH, 24), nn.Dropout(0.2), nn.Linear(24, 16))
        self.last_layer = nn.Linear(16, 1, bias=False)
        self.last_layer_weight = self.last_layer.weight  # a second name for it, which state dicts hold too


class Published(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}
        text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
        self.clip_model = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text, quick_gelu=True)
        self.mlp, self.vit_block = Perceptron(), Block()
        with torch.no_grad():
            for parameter in (*self.mlp.parameters(), *self.vit_block.parameters()):
                parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.ndim == 1))
        self.eval()

    def forward(self, images: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and last features of images as CLIP sees them."""
        pair = torch.cat([self.clip_model.encode_image(images), self.clip_model.encode_image(given)], dim=-1)
        features = self.mlp.layers(self.vit_block.transformer_encoder(pair[:, None]))
        return self.mlp.last_layer(features)[:, 0, 0], features[:, 0]
