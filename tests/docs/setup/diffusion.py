"""The names that docs/recipes/diffusion.md takes for granted."""

import peft
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

unet = diffusers.UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32, attention_head_dim=8,
)  # fmt: skip
batches = [
    (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 20]), torch.randn(2, 5, 32)) for _ in range(2)
]
transformer = diffusers.FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
inputs = {
    "hidden_states": torch.randn(1, 16, 4),
    "encoder_hidden_states": torch.randn(1, 5, 32),
    "pooled_projections": torch.randn(1, 32),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(16, 3),
    "txt_ids": torch.zeros(5, 3),
}
