"""The same DiT in PyTorch as its users run it: torch.compile, bfloat16 autocast, scaled-dot-product attention, fused
AdamW, an EMA. Written from the paper (arXiv:2212.09748); it computes what `diffusion_transformer.DiT` does.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from diffusion_transformer import DiT as OurDiT
from diffusion_transformer import DiTConfig, position_table


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        hidden = int(mlp_ratio * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.ada_ln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        b, n, d = x.shape
        heads = self.heads
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.ada_ln(c).chunk(6, dim=-1)
        qkv = self.qkv(modulate(self.norm(x), shift_1, scale_1)).reshape(b, n, 3, heads, d // heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + gate_1[:, None] * self.out(y.transpose(1, 2).reshape(b, n, d))
        return x + gate_2[:, None] * self.mlp(modulate(self.norm(x), shift_2, scale_2))


class DiT(nn.Module):
    """Latents (b, c, h, w), times (b,) and labels (b,) -> velocity, float32."""

    def __init__(self, sizes: DiTConfig, latent_shape: tuple[int, int, int]):
        super().__init__()
        h, w, c = latent_shape
        p = sizes.patch_size
        d = sizes.hidden_size
        self.patch_size = p
        self.grid = (h // p, w // p)
        self.patch_embed = nn.Conv2d(c, d, p, p)
        self.register_buffer("table", torch.from_numpy(position_table(h // p, w // p, d)))
        self.time_embed = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.label_embed = nn.Embedding(sizes.num_classes + 1, d)
        self.blocks = nn.ModuleList(Block(d, sizes.num_heads, sizes.mlp_ratio) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.ada_ln = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.final = nn.Linear(d, p * p * c)

    def forward(self, x, t, labels):
        rows, columns = self.grid
        p = self.patch_size
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.table
        angles = 10_000 * t[:, None] * torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=t.device))
        c = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label_embed(labels)
        for block in self.blocks:
            x = block(x, c)
        x = self.final(modulate(self.norm(x), *self.ada_ln(c).chunk(2, dim=-1)))
        x = x.unflatten(1, (rows, columns)).unflatten(-1, (p, p, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).float()


class Run:
    """A model with its optimizer and EMA on the GPU, if there is one, else on the CPU."""

    def __init__(self, model: OurDiT, latent_shape: tuple[int, int, int], batch: int, dtype: str):
        sizes = model.config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")  # as DiT's and its followers' scripts do
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.model = DiT(sizes, latent_shape).to(self.device)
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0, fused=True
        )
        self.compiled = torch.compile(self.model)
        self.sizes = sizes
        h, w, c = latent_shape
        self.latents = torch.randn(batch, c, h, w, device=self.device)
        self.labels = torch.randint(sizes.num_classes, (batch,), device=self.device)

    def train_step(self) -> None:
        noise = torch.randn_like(self.latents)
        x_1 = self.latents
        t = torch.randn(len(x_1), device=self.device).sigmoid()
        is_dropped = torch.rand(len(x_1), device=self.device) < self.sizes.class_dropout_prob
        labels = self.labels.masked_fill(is_dropped, self.sizes.num_classes)
        fraction = t.clamp(max=0.99)[:, None, None, None]
        with self.autocast:
            prediction = self.compiled(torch.lerp(noise, x_1, fraction), t, labels)
        F.mse_loss(prediction, x_1 - noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1e-4)
        self.wait()

    @torch.no_grad()
    def sample(self, num_steps: int, cfg_scale: float) -> torch.Tensor:
        x = torch.randn_like(self.latents)
        labels = torch.cat([torch.full_like(self.labels, self.sizes.num_classes), self.labels])
        for i in range(num_steps):
            t = torch.full((2 * len(x),), i / num_steps, device=self.device)
            with self.autocast:
                v_uncond, v_cond = self.compiled(torch.cat([x, x]), t, labels).chunk(2)
            x = x + (v_uncond + cfg_scale * (v_cond - v_uncond)) / num_steps
        self.wait()
        return x

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
