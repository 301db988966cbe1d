"""A small GPT with the script's tensor-parallel layers, apex's layer norm and a wrapper for 16 bits."""

import math

import mpu
import torch
from apex.normalization.fused_layer_norm import FusedLayerNorm as LayerNorm
from torch import nn

_FLOAT_TYPES = (torch.FloatTensor, torch.cuda.FloatTensor)


@torch.jit.script
def gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


class Block(nn.Module):
    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads // mpu.get_model_parallel_world_size(), dropout
        self.norm1, self.norm2 = LayerNorm(hidden), LayerNorm(hidden)
        self.qkv = nn.ModuleList(mpu.ColumnParallelLinear(hidden, hidden) for _ in range(3))
        self.out = mpu.RowParallelLinear(hidden, hidden)
        self.up, self.down = (
            mpu.ColumnParallelLinear(hidden, 4 * hidden),
            mpu.RowParallelLinear(4 * hidden, hidden),
        )

    def forward(self, x, mask):
        batch, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(batch, length, self.heads, -1).transpose(1, 2) for layer in self.qkv)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1)
        with mpu.get_cuda_rng_tracker().fork():
            scores = nn.functional.dropout(scores, self.dropout, self.training)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.words = nn.Embedding(args.vocab, args.hidden)
        self.places = nn.Embedding(args.seq_length, args.hidden)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(args.hidden, args.heads, args.dropout) for _ in range(args.layers))
        self.norm = LayerNorm(args.hidden)
        self.checkpoint = args.checkpoint

    def forward(self, tokens, mask):
        x = self.words(tokens) + self.places(torch.cuda.LongTensor(range(tokens.shape[1])))
        for block in self.blocks:
            x = self.checkpoint(block, x, mask) if self.checkpoint else block(x, mask)
        return nn.functional.linear(self.norm(x), self.words.weight)


class FP16_Module(nn.Module):
    """Parameters in 16 bits; floats go in as 16 bits and come out as 32."""

    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, *inputs):
        inputs = [x.to(self.dtype) if isinstance(x, _FLOAT_TYPES) else x for x in inputs]
        out = self.module(*inputs)
        assert out.is_cuda
        return out.float()
